"""Arguments that cannot be meant are told in the same words everywhere."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_eff import (
    AdaGlimpseModule,
    AgentConfig,
    CanvasBackbone,
    ClassificationTask,
    DepthCompletionModule,
    DigitsDataModule,
    DirichletPruneCallback,
    DPPrePruneCallback,
    EarlyExitModule,
    GlimpseConfig,
    ImageClassifier,
    LidarSaSSelector,
    MoEScalingModule,
    PrivacyLedger,
)
from lightning_eff.arguments import check_choice, check_number, check_whole, plain
from lightning_eff.lidar.completion import ColumnInterpolation
from lightning_eff.moe.decoder import DecoderConfig


@pytest.mark.parametrize("value", [0, 1.0, 2.5, math.nan, math.inf, True, "3", None])
def test_what_is_no_whole_number_of_the_least_size_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"steps must be a whole number >= 1, got {value!r}"):
        check_whole("steps", value)


def test_whole_numbers_may_come_from_numpy_and_have_a_largest() -> None:
    check_whole("steps", np.int64(3))
    check_whole("rank", 0, 0, 7)
    with pytest.raises(ValueError, match="rank must be a whole number from 0 to 7, got 8"):
        check_whole("rank", 8, 0, 7)


@pytest.mark.parametrize(
    ("bounds", "wanted", "bad", "good"),
    [
        ({"above": 0}, "be > 0", [0, -1, math.nan, True, "1", None], [1e-9, 7]),
        ({"least": 0}, "be >= 0", [-1e-9, math.nan, False], [0, np.float32(0.5)]),
        ({"most": 1}, "be <= 1", [1.1, math.nan], [1, -5.0]),
        ({"below": 1}, "be < 1", [1, math.nan], [0.9]),
        ({"least": 0, "below": 1}, r"lie in \[0, 1\)", [1, -0.1, math.nan], [0, 0.99]),
        ({"above": 0, "most": 1}, r"lie in \(0, 1\]", [0, 1.5, "half"], [1, 0.5]),
        ({}, "be a number", [math.nan, "x", True], [-3]),
    ],
)
def test_numbers_outside_of_their_range_are_refused(
    bounds: dict[str, float], wanted: str, bad: list[Any], good: list[Any]
) -> None:
    for value in good:
        check_number("rate", value, **bounds)
    for value in bad:
        with pytest.raises(ValueError, match=f"^rate must {wanted}, got {value!r}$"):
            check_number("rate", value, **bounds)
    with pytest.raises(ValueError, match=f"^rate must {wanted} and finite, got inf$"):
        check_number("rate", math.inf, **bounds)


@pytest.mark.parametrize("value", ["best", 1, True, None, ["min"]])
def test_unknown_choices_are_refused_with_the_known_ones(value: Any) -> None:
    with pytest.raises(ValueError, match="mode must be one of min, max, 3, got "):
        check_choice("mode", value, ("min", "max", 3))
    check_choice("mode", "max", ("min", "max", 3))


def test_numbers_of_numpy_become_pythons_own_also_within_options() -> None:
    given = {"lr": np.float32(0.5), "sizes": [np.int64(3), (np.float64(0.25), True, "x")], "none": None}
    found = plain(given)
    assert found == {"lr": 0.5, "sizes": [3, (0.25, True, "x")], "none": None}
    assert [type(found["lr"]), type(found["sizes"][0]), type(found["sizes"][1][0])] == [float, int, float]


def test_checkpoints_can_be_read_where_arguments_came_from_numpy() -> None:
    half, one, net = np.float64(0.5), np.int64(1), nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    decoder = DecoderConfig(d_model=np.int64(8), n_layers=one, n_heads=one, dropout=half)
    glimpse = GlimpseConfig(32, num_glimpses=2, patch_size=4, max_scale=half)
    agent = AgentConfig(state_parts=("patch", "box"), lr=half)
    modules = [
        ImageClassifier(net, lr=half, momentum=half),
        DepthCompletionModule(ColumnInterpolation(), lr=half, decay_every=one),
        MoEScalingModule(decoder, warmup_fraction=half),
        EarlyExitModule(net, [0.5], 2, phase_split=half, thresholds=[half]),
        AdaGlimpseModule(CanvasBackbone(num_classes=2), ClassificationTask(2), glimpse, agent),
        LidarSaSSelector(ColumnInterpolation(), k=[2], num_lines=8, seed=one),
    ]
    ledger = PrivacyLedger(np.float64(1e-5), max_epsilon=half)
    prune = DPPrePruneCallback(amount=half, seed=one)
    states = [*(dict(module.hparams) for module in modules), ledger.state_dict(), prune._current_settings()]
    for state in states:
        torch.save(state, file := io.BytesIO())
        file.seek(0)
        assert torch.load(file, weights_only=True) == state


def test_seeds_and_sizes_from_numpy_are_what_torch_takes() -> None:
    callback = DirichletPruneCallback(np.float32(0.5), seed=np.int64(3))
    assert (callback.amount, callback.seed) == (0.5, 3)
    torch.Generator().manual_seed(callback.seed)
    data = DigitsDataModule(batch_size=np.int64(4), seed=np.int64(1))
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))[1]) == 4
