"""Normalisation layers that let the batch act on a sample are refused."""

from collections.abc import Callable

import pytest
import torch
from agreement import run
from torch import nn
from torch.nn import functional

from lightning_eff.privacy.engine import PerSampleEngine


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False).eval()],
    ids=["training", "without running statistics"],
)
def test_batch_norm_with_statistics_of_the_batch_is_refused_with_both_ways_out(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"(?s)eval\(\).*GroupNorm"):
        run(PerSampleEngine(layer), torch.randn(3, 4), 3)


def test_instance_norm_that_keeps_statistics_of_the_batch_is_refused() -> None:
    layer = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    with pytest.raises(ValueError, match="track_running_stats"):
        run(PerSampleEngine(layer), torch.randn(3, 4, 5), 3)
    assert int(layer.num_batches_tracked) == 0
    run(PerSampleEngine(layer.eval()), torch.randn(3, 4, 5), 3)


def test_rows_that_are_no_multiple_of_the_examples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[5, 4\] in a batch of 3 samples"):
        run(PerSampleEngine(nn.LayerNorm(4)), torch.randn(5, 4), 3)


def test_input_that_is_changed_before_the_gradient_comes_is_refused() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 2
            normalised = self.norm(x)
            functional.relu_(x)
            return normalised

    with pytest.raises(RuntimeError, match="changed in place"):
        run(PerSampleEngine(Changing()), torch.randn(3, 4), 3)


@pytest.mark.parametrize(
    "normalise",
    [
        nn.BatchNorm1d(4, affine=False),
        nn.BatchNorm1d(4).requires_grad_(False),
        lambda x: functional.batch_norm(x, None, None, training=True),
        lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
        torch.no_grad()(nn.BatchNorm1d(4, affine=False)),
        nn.InstanceNorm1d(4, track_running_stats=True),
    ],
    ids=["without parameters", "frozen", "a function", "a function of torch", "without gradients", "instances"],
)
def test_statistics_of_the_batch_are_refused_where_nothing_of_the_layer_is_trained(
    normalise: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    class Statistics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(normalise(x))

    inputs = torch.randn(3, 4, 4) if isinstance(normalise, nn.InstanceNorm1d) else torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"statistics.*eval\(\)"):
        run(PerSampleEngine(Statistics()), inputs, 3)


def test_batch_norm_without_parameters_in_evaluation_mode_is_let_through() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False).eval(), nn.Linear(4, 2))
    norms, _ = run(PerSampleEngine(model), torch.randn(3, 4), 3)
    assert (norms > 0).all()
