"""Functions without a rule: run again where they treat samples one by one, refused where they do not."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from agreement import assert_agrees, run
from per_sample_reference import loop_gradients
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from lightning_eff.privacy.engine import PerSampleEngine, fallback, register_rule
from lightning_eff.privacy.engine.recording import RULES, Recorder
from lightning_eff.privacy.engine.uses import GradientUse


def scaled_sine(x: Tensor, weight: Tensor) -> Tensor:
    """A function of somebody else that torch lets be overridden."""
    if has_torch_function((x, weight)):
        return handle_torch_function(scaled_sine, (x, weight), x, weight)
    return torch.sin(x @ weight)


def centred(x: Tensor, weight: Tensor) -> Tensor:
    """Mixes samples."""
    if has_torch_function((x, weight)):
        return handle_torch_function(centred, (x, weight), x, weight)
    return (x - x.mean(0)) @ weight


class Model(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


class Cell(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x[:, 0])
        state = self.cell(x[:, 1], state)
        return state[0] if isinstance(state, tuple) else state


@pytest.fixture
def rules() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def examples() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 4, dtype=torch.float64)


def test_an_unknown_function_is_run_again_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    fallback._told.clear()
    model, x = Model(scaled_sine), examples()
    with caplog.at_level(logging.INFO, "lightning_eff"):
        for _ in range(2):
            assert_agrees(model, x, loop_gradients(model, x, 5))
    assert len(caplog.records) == 1
    assert "scaled_sine" in caplog.text


def test_a_function_that_mixes_examples_is_refused() -> None:
    engine = PerSampleEngine(Model(centred))
    with pytest.raises(RuntimeError, match=r"\['weight'\] got a gradient on a way that is not recorded"):
        run(engine, examples(), 5)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells_whose_state_begins_with_zeros(cell: Any) -> None:
    torch.manual_seed(0)
    model, x = Cell(cell(4, 3)).double(), torch.randn(5, 2, 4, dtype=torch.float64)
    assert_agrees(model, x, loop_gradients(model, x, 5))


def test_a_rule_of_ones_own_goes_first(rules: None) -> None:
    calls = []

    @register_rule(scaled_sine)
    def record(recorder: Recorder, x: Tensor, weight: Tensor) -> Tensor:
        calls.append(x.shape)
        part = recorder.part(weight)
        assert part is not None
        output = torch.sin(x @ recorder.detached(weight))

        def compute(gradient: Tensor) -> dict[str, Tensor]:
            inner = gradient * torch.cos(x @ weight.detach())
            return {part.name: torch.einsum("ni,no->nio", x, inner)}

        return recorder.tap(output, GradientUse([part], recorder.samples, compute))

    model, x = Model(scaled_sine), examples()
    assert_agrees(model, x, loop_gradients(model, x, 5))
    assert calls


def test_a_module_has_no_rule_of_its_own() -> None:
    with pytest.raises(TypeError, match="expected functions"):
        register_rule(nn.Linear)


class Recurrent(nn.Module):
    """Uses all outputs of its layer: sequence and both last states."""

    def __init__(self, double: bool, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 3, 2, bidirectional=True, batch_first=batch_first)
        self.batch_first = batch_first
        if double:
            self.double()

    def forward(self, x: Tensor) -> Tensor:
        output, (state, cell) = self.layer(x if self.batch_first else x.transpose(0, 1))
        sequence = (output if self.batch_first else output.transpose(0, 1)).contiguous().view(len(x), -1)
        return torch.cat([sequence, state.transpose(0, 1).flatten(1), cell.transpose(0, 1).flatten(1) ** 2], 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("double", [True, False])
def test_all_outputs_of_a_recurrent_layer_may_be_used(batch_first: bool, double: bool) -> None:
    torch.manual_seed(0)
    model, x = Recurrent(double, batch_first), torch.randn(5, 6, 4, dtype=torch.float64 if double else torch.float32)
    assert_agrees(model, x, loop_gradients(model, x, 5), rtol=1e-9 if double else 1e-4)


@pytest.mark.parametrize(("memory_budget_mb", "passes"), [(256, 1), (0, 2)])
def test_an_example_goes_back_once_for_all_weights_of_a_recurrent_layer(
    memory_budget_mb: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, vjp = [], torch.func.vjp

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return vjp(*args, **kwargs)

    monkeypatch.setattr(torch.func, "vjp", counted)
    model = Recurrent(double=False, batch_first=True)
    assert len(list(model.parameters())) == 16
    run(PerSampleEngine(model, memory_budget_mb=memory_budget_mb), torch.randn(5, 6, 4), 5)
    assert len(calls) == 5 * passes  # with no memory to keep them in, once for the norms and once for the sum


def test_layers_that_run_in_a_loop_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    fallback._told.clear()
    engine = PerSampleEngine(Recurrent(double=False, batch_first=True))
    for _ in range(2):
        run(engine, torch.randn(5, 6, 4), 5)
    (record,) = caplog.records
    assert "gradients of layer (torch.lstm) are made in a loop" in record.message


def test_packed_sequences_are_refused() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), 2), batch_first=True)
            return self.layer(packed)[1][0][0]

    with pytest.raises(ValueError, match="packed"):
        run(PerSampleEngine(Packed()), torch.randn(3, 2, 4), 3)


def test_dropout_between_recurrent_layers_is_refused_until_evaluation() -> None:
    layer = nn.LSTM(4, 3, 2, dropout=0.5, batch_first=True)
    with pytest.raises(ValueError, match="dropout=0"):
        run(PerSampleEngine(layer), torch.randn(3, 2, 4), 3)
    run(PerSampleEngine(layer.eval()), torch.randn(3, 2, 4), 3)


def test_examples_along_another_dimension_of_a_recurrent_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_first=False in a batch of 3"):
        run(PerSampleEngine(nn.LSTM(4, 3)), torch.randn(3, 2, 4), 3)
