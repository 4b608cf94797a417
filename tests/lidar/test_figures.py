"""Figures of lines: what they show, read back from the axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from outcomes import evaluation, selection

from lightning_eff.lidar import figures
from lightning_eff.lidar.completion.hole_filling import pull_push
from lightning_eff.lidar.frames import Frame, frames_of
from lightning_eff.lidar.report import LineSelection
from lightning_eff.lidar.synthetic import SyntheticLidarDataset
from lightning_eff.reporting import KEPT, save_figure


@pytest.fixture(scope="module")
def frame() -> Frame:
    sample = SyntheticLidarDataset(1, scale=8)[0]
    batch: dict[str, Any] = {name: sample[name][None] for name in ("rgb", "sparse", "line_idx")}
    return frames_of({**batch, "sample_id": [sample["sample_id"]]}, sample["gt"][None])[0]


def test_bars_stand_at_the_lines_numbers_and_selected_ones_are_coloured(tmp_path: Any) -> None:
    figure = figures.values_figure(selection(), 3)
    bars = figure.axes[0].patches[:6]
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([0, 1, 2, 4, 5, 6])
    coloured = [same_color(bar.get_facecolor(), KEPT) for bar in bars]
    assert coloured == [True, False, True, False, False, True]
    strip = figure.axes[1].collections
    assert [len(rows.get_offsets()) for rows in strip] == [3, 1]
    save_figure(figure, tmp_path / "values.png")


def test_unknown_errors_are_drawn_as_none() -> None:
    figures.values_figure(selection(se=torch.full((6,), torch.nan, dtype=torch.float64)))
    figures.values_figure(selection(se=torch.full((6,), torch.inf, dtype=torch.float64)))


def test_lines_meet_the_ground_where_their_elevation_says() -> None:
    axis = figures.elevation_figure(selection(), 3).axes[0]
    rays = axis.lines[:8]
    assert rays[7].get_xdata()[1] == pytest.approx(1.73 / np.tan(np.radians(5)))
    assert [same_color(ray.get_color(), KEPT) for ray in rays] == [line in (0, 2, 6) for line in range(8)]
    with pytest.raises(ValueError, match="elevations"):
        figures.elevation_figure(selection(elevations=None))


def test_lines_left_out_of_the_candidates_are_not_said_to_be_unseen() -> None:
    def legends(made: LineSelection) -> list[set[str]]:
        drawn = (figures.values_figure(made), figures.elevation_figure(made))
        return [{text.get_text() for text in figure.axes[0].get_legend().get_texts()} for figure in drawn]

    for labels in legends(selection()):  # lines 3 and 7 have no pixel
        assert "not in the image" in labels
        assert "no candidates" not in labels
    for labels in legends(selection(pixels=torch.tensor([9, 8, 7, 3, 6, 5, 4, 0]))):
        assert {"not in the image", "no candidates"} <= labels
    for labels in legends(selection(pixels=torch.full((8,), 5))):
        assert "not in the image" not in labels
        assert "no candidates" in labels


def test_kept_and_dropped_points_add_up_to_all(frame: Frame) -> None:
    figure = figures.points_figure(frame, [0, 10, 20])
    dropped, kept = figure.axes[0].collections
    line = frame.line_idx[frame.sparse > 0]
    assert len(kept.get_offsets()) == int(torch.isin(line, torch.tensor([0, 10, 20])).sum()) > 0
    assert len(kept.get_offsets()) + len(dropped.get_offsets()) == len(line)
    figures.points_figure(frame, [])


def test_errors_have_one_curve_a_rule_a_band_and_two_levels() -> None:
    axis = figures.errors_figure(evaluation()).axes[0]
    labels = [line.get_label() for line in axis.lines]
    assert labels == ["region", "gap_dp", "random, +- 1 SD", "dynamic oracle", "all lines", "no lidar"]
    assert len(axis.collections) == 1
    levels = [line.get_ydata()[0] for line in axis.lines[-2:]]
    assert levels == [100.0, 1800.0]


def test_the_heat_map_has_a_row_a_frame() -> None:
    figure = figures.frames_figure(selection())
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (2, 7)  # lines 0 to 6, of which 3 is no candidate
    assert image.mask[:, 3].all()
    assert image[1, 4] == 3.0
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["7", "b"]
    with pytest.raises(ValueError, match="single frames"):
        figures.frames_figure(selection(per_frame={}))


def test_convergence_leaves_out_what_is_not_known() -> None:
    error, stability = figures.convergence_figure(selection()).axes
    assert list(error.lines[0].get_xdata()) == [400]
    assert list(stability.lines[0].get_ydata()) == [0.5]


def test_the_triptych_tells_the_error_of_the_completion(frame: Frame) -> None:
    dense = pull_push(frame.sparse[None])[0]
    figure = figures.completion_figure(frame, frame.sparse, dense)
    known = frame.gt > 0
    rmse = 1000 * float((dense - frame.gt)[known].square().mean().sqrt())
    titles = [axis.get_title() for axis in figure.axes[:3]]
    assert titles[0].endswith(f"{int((frame.sparse > 0).sum()):,} points left")
    assert titles[2] == f"absolute error, RMSE {rmse:,.0f} mm"


def test_figures_are_the_same_for_images_that_are_normalised(frame: Frame) -> None:
    image = figures._image(frame.rgb * 4 - 2)
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    assert figures._image(frame.rgb[:1]).shape[-1] == 3
