"""The discrepancy as a metric."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_eff.synthesis.features import NTKFeatures
from lightning_eff.synthesis.metrics import NTKMMD
from lightning_eff.synthesis.networks import FCFeatureNet

FEATURES = NTKFeatures(FCFeatureNet(6, (40,), 2))


def draw(n: int, shift: float, seed: int) -> torch.Tensor:
    return shift + torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("estimator", ["u", "v"])
def test_value_is_that_of_the_kernel_matrix(estimator: Any) -> None:
    real, synthetic = draw(9, 0.0, 1), draw(7, 0.5, 2)
    metric = NTKMMD(FEATURES, estimator=estimator)
    metric.update(real[:4], real=True)
    metric.update(real[4:], real=True)
    metric.update(synthetic)
    parts = []
    for x in (real, synthetic):
        k, n = FEATURES.kernel(x), len(x)
        parts.append((k.sum() - k.trace()) / (n * (n - 1)) if estimator == "u" else k.mean())
    expected = parts[0] + parts[1] - 2 * FEATURES.kernel(real, synthetic).mean()
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-6)


def test_same_distribution_is_nearer_than_another_in_every_class() -> None:
    y = torch.arange(300) % 2
    target = FEATURES.class_sums(draw(300, 0.0, 1), y, 2)
    near, far = NTKMMD(FEATURES, 2, target=target, estimator="v"), NTKMMD(FEATURES, 2, target=target, estimator="v")
    near.update(draw(300, 0.0, 2), y)
    far.update(draw(300, 1.0, 2), y)
    assert float(near.compute()) < 0.03 < 0.1 < float(far.compute())


def test_classes_missing_on_one_side_are_left_out_and_reset_forgets() -> None:
    x, y = draw(20, 0.0, 1), torch.arange(20) % 2
    metric = NTKMMD(FEATURES, 3)
    metric.update(x, y, real=True)
    metric.update(x[y == 0], y[y == 0])
    only = NTKMMD(FEATURES)
    only.update(x[y == 0], real=True)
    only.update(x[y == 0])
    assert float(metric.compute()) == pytest.approx(float(only.compute()))
    metric.reset()
    metric.update(x[:1], y[:1])
    with pytest.raises(ValueError, match="at least 2 real and 2 synthetic samples"):
        metric.compute()


def test_what_does_not_fit_is_refused() -> None:
    target = FEATURES.class_sums(draw(4, 0.0, 1), torch.arange(4) % 2, 2)
    with pytest.raises(ValueError, match="a target of 1 classes, got 2"):
        NTKMMD(FEATURES, target=target)
    with pytest.raises(ValueError, match="expected labels, as there are 2 classes"):
        NTKMMD(FEATURES, 2).update(draw(4, 0.0, 1))
    with pytest.raises(ValueError, match="the real side was given as target"):
        NTKMMD(FEATURES, 2, target=target).update(draw(4, 0.0, 1), torch.arange(4) % 2, real=True)
    with pytest.raises(ValueError, match="estimator"):
        NTKMMD(FEATURES, estimator="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes must be a whole number >= 1, got 0"):
        NTKMMD(FEATURES, 0)
