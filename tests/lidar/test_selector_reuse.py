"""LidarSaSSelector on frames and with settings other than those of its fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adding import LINES, Adding, loader, sample, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_selector import different, fitted, lost, selector
from torch import Tensor

from lightning_eff.lidar.announcement import announcement
from lightning_eff.lidar.contest import contestants
from lightning_eff.lidar.lines import LidarWarning
from lightning_eff.lidar.selector import LidarSaSSelector
from lightning_eff.lidar.settings import Dynamic, LineGameOptions, Spread


class Writing(Adding):
    """It caps the sparse depth and blackens the image in place."""

    def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
        dense = super().forward(rgb, sparse)
        sparse.clamp_(max=0.1)
        return dense


def test_a_network_that_writes_into_its_input_is_measured_like_any_other() -> None:
    rows = []
    for model in (Adding(), Writing()):
        made = selector(model)
        run = fitted(made)
        run.test(made, loader(shuffle=False), verbose=False)
        rows.append(made.evaluations["test"].rows)
    assert rows[0] == rows[1]


def beyond() -> dict[str, Any]:
    one = sample(5)
    one["line_idx"][0, 0, 1] = LINES + 12
    return one


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_lines_beyond_the_sensors_are_refused_where_selections_are_measured(verb: str) -> None:
    made = selector()
    run = fitted(made)
    with pytest.raises(ValueError, match=r"frame 'frame 5'.*0 to 7"):
        getattr(run, verb)(made, loader([beyond()], shuffle=False), verbose=False)


def test_pixels_of_no_line_are_told_where_selections_are_measured() -> None:
    made = selector()
    run = fitted(made)
    with pytest.warns(LidarWarning, match="1 pixels with depth .8.3 %. belong to no line"):
        run.test(made, loader([lost(0), sample(1)], shuffle=False), verbose=False)
    assert "8.3 % of the pixels belong to no line." in made.evaluations["test"].notes
    strict = selector(game=LineGameOptions(metric="mae", unassigned="error"))
    run = fitted(strict)
    with pytest.raises(ValueError, match="belong to no line"):
        run.test(strict, loader([lost(0)], shuffle=False), verbose=False)


def test_the_frame_before_is_that_of_the_number_before() -> None:
    made = selector(dynamic=Dynamic("previous"), k=[1], spread=Spread("none"))
    run = fitted(made, loader([different(i) for i in range(4)]))
    run.test(made, loader([different(i) for i in (10, 8, 9)], shuffle=False), verbose=False)
    # even frames show the lines 0 to 2, odd ones 3 to 5; the first takes the mean values
    assert [made._measurement.own[f"frame {i}"][1] for i in (8, 9, 10)] == [[0], [0], [3]]


def test_frames_without_a_sequence_follow_no_other() -> None:
    made = selector(dynamic=Dynamic("previous"), k=[1])
    run = fitted(made)
    alone = {name: entry for name, entry in sample(5).items() if name != "sequence"}
    with pytest.raises(ValueError, match="frame 'frame 5' has no sequence"):
        run.test(made, loader([alone], shuffle=False), verbose=False)


def test_candidates_left_out_are_not_announced_as_null() -> None:
    made = selector(game=LineGameOptions(metric="mae", candidates=[0, 1, 2, 3]))
    fitted(made)
    assert "4 of 8 lines are candidates (null: 6-7; left out: 4-5)" in announcement(made.study)
    every = selector()
    fitted(every)
    assert "6 of 8 lines are candidates (null: 6-7);" in announcement(every.study)


# other k or spread than the checkpoint's


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A checkpoint of a fit that kept 3 and 2 lines by region."""
    run = fitted(selector())
    run.save_checkpoint(tmp_path / "finished.ckpt")
    return tmp_path / "finished.ckpt"


