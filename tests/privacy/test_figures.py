"""Figures of private training show the numbers they are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.privacy.figures import accuracy_figure, epsilon_figure, kept_share_figure, tension_figure
from lightning_eff.privacy.selection.selected import Selection
from lightning_eff.reporting import save_figure


def test_epsilon_grows_to_what_the_ledger_says_and_bends_where_settings_change(tmp_path: Path) -> None:
    ledger = PrivacyLedger(delta=1e-5, max_epsilon=3.0, accountant="rdp")
    ledger.record(1.0, 0.01, 100)
    ledger.record(2.0, 0.02, 150)
    figure = epsilon_figure(ledger, points=5)
    curve, bound = figure.axes[0].lines
    assert curve.get_xdata().tolist() == [0, 1, 50, 100, 101, 150, 200, 250]
    epsilons = curve.get_ydata().tolist()
    assert epsilons[0] == 0
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == ledger.epsilon()
    first = PrivacyLedger(delta=1e-5, accountant="rdp")
    first.record(1.0, 0.01, 100)
    assert epsilons[3] == first.epsilon()
    assert bound.get_ydata()[0] == 3.0
    assert save_figure(figure, tmp_path / "epsilon.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="the ledger holds no step"):
        epsilon_figure(PrivacyLedger())


def test_accuracy_is_drawn_over_epsilon_in_order(tmp_path: Path) -> None:
    figure = accuracy_figure({"dense": [(2.0, 0.8), (1.0, 0.7)], "d = 0.5": [(1.0, 0.72)]}, chance=0.1, delta=1e-5)
    dense, half, chance = figure.axes[0].lines
    assert list(dense.get_xdata()) == [1.0, 2.0]
    assert list(dense.get_ydata()) == [0.7, 0.8]
    assert list(half.get_ydata()) == [0.72]
    assert chance.get_ydata()[0] == 0.1
    assert save_figure(figure, tmp_path / "accuracy.png").stat().st_size > 5_000


def test_the_best_cell_of_the_heat_map_is_framed(tmp_path: Path) -> None:
    figure = tension_figure([0.0, 0.5], [0.0, 0.5, 0.9], [[0.80, 0.84, 0.78], [0.79, 0.77, float("nan")]])
    axis = figure.axes[0]
    assert sorted(text.get_text() for text in axis.texts) == ["0.770", "0.780", "0.790", "0.800", "0.840"]
    (frame,) = axis.patches
    assert (round(frame.get_x() + 0.47), round(frame.get_y() + 0.46)) == (1, 0)
    assert save_figure(figure, tmp_path / "tension.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match=r"expected accuracies as 2 rows of 1, got rows of \[1\]"):
        tension_figure([0.0, 0.5], [0.0], [[1.0]])


def test_bars_show_the_share_of_every_tensor(tmp_path: Path) -> None:
    mask = torch.zeros(10, 4, dtype=torch.bool)
    mask[:5] = True
    selections = {"w": Selection((10, 4), rows=torch.tensor([0, 2])), "b": Selection.all((10,))}
    figure = kept_share_figure(selections, {"w": Selection((10, 4), mask=mask)})
    widths = [[bar.get_width() for bar in bars] for bars in figure.axes[0].containers]
    assert widths == [[0.5, 1.0], [0.2, 1.0]]
    assert "36.0% of all" in figure.axes[0].get_title()
    assert save_figure(figure, tmp_path / "kept.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="there is no selection"):
        kept_share_figure({})
