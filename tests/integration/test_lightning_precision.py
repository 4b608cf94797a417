"""Every technique in half precision: what stays in single precision, what is rounded, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning_cases import CASES, NOISE
from torch import nn

pytestmark = NOISE


def dtypes(module: nn.Module) -> set[torch.dtype]:
    return {one.dtype for one in module.parameters()}


@pytest.mark.parametrize("name", [name for name in CASES if name != "LidarSaSSelector"])
def test_weights_stay_in_single_precision_under_autocast(name: str) -> None:
    case = CASES[name]
    module, trainer = case.fit(precision="bf16-mixed")
    assert case.done(module, trainer)
    assert dtypes(module) == {torch.float32}
    exact, _ = case.fit()
    one, other = case.answer(module, case.batch()), case.answer(exact, case.batch())
    assert one.isfinite().all()
    assert not torch.equal(one, other)  # something was rounded


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("Lidar", "AdaGlimpse"))])
def test_everything_that_is_trained_is_rounded_where_that_is_asked_for(name: str) -> None:
    case = CASES[name]
    module, trainer = case.fit(precision="bf16-true")
    assert case.done(module, trainer)
    assert dtypes(module) == {torch.bfloat16}
    held: list[Any] = [value for optimizer in trainer.optimizers for value in optimizer.state.values()]
    shapes = {id(key): key.shape for optimizer in trainer.optimizers for key in optimizer.state}
    assert len(shapes) == len(held)
    assert all(one.isfinite().all() for one in module.parameters())


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("AdaGlimpseModule", "bf16-true", "the agent learns in single precision, got precision='bf16-true'"),
        ("LidarSaSSelector", "bf16-mixed", 'that of LineGameOptions.precision="bf16".*metres must not be rounded'),
        ("LidarSaSSelector", "bf16-true", 'that of LineGameOptions.precision="bf16".*metres must not be rounded'),
        ("LidarSaSCallback", "bf16-true", "LidarSaSCallback .*rounds before they are seen: use 'bf16-mixed'"),
        ("LidarSaSCallback", "16-true", "LidarSaSCallback .*rounds before they are seen: use 'bf16-mixed'"),
        ("DPGradientDropStrategy", "16-true", "use one of 32-true, 64-true, bf16-mixed, bf16-true"),
    ],
)
def test_precisions_that_would_round_what_must_not_be_are_refused(name: str, precision: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CASES[name].fit(precision=precision)
