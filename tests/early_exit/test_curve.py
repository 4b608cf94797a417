import json
import math

import pytest
import torch

from lightning_eff.early_exit.evaluation.curve import CurveResult, EarlyExitCurve
from lightning_eff.early_exit.inference.policies import policy_from


def result(cost, accuracy, costs=(0.25, 1.0)):
    """A curve of which only accuracy and cost matter."""
    points = len(cost)
    return CurveResult(
        policy="max_prob",
        thresholds=[i / points for i in range(points)],
        accuracy=list(accuracy),
        cost=list(cost),
        costs=list(costs),
        head_accuracy=[0.5, 0.9],
        exit_rate=[[0.5, 0.5]] * points,
        exit_right=[[0.25, 0.5]] * points,
        oracle_accuracy=0.95,
        overthinking=0.05,
    )


THREE_STEPS = result([0.25, 0.5, 1.0], [0.6, 0.8, 0.9])


def outputs(seed, samples=50, outputs=3, classes=4):
    """Logits that grow better from output to output, and labels."""
    torch.manual_seed(seed)
    target = torch.randint(classes, (samples,))
    right = torch.nn.functional.one_hot(target, classes)
    return [2 * torch.randn(samples, classes) + (k + 1) * right for k in range(outputs)], target


def recorded(*batches, **options):
    curve = EarlyExitCurve([0.3, 0.6, 1.1], **options)
    for logits, target in batches:
        curve.update(logits, target)
    return curve


def test_accuracy_and_cost_by_hand():
    # probabilities of the first exit: .9 right, .8 wrong, .6 right, .6 wrong; the backbone is right but for the first
    first = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.6, 0.4]]).log()
    target = torch.tensor([0, 1, 1, 1])
    own = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    curve = EarlyExitCurve([0.5, 1.0], points=11)
    curve.update([first, own], target)
    found = curve.compute()
    assert found.thresholds == pytest.approx([i / 10 for i in range(11)])
    at = {round(threshold, 1): i for i, threshold in enumerate(found.thresholds)}
    assert found.accuracy[at[0.5]] == 2 / 4
    assert found.cost[at[0.5]] == 0.5
    assert found.accuracy[at[0.7]] == 3 / 4
    assert found.cost[at[0.7]] == 0.75
    assert found.exit_rate[at[0.7]] == [0.5, 0.5]
    assert found.exit_right[at[0.7]] == [0.25, 0.5]
    assert found.exit_accuracy[at[0.7]] == [0.5, 1.0]
    assert math.isnan(found.exit_accuracy[at[0.5]][1])
    assert found.accuracy[at[1.0]] == found.head_accuracy[1] == 3 / 4
    assert found.head_accuracy[0] == 2 / 4
    assert found.oracle_accuracy == 1.0
    assert found.overthinking == 1 / 4  # the first sample


@pytest.mark.parametrize("policy", ["max_prob", "entropy", "normalized_entropy", "margin", "patience"])
@pytest.mark.parametrize("comparison", ["ge", "gt"])
def test_every_point_is_what_leaving_sample_by_sample_gives(policy, comparison):
    logits, target = outputs(0)
    logits[0][:5] = 100 * torch.nn.functional.one_hot(target[:5], 4)  # probability 1 exactly
    curve = recorded((logits, target), policy=policy, points=7, comparison=comparison)
    found, scores = curve.compute(), curve.recorded().scores
    for t, threshold in enumerate(found.thresholds):
        limit = torch.tensor(policy_from(policy).to_score(threshold)).item()
        right, cost = 0, 0.0
        for i in range(len(target)):
            sure = [s >= limit if comparison == "ge" else s > limit for s in scores[:, i].tolist()]
            k = sure.index(True) if True in sure else 2
            right, cost = right + int(logits[k][i].argmax() == target[i]), cost + [0.3, 0.6, 1.1][k]
        assert found.accuracy[t] == pytest.approx(right / 50)
        assert found.cost[t] == pytest.approx(cost / 50)


