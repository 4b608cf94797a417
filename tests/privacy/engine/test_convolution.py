"""Convolutions agree with torch.func on every kind of selection and by every way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import GRANULARITIES, assert_agrees, draw_selections, run
from per_sample_reference import vmap_gradients
from torch import Tensor, nn

from lightning_eff.privacy.engine import PerSampleEngine
from lightning_eff.privacy.engine.tuning import Plan, Tuner

N = 5
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2), (3, 11)),
    "2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 7, 6)),
    "2d without bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 5, 5)),
    "2d, one pixel": (lambda: nn.Conv2d(6, 4, 1), (6, 3, 4)),
    "2d in groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "2d by channel": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 5, 5)),
    "2d, same size": (lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2), (2, 6, 5)),
    "2d, valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 6, 5)),
    "2d, circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6, 5)),
    "3d": (lambda: nn.Conv3d(2, 3, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2)), (2, 3, 5, 4)),
}


def net(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    return nn.Sequential(build(), nn.ReLU(inplace=True)).double(), torch.randn(N, *shape).double()


@pytest.mark.parametrize("drop_rate", [0.3, 0.9])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", LAYERS)
def test_convolution_agrees_with_torch_func(name: str, granularity: str, drop_rate: float) -> None:
    model, inputs = net(name)
    assert_agrees(model, inputs, vmap_gradients(model, inputs), draw_selections(model, granularity, drop_rate))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_sides_that_differ() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, (2, 4), padding="same").double()
    inputs = torch.randn(N, 2, 5, 6).double()
    assert_agrees(model, inputs, vmap_gradients(model, inputs))


@pytest.mark.parametrize(("chunk", "store"), [(1, False), (3, True), (N, True)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["1d", "2d", "2d in groups", "2d by channel", "3d"])
def test_every_way_agrees(
    name: str, granularity: str, chunk: int, store: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = net(name)
    gradients, selections = vmap_gradients(model, inputs), draw_selections(model, granularity)
    grouped = "groups" in name or "channel" in name
    masked = granularity in ("mask", "everything")
    ways = ["fold"] if grouped else ["fold", "product", "product of rows"] + ([] if masked else ["gram"])
    for way in ways:

        def choose(tuner: Tuner, use: Any, way: str = way) -> Plan:
            assert use.methods() == ways
            return Plan(way, chunk, store and way != "gram")

        monkeypatch.setattr(Tuner, "plan", choose)
        assert_agrees(model, inputs, gradients, selections)


def test_several_images_of_an_example_belong_together() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(2, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1)).view(len(x), -1)

    torch.manual_seed(0)
    model = Views().double()
    inputs = torch.randn(N, 2, 2, 5, 5).double()
    gradients = vmap_gradients(model, inputs)
    for granularity in GRANULARITIES:
        assert_agrees(model, inputs, gradients, draw_selections(model, granularity))


def test_channels_last_images() -> None:
    model, inputs = net("2d")
    gradients = vmap_gradients(model, inputs)
    assert_agrees(model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last), gradients)


def test_an_image_without_batch_dimension_is_a_batch_of_one() -> None:
    model = nn.Conv2d(2, 3, 3)
    image = torch.randn(2, 5, 5)
    engine = PerSampleEngine(model)
    with engine.record(1):
        loss = model(image).square().sum()
    engine.backward(loss)
    norms = engine.norms()
    model(image).square().sum().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(norms, expected.view(1))


def test_bfloat16_has_norms_in_float32() -> None:
    model, inputs = net("2d")
    norms, sums = run(PerSampleEngine(model.bfloat16()), inputs.bfloat16(), N)
    assert norms.dtype == torch.float32
    assert {value.dtype for value in sums.values()} == {torch.float32}
