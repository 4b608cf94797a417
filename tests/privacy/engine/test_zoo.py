"""Every kind of layer, under every selection and with chunks of every size, agrees with `torch.func`."""

import pytest
import torch
from agreement import GRANULARITIES, assert_agrees, draw_selections, run
from layer_zoo import ATTENTION, EMBEDDINGS, EXPANDED, FALLBACK, NORMS, N, Specimen
from per_sample_reference import example_losses, loop_gradients, vmap_gradients

from lightning_eff.batch import take
from lightning_eff.privacy.engine import PerSampleEngine, derived, fallback, uses
from lightning_eff.privacy.engine import engine as engine_file

ZOO = [*NORMS, *EMBEDDINGS, *ATTENTION, *EXPANDED, *FALLBACK]
by_name = pytest.mark.parametrize("specimen", ZOO, ids=lambda specimen: specimen.name)
# torch tells so where it loops over samples in the reference
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def made(specimen: Specimen) -> tuple[torch.nn.Module, object, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model, inputs = specimen.build().double(), specimen.inputs()
    gradients = loop_gradients(model, inputs, N) if specimen.loop else vmap_gradients(model, inputs)
    return model, inputs, gradients


@by_name
@pytest.mark.filterwarnings("ignore:.*did not take part in the step")
def test_norms_and_sums_equal_torch_func_under_every_selection(specimen: Specimen) -> None:
    model, inputs, gradients = made(specimen)
    assert_agrees(model, inputs, gradients)
    for granularity in GRANULARITIES[1:]:
        for drop_rate in (0.3, 0.9):
            assert_agrees(model, inputs, gradients, draw_selections(model, granularity, drop_rate))


@by_name
@pytest.mark.filterwarnings("ignore:.*did not take part in the step")
def test_gradients_made_one_at_a_time_are_the_same(specimen: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (uses, derived, fallback, engine_file):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    model, inputs, gradients = made(specimen)
    assert_agrees(model, inputs, gradients, draw_selections(model, "everything", 0.3))


@by_name
@pytest.mark.filterwarnings("ignore:.*did not take part in the step")
def test_physical_batches_of_one_and_of_three_add_up_to_the_whole(specimen: Specimen) -> None:
    torch.manual_seed(0)
    model, inputs = specimen.build().double(), specimen.inputs()
    engine = PerSampleEngine(model, tune=False)
    norms, sums = run(engine, inputs, N)
    for size in (1, 3):
        parts = [run(engine, take(inputs, slice(i, i + size)), min(size, N - i)) for i in range(0, N, size)]
        torch.testing.assert_close(torch.cat([part for part, _ in parts]), norms, rtol=1e-9, atol=1e-12)
        for name, total in sums.items():
            added = torch.stack([part[name] for _, part in parts]).sum(0)
            torch.testing.assert_close(added, total, rtol=1e-9, atol=1e-9)


@by_name
@pytest.mark.filterwarnings("ignore:.*did not take part in the step")
@pytest.mark.filterwarnings("ignore:a per-sample gradient is not finite")
def test_an_example_that_is_not_finite_contributes_nothing(specimen: Specimen) -> None:
    torch.manual_seed(0)
    model, inputs = specimen.build().double(), specimen.inputs()
    engine = PerSampleEngine(model, tune=False)
    others = [run(engine, take(inputs, slice(i, i + 1)), 1)[1] for i in range(N) if i != 2]
    with engine.record(N):
        output = model(inputs)
        output = output[0] if isinstance(output, tuple) else output
        weights = torch.ones(N, dtype=output.dtype)
        weights[2] = torch.inf
        loss = (example_losses(output) * weights).mean()
    engine.backward(loss)
    assert not engine.norms()[2].isfinite()
    for name, total in engine.clipped_sum(1.0).items():
        torch.testing.assert_close(total, torch.stack([one[name] for one in others]).sum(0), rtol=1e-9, atol=1e-9)
