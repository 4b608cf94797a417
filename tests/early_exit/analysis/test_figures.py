"""Pictures of the analyses show what they say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_hex

from lightning_eff.early_exit.analysis import (
    Dominance,
    Information,
    LayerInformation,
    LinearPath,
    LossPlane,
    dominance_figure,
    information_figure,
    path_figure,
    plane_figure,
    rank_figure,
)
from lightning_eff.reporting import REFERENCE, SERIES, save_figure

OUTPUTS = ("layer1", "a.layer.with.a.long.name", "final")


def dominance(values: list[list[float]]) -> Dominance:
    return Dominance(torch.tensor(values, dtype=torch.float64), ("stage", "backbone"), OUTPUTS, "share")


HISTORY = {
    0: dominance([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]),
    2: dominance([[1.5, -0.5, 0.0], [0.0, 0.0, 1.0]]),
    6: dominance([[math.nan] * 3, [0.3, 0.3, 0.4]]),
}


def information(samples: int = 100) -> LayerInformation:
    bounds = tuple(Information(low, low + 1, 0.1) for low in (1.0, 2.0, 0.5))
    return LayerInformation(OUTPUTS, bounds, (0.5, 1.0, 2.0), samples)


def path() -> LinearPath:
    positions = torch.linspace(0, 1, 5, dtype=torch.float64)
    loss = torch.stack([1 + 4 * positions * (1 - positions), 2 - positions, positions], 1)
    return LinearPath(positions, loss, 1 - loss / 4, OUTPUTS)


def plane() -> LossPlane:
    positions = torch.linspace(-1, 1, 5, dtype=torch.float64)
    valley = 0.1 + positions[:, None] ** 2 + 0.1 * positions**2  # steep along the first direction
    return LossPlane(positions, torch.stack([valley, 2 * valley, 100 * valley], -1), torch.zeros(5, 5, 3), OUTPUTS)


def test_gradient_shares_are_shown_by_epoch_with_the_switch_between_epochs() -> None:
    figure = dominance_figure(HISTORY, switches=[2])
    axis = figure.axes[0]
    shown = axis.images[0].get_array()
    assert shown.shape == (3, 3)  # outputs, epochs
    assert shown[:, 0].tolist() == [0.2, 0.3, 0.5]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "2", "6"]
    assert axis.lines[0].get_xdata()[0] == 0.5
    assert axis.images[0].get_clim() == (-1, 1)
    assert to_hex(axis.get_facecolor()).upper() == REFERENCE  # seen where shares are not known
    assert axis.get_title() == "gradient of stage"


def test_gradient_shares_of_some_groups_only() -> None:
    figure = dominance_figure(HISTORY, groups=["backbone"])
    titles = [axis.get_title() for axis in figure.axes if axis.images]
    assert titles == ["gradient of backbone"]


def test_ranks_are_a_line_for_every_run() -> None:
    ranks = {"joint": {"layer1": 30.0, "final": 9.0}, "mixed": {"layer1": 50.0, "final": 8.0}}
    axis = rank_figure(ranks).axes[0]
    assert [list(line.get_ydata()) for line in axis.lines] == [[30, 9], [50, 8]]
    assert [line.get_color() for line in axis.lines] == list(SERIES[:2])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["joint", "mixed"]
    assert rank_figure(ranks, log=True).axes[0].get_yscale() == "log"


def test_information_shows_both_bounds_the_ceiling_and_predictions() -> None:
    inputs, labels = information_figure({"joint": information()}).axes
    assert [list(line.get_ydata()) for line in inputs.lines[:2]] == [[1.0, 2.0, 0.5], [2.0, 3.0, 1.5]]
    assert inputs.lines[2].get_ydata()[0] == math.log(100)
    assert list(labels.lines[0].get_ydata()) == [0.5, 1.0, 2.0]


def test_path_shows_every_output_its_chord_and_its_barrier() -> None:
    figure = path_figure(path())
    loss, accuracy = figure.axes
    assert list(loss.lines[0].get_ydata()) == [1, 1.75, 2, 1.75, 1]
    assert list(loss.lines[1].get_ydata()) == [1, 1]  # the chord
    assert list(accuracy.lines[2].get_ydata()) == [1, 0.9375, 0.875, 0.8125, 0.75]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "layer1: 1.00"
    assert labels[2] == "final: 0.00"


def test_plane_has_the_first_direction_across_and_one_scale_for_all_outputs() -> None:
    figure = plane_figure(plane())
    panels = [axis for axis in figure.axes if axis.collections and axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["layer1", "\N{HORIZONTAL ELLIPSIS}ith.a.long.name", "final"]
    contours = panels[0].collections[0]
    assert contours.get_clim() == pytest.approx((0.1, 120))
    # a contour of the valley is wider along the second direction, which is vertical, than along the first
    box = contours.get_paths()[0].get_extents()
    assert box.height > 1.5 * box.width
    assert list(panels[0].lines[0].get_xdata()) == [0]


def test_plane_with_losses_that_are_not_finite_is_drawn() -> None:
    one = plane()
    one.loss[0, 0] = math.inf
    one.loss[1, 0] = math.nan
    one.loss[2, 2] = 0
    assert len([axis for axis in plane_figure(one, [-1]).axes if axis.get_title()]) == 1


def test_what_cannot_be_drawn_is_refused() -> None:
    other = Dominance(torch.zeros(1, 3), ("stage",), OUTPUTS, "share")
    with pytest.raises(ValueError, match="needs at least one epoch"):
        dominance_figure({})
    with pytest.raises(ValueError, match="but epoch 1 has"):
        dominance_figure({0: HISTORY[0], 1: other})
    with pytest.raises(ValueError, match=r"expected groups among \['stage', 'backbone'\], got \['layer9'\]"):
        dominance_figure(HISTORY, groups=["layer9"])
    with pytest.raises(ValueError, match="rank_figure needs at least one run"):
        rank_figure({})
    with pytest.raises(ValueError, match=r"runs on the same layers \['a'\], but 'two' has \['b'\]"):
        rank_figure({"one": {"a": 1.0}, "two": {"b": 1.0}})
    with pytest.raises(ValueError, match="information_figure needs at least one run"):
        information_figure({})
    with pytest.raises(ValueError, match=r"expected outputs in -3..2, got \[3\]"):
        plane_figure(plane(), [3])
    nothing = LossPlane(torch.arange(2.0), torch.full((2, 2, 3), math.nan), torch.zeros(2, 2, 3), OUTPUTS)
    with pytest.raises(ValueError, match="expected losses above zero somewhere"):
        plane_figure(nothing)


def test_figures_are_written(tmp_path: Path) -> None:
    figures = (
        dominance_figure(HISTORY, switches=[2]),
        rank_figure({"joint": {"layer1": 30.0, "final": 9.0}}),
        information_figure({"joint": information(), "mixed": information(50)}),
        path_figure(path()),
        plane_figure(plane()),
    )
    for number, figure in enumerate(figures):
        assert save_figure(figure, tmp_path / f"{number}.png").stat().st_size > 5_000