def test_grids_of_patience_and_entropy():
    assert recorded(outputs(0), policy="patience").compute().thresholds == [0, 1, 2]
    found = recorded(outputs(0), policy="entropy", points=3).compute()
    assert found.thresholds == pytest.approx([math.log(4), math.log(4) / 2, 0])
    assert found.cost == sorted(found.cost)
    assert found.exit_rate[0] == [1, 0, 0]


def test_published_comparison_is_strict():
    certain = torch.tensor([[200.0, 0.0]])
    for comparison, cost in (("ge", 0.5), ("gt", 1.0)):
        curve = EarlyExitCurve([0.5, 1.0], points=2, comparison=comparison)
        curve.update([certain, certain], torch.tensor([0]))
        assert curve.compute().cost == [0.5, cost]


def test_temperatures_divide_the_logits_of_their_output():
    logits, target = outputs(0)
    warm = recorded()
    warm.update(logits, target, temperatures=[2.0, 4.0, 1.0])
    divided = recorded(([logits[0] / 2, logits[1] / 4, logits[2]], target))
    assert warm.compute() == divided.compute()


def test_budget_table_of_a_curve_that_never_exceeds_the_last_budget():
    # the published script prints "-" for the last two: a flag of the column before is not reset
    curve = result([0.8, 0.9, 0.95], [0.5, 0.6, 0.7])
    for rule in ("max", "last"):
        table = curve.budget_table(rule=rule)
        assert [column.name for column in table.columns] == ["25 %", "50 %", "75 %", "100 %", "max"]
        assert table.rows == ((None, None, None, 70.0, 70.0),)
        assert str(table).splitlines()[3].split() == ["-", "-", "-", "70.00", "70.00"]


def test_budget_rules_differ_where_more_cost_is_no_gain():
    curve = result([0.2, 0.4, 0.6, 0.5], [0.6, 0.8, 0.7, 0.9])
    assert curve.at_budget(0.5) == 0.9
    assert curve.at_budget(0.5, "last") == 0.8  # goes up to the first that is too dear
    assert curve.at_budget(0.6, "last") == 0.9
    assert math.isnan(curve.at_budget(0.1))
    assert math.isnan(curve.at_budget(0.1, "last"))
    assert curve.at_budget(math.inf) == 0.9


def test_of_equally_accurate_thresholds_the_cheapest_is_named():
    assert result([0.5, 0.3, 0.4], [0.8, 0.8, 0.8]).index_at(1.0) == 1


def test_accuracy_grows_with_the_budget():
    curve = recorded(outputs(1), points=50).compute()
    best = [curve.at_budget(budget / 100) for budget in range(30, 121)]
    assert best == sorted(best)
    assert best[0] == curve.head_accuracy[0]
    assert best[-1] == max(curve.accuracy)


def test_budgets_are_met_despite_rounding():
    assert result([0.1 + 0.2, 1.0], [0.6, 0.9]).at_budget(0.3) == 0.6


def test_area_under_the_curve_is_a_mean_over_budgets():
    assert THREE_STEPS.auc() == pytest.approx((0.25 * 0.6 + 0.5 * 0.8) / 0.75)  # .7333
    assert THREE_STEPS.auc(low=0.5) == pytest.approx(0.8)
    assert THREE_STEPS.auc(low=0.25, high=1.25) == pytest.approx(0.25 * 0.6 + 0.5 * 0.8 + 0.25 * 0.9)
    assert THREE_STEPS.auc(low=0.125) == pytest.approx((0.25 * 0.6 + 0.5 * 0.8) / 0.875)  # nothing below .25


def test_area_takes_the_best_affordable_accuracy_not_the_points():
    assert result([0.25, 0.4, 0.5, 1.0], [0.6, 0.5, 0.8, 0.9]).auc() == pytest.approx(THREE_STEPS.auc())


def test_weights_of_the_area():
    assert THREE_STEPS.auc(weights="log") == pytest.approx(0.7)  # two halvings
    assert THREE_STEPS.auc(weights=lambda budget: 1 / budget) == pytest.approx(0.7)
    assert THREE_STEPS.auc(weights=lambda budget: 1.0) == pytest.approx(THREE_STEPS.auc())


