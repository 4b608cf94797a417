import dataclasses
import math

import numpy as np
import pytest
import torch

from lightning_eff.early_exit.evaluation.curve import CurveResult
from lightning_eff.early_exit.evaluation.figures import (
    curve_figure,
    exit_figure,
    history_figure,
    output_labels,
    reliability_figure,
    samples_figure,
)
from lightning_eff.early_exit.evaluation.tables import compare_table, to_latex
from lightning_eff.reporting import KEPT, REMOVED, Column, Table, save_figure


def curve(shift=0.0):
    return CurveResult(
        policy="max_prob",
        thresholds=[0.0, 0.5, 1.0],
        accuracy=[0.6 + shift, 0.8 + shift, 0.9 + shift],
        cost=[0.3, 0.5, 1.1],
        costs=[0.3, 0.6, 1.1],
        head_accuracy=[0.6 + shift, 0.7 + shift, 0.85 + shift],
        exit_rate=[[1.0, 0.0, 0.0], [0.5, 0.25, 0.25], [0.0, 0.0, 1.0]],
        exit_right=[[0.6, 0.0, 0.0], [0.45, 0.2, 0.15], [0.0, 0.0, 0.9]],
        oracle_accuracy=0.95,
        overthinking=0.1,
    )


def test_tables_tell_mean_and_standard_deviation_over_seeds():
    table = compare_table({"mixed": [curve(), curve(0.02)], "joint": curve()}, budgets=(0.25, 0.5, 1.0))
    assert [column.name for column in table.columns] == ["method", "25 %", "50 %", "100 %", "max"]
    # standard deviation of two values 2 apart: 2 / sqrt(2)
    assert table.rows[0] == ("mixed", None, "81.00 ± 1.41", "81.00 ± 1.41", "91.00 ± 1.41")
    assert table.rows[1] == ("joint", None, "80.00", "80.00", "90.00")


def test_a_budget_that_one_seed_cannot_keep_has_no_mean():
    dear = dataclasses.replace(curve(), cost=[0.6, 0.7, 1.1])
    assert compare_table({"mixed": [curve(), dear]}, budgets=(0.5,)).rows[0][1] is None


def test_tables_leave_as_latex():
    text = to_latex(compare_table({"our_own": [curve(), curve(0.02)]}, budgets=(0.25,)))
    assert text.splitlines()[2:] == [
        r"\begin{tabular}{lrr}",
        r"\hline",
        r"method & 25 \% & max \\",
        r"\hline",
        r"our\_own & - & 91.00 $\pm$ 1.41 \\",
        r"\hline",
        r"\end{tabular}",
    ]
    plain = to_latex(Table("", ["a"], [("50% & #1",)]))
    assert r"50\% \& \#1 \\" in plain
    assert "0.50" in to_latex(Table("", [Column("a", ".2f")], [(0.5,)]))


def line(axis, label):
    return next(one for one in axis.get_lines() if one.get_label() == label)


def test_curves_are_lines_with_dots_at_single_outputs_and_a_cross_at_the_backbone(tmp_path):
    figure = curve_figure({"joint": curve()}, budgets=(0.25, 0.5, 1.0))
    axis = figure.axes[0]
    assert line(axis, "joint").get_xydata().tolist() == [[0.3, 0.6], [0.5, 0.8], [1.1, 0.9]]
    dots = next(one for one in axis.get_lines() if one.get_marker() == "o")
    assert dots.get_xydata().tolist() == [[0.3, 0.6], [0.6, 0.7], [1.1, 0.85]]
    cross = next(one for one in axis.get_lines() if one.get_marker() == "x")
    assert cross.get_xydata().tolist() == [[1.0, 0.85]]
    budgets = [one.get_xdata()[0] for one in axis.get_lines() if one.get_linestyle() == ":"]
    assert budgets == [0.5, 1.0]  # 25 % is cheaper than any setting
    assert not axis.collections  # one seed has no band
    assert save_figure(figure, tmp_path / "curve.png").stat().st_size > 10_000


def test_seeds_are_a_line_of_means_in_a_band():
    axis = curve_figure({"joint": curve(), "mixed": [curve(), curve(0.02)]}).axes[0]
    assert line(axis, "mixed").get_ydata() == pytest.approx([0.61, 0.81, 0.91])
    (band,) = axis.collections
    at_half = [y for x, y in band.get_paths()[0].vertices if x == 0.5]
    assert min(at_half) == pytest.approx(0.81 - 0.01 * math.sqrt(2))
    assert max(at_half) == pytest.approx(0.81 + 0.01 * math.sqrt(2))


