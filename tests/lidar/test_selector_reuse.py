"""LidarSaSSelector on frames and with settings other than those of its fit."""

from __future__ import annotations

from typing import Any

import pytest
from adding import LINES, Adding, loader, sample
from test_selector import different, fitted, lost, selector
from torch import Tensor

from lightning_eff.lidar.lines import LidarWarning
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
    assert [made._own[f"frame {i}"][1] for i in (8, 9, 10)] == [[0], [0], [3]]


def test_frames_without_a_sequence_follow_no_other() -> None:
    made = selector(dynamic=Dynamic("previous"), k=[1])
    run = fitted(made)
    alone = {name: entry for name, entry in sample(5).items() if name != "sequence"}
    with pytest.raises(ValueError, match="frame 'frame 5' has no sequence"):
        run.test(made, loader([alone], shuffle=False), verbose=False)


def test_candidates_left_out_are_not_announced_as_null() -> None:
    made = selector(game=LineGameOptions(metric="mae", candidates=[0, 1, 2, 3]))
    fitted(made)
    assert "4 of 8 lines are candidates (null: 6-7; left out: 4-5)" in made._announcement()
    every = selector()
    fitted(every)
    assert "6 of 8 lines are candidates (null: 6-7);" in every._announcement()