def test_area_is_unknown_where_the_first_exit_costs_as_much_as_the_backbone():
    assert math.isnan(result([1.0, 1.2], [0.6, 0.9], costs=(1.0, 1.2)).auc())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: THREE_STEPS.at_budget(0), r"budget must lie in \(0, inf\], got 0"),
        (lambda: THREE_STEPS.at_budget(math.nan), "got nan"),
        (lambda: THREE_STEPS.at_budget(1, "first"), "rule must be one of max, last, got 'first'"),
        (lambda: THREE_STEPS.auc(low=1.0), "0 < low < high < inf, got 1.0 and 1.0"),
        (lambda: THREE_STEPS.auc(weights="linear"), "got 'linear'"),
        (lambda: THREE_STEPS.auc(weights=lambda budget: 0.0), "weights > 0 somewhere"),
        (lambda: CurveResult.from_dict({"schema": 2}), "schema 1, got 2"),
        (lambda: EarlyExitCurve([1.0]), r"two or more outputs, got \[1.0\]"),
        (lambda: EarlyExitCurve([0.0, 1.0]), "cost > 0"),
        (lambda: EarlyExitCurve([0.5, 1.0], points=1), "points must be a whole number >= 2, got 1"),
        (lambda: EarlyExitCurve([0.5, 1.0], comparison="lt"), "comparison must be one of ge, gt, got 'lt'"),
        (lambda: EarlyExitCurve([0.5, 1.0], policy="sure"), "got 'sure'"),
        (lambda: recorded((outputs(0)[0][:2], outputs(0)[1])), "3 outputs, one a cost, got 2"),
        (lambda: recorded((outputs(0)[0], torch.zeros(3))), r"logits \[B, C\] and labels \[B\]"),
        (lambda: recorded().recorded(), "expected samples, got none"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_results_survive_json():
    found = recorded(outputs(2)).compute()
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert CurveResult.from_dict(json.loads(text)) == found


def test_two_metrics_merged_are_one():
    whole = recorded(outputs(1), outputs(2), outputs(3, samples=7))
    part, other = recorded(outputs(1)), recorded(outputs(2), outputs(3, samples=7))
    part.merge_state(other)
    assert part.compute() == whole.compute()


def test_batches_may_be_empty_and_of_one():
    logits, target = outputs(1, samples=3)
    parts = [slice(0, 1), slice(1, 1), slice(1, 3)]
    split = recorded(*(([output[part] for output in logits], target[part]) for part in parts))
    assert split.compute() == recorded((logits, target)).compute()


def test_a_process_without_samples_sends_tensors_like_all_others():
    # gathered tensors must agree in type and dimensions, or processes hang
    idle, busy = recorded(policy="patience"), recorded(outputs(1), policy="patience")
    for reset in (False, True):
        if reset:
            idle.reset()
        for name in ("score", "prediction", "target"):
            mine, theirs = getattr(idle, name), getattr(busy, name)[-1]
            assert [(one.dtype, one.shape[1:]) for one in mine] == [(theirs.dtype, theirs.shape[1:])]
    busy.merge_state(idle)
    assert busy.compute() == recorded(outputs(1), policy="patience").compute()


def test_reset_forgets_all_samples():
    curve = recorded(outputs(1))
    curve.reset()
    curve.update(*outputs(2))
    assert curve.compute() == recorded(outputs(2)).compute()


def test_gradients_and_logits_are_not_kept():
    logits, target = outputs(1)
    curve = recorded(([output.requires_grad_() for output in logits], target))
    record = curve.recorded()
    assert not record.scores.requires_grad
    assert (record.scores.dtype, record.predictions.dtype) == (torch.float32, torch.int32)


def test_forward_gives_the_curve_of_the_batch_and_keeps_all():
    curve = recorded(outputs(1))
    assert curve(*outputs(2)) == recorded(outputs(2)).compute()
    assert curve.compute().head_accuracy == recorded(outputs(1), outputs(2)).compute().head_accuracy