def test_results_draw_themselves():
    assert line(curve().figures()["curve"].axes[0], "max_prob").get_ydata().tolist() == [0.6, 0.8, 0.9]


@pytest.mark.parametrize("runs", [{}, {"joint": []}])
def test_methods_without_curves_are_refused(runs):
    for draw in (curve_figure, compare_table):
        with pytest.raises(ValueError, match="one curve or more of each method"):
            draw(runs)


def test_curves_of_one_method_must_have_the_same_thresholds():
    short = dataclasses.replace(curve(), cost=[0.3, 1.1], accuracy=[0.6, 0.9])
    with pytest.raises(ValueError, match="curves of 'mixed' over equally many thresholds"):
        curve_figure({"mixed": [curve(), short]})


def test_exit_figure_stacks_right_and_wrong_answers():
    exit_index = torch.tensor([0, 0, 0, 2, 2])
    correct = torch.tensor([True, True, False, False, True])
    axis = exit_figure(exit_index, correct, 4).axes[0]
    right, wrong = axis.containers
    assert [bar.get_height() for bar in right] == pytest.approx([0.4, 0, 0.2, 0])
    assert [bar.get_height() for bar in wrong] == pytest.approx([0.2, 0, 0.2, 0])
    assert [bar.get_y() for bar in wrong] == pytest.approx([0.4, 0, 0.2, 0])
    assert [text.get_text() for text in axis.texts] == ["66.7%\nright", "50.0%\nright"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["exit 0", "exit 1", "exit 2", "final"]


def test_reliability_shows_the_share_of_right_answers_in_each_bin():
    confidence = torch.tensor([[0.45, 0.55, 0.95, 1.0], [0.9, 0.9, 0.9, 0.9]])
    correct = torch.tensor([[False, True, True, True], [True, False, True, True]])
    first, last = reliability_figure(confidence, correct, bins=2).axes
    heights = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in first.patches]
    assert np.array(heights) == pytest.approx(np.array([[0.25, 0.0], [0.75, 1.0]]))
    # |0 - .45| / 4 + |1 - .8333| * 3 / 4
    assert first.get_title() == "exit 0: error 0.237"
    assert last.get_title() == "final: error 0.150"
    assert [bar.get_height() for bar in last.patches] == [0.75]  # bins without samples have no bar


def test_reliability_of_many_outputs_fills_lines():
    axes = reliability_figure(torch.rand(6, 20), torch.rand(6, 20) > 0.5).axes
    assert [axis.get_title().split(":")[0] for axis in axes if axis.get_visible()] == output_labels(6)


@pytest.mark.parametrize("shape", [(3, 5, 5), (1, 5, 5), (5, 5)])
def test_samples_are_ordered_from_first_and_surest_to_last_and_least_sure(shape):
    images = torch.rand(4, *shape)
    exit_index, confidence = torch.tensor([2, 0, 2, 0]), torch.tensor([0.3, 0.8, 0.4, 0.9])
    prediction, target = torch.tensor([0, 1, 1, 1]), torch.tensor([1, 1, 1, 1])
    axes = samples_figure(images, exit_index, confidence, prediction, target, 3, classes=["cat", "dog"], count=2).axes
    assert [axis.get_title() for axis in axes] == [
        "exit 0\ndog",
        "exit 0\ndog",
        "final\ncat\nnot dog",
        "final\ndog",
    ]
    assert [axis.title.get_color() for axis in axes] == ["black", "black", REMOVED, "black"]
    shown = axes[0].images[0].get_array()
    expected = images[3].reshape(-1, 5, 5).permute(1, 2, 0)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    torch.testing.assert_close(torch.tensor(np.asarray(shown)).reshape(expected.shape), expected)


def test_what_is_no_image_is_refused():
    four = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"got \[4, 16\]"):
        samples_figure(torch.zeros(4, 16), four, four, four, four, 3)


def test_history_marks_where_phases_begin_and_leaves_out_what_was_not_measured():
    epochs = [{"final": 0.6}, {"final": 0.7}, {"exit 0": 0.5, "final": 0.8}]
    axis = history_figure(epochs, ["backbone", "backbone", "all"]).axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["exit 0", "final"]
    assert line(axis, "final").get_xydata().tolist() == [[1, 0.6], [2, 0.7], [3, 0.8]]
    assert np.isnan(line(axis, "exit 0").get_ydata()).tolist() == [True, True, False]
    switches = [one.get_xdata()[0] for one in axis.get_lines() if one.get_linestyle() == "--"]
    assert switches == [2.5]
    assert [text.get_text() for text in axis.texts] == ["backbone", "all"]
    assert line(axis, "exit 0").get_color() == KEPT