def test_a_checkpoint_tested_with_other_k_and_rule_is_selected_from_anew(finished: Path) -> None:
    model = Adding()
    made = selector(model, k=[4], spread=Spread("none"), baselines=["uniform"])
    trainer().test(made, loader(shuffle=False), ckpt_path=finished, verbose=False, weights_only=True)
    fresh = selector(k=[4], spread=Spread("none"), baselines=["uniform"])
    fitted(fresh)
    assert made.result.selected == fresh.result.selected == {4: [0, 2, 3, 5]}
    assert made.result.rules == {4: "none"}
    assert [(row.rule, row.k) for row in made.evaluations["test"].rows[:2]] == [("none", 4), ("uniform", 4)]
    assert made.evaluations["test"].row("none", 4).lines == [0, 2, 3, 5]
    loaded = LidarSaSSelector.load_from_checkpoint(finished, model=Adding(), k=[3], spread=Spread("none"))
    assert loaded.result.selected == {3: [0, 2, 3]}
    assert loaded.model.calls == 0


def test_rows_are_named_by_the_rule_that_selected_them() -> None:
    made = selector(spread=Spread("none"))
    fitted(made)
    other = replace(made.study.settings, spread=Spread("region"))
    assert [(one.rule, one.k) for one in contestants(made.result, other)[:2]] == [("none", 3), ("none", 2)]


@pytest.mark.parametrize(("k", "spread"), [([4], Spread("auto")), ([3, 2], Spread("region", refine="swap"))])
def test_rules_that_need_calibration_frames_ask_for_a_fit(k: list[int], spread: Spread, finished: Path) -> None:
    with pytest.raises(ValueError, match=r"spread: .*trainer\.fit\(selector, calibration_data, ckpt_path"):
        trainer().test(selector(k=k, spread=spread), loader(shuffle=False), ckpt_path=finished, verbose=False)


def test_some_of_the_numbers_of_a_checkpoint_need_no_frames(tmp_path: Path) -> None:
    made = selector(spread=Spread("auto"))
    fitted(made).save_checkpoint(tmp_path / "auto.ckpt")
    part = selector(spread=Spread("auto"), k=[2])
    trainer().test(part, loader(shuffle=False), ckpt_path=tmp_path / "auto.ckpt", verbose=False)
    assert part.result.selected == {2: made.result.selected[2]}
    assert part.result.scores == {2: made.result.scores[2]}
    with pytest.raises(ValueError, match=r"k: \[2, 3\] there, \[4\] here"):
        LidarSaSSelector.load_from_checkpoint(tmp_path / "auto.ckpt", model=Adding(), k=[4])


@pytest.mark.parametrize("max_epochs", [2, 5])
@pytest.mark.parametrize(
    ("k", "spread"), [([4], Spread("none")), ([4, 1], Spread("auto")), ([1], Spread("region", refine="greedy"))]
)
def test_a_finished_fit_resumed_ends_with_the_lines_asked_for(
    k: list[int], spread: Spread, max_epochs: int, finished: Path
) -> None:
    model = Adding()
    made, fresh = (selector(model, k=k, spread=spread), selector(k=k, spread=spread))
    trainer(max_epochs=max_epochs).fit(made, loader(), ckpt_path=finished)
    fitted(fresh)
    assert made.result.selected == fresh.result.selected
    assert made.result.rules == fresh.result.rules
    assert {name: [*sets] for name, sets in made.result.baselines.items()}["uniform"] == k
    again = trainer()
    again.test(made, loader(shuffle=False), verbose=False)


def test_a_fit_broken_off_goes_on_with_other_k(tmp_path: Path) -> None:
    fitted(selector(), None, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    made, fresh = selector(k=[4]), selector(k=[4])
    trainer().fit(made, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    fitted(fresh)
    assert made.result.selected == fresh.result.selected


def test_a_fit_without_an_epoch_left_leaves_modes_alone(finished: Path) -> None:
    model = Adding().eval()
    trainer().fit(selector(model), loader(), ckpt_path=finished)
    assert not any(module.training for module in model.modules())
