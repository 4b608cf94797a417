"""Weights, losses and distillation against numbers worked out by hand."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.early_exit.training.losses import ExitLosses, distillation, loss_weights

# three outputs for one sample of class 2
LOGITS = [torch.tensor([z]) for z in ([2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 3.0])]
TARGET = torch.tensor([2])
SDN_COSTS = [0.15, 0.30, 0.45, 0.60, 0.75, 0.90, 1.0]  # positions of the original's exits


def test_named_weights_of_four_outputs() -> None:
    assert loss_weights("equal", 3) == [0.25] * 4
    assert loss_weights("increasing", 3) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert loss_weights("decreasing", 3) == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_weights_of_heads_alone_do_not_count_the_final_output() -> None:
    assert loss_weights("equal", 3, final=False) == pytest.approx([1 / 3] * 3)
    assert loss_weights("increasing", 3, final=False) == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_sdn_weights_rise_to_the_costs_of_the_exits() -> None:
    halfway = loss_weights("sdn", 6, epoch=50, epochs=100, costs=SDN_COSTS)
    assert halfway == pytest.approx([0.085, 0.16, 0.235, 0.31, 0.385, 0.46, 1.0])
    assert loss_weights("sdn", 6, epoch=100, epochs=100, costs=SDN_COSTS) == pytest.approx([*SDN_COSTS[:6], 1.0])
    assert len(loss_weights("sdn", 6, final=False, epoch=1, epochs=100, costs=SDN_COSTS)) == 6


def test_lists_are_used_as_given_and_heads_take_the_first_of_them() -> None:
    assert loss_weights([2, 0, 5], 2) == [2.0, 0.0, 5.0]
    assert loss_weights([2, 0, 5], 2, final=False) == [2.0, 0.0]
    assert loss_weights([2, 1], 2, final=False) == [2.0, 1.0]


def test_callables_are_told_epoch_length_and_costs() -> None:
    def schedule(epoch: int, epochs: int, costs: Any) -> list[float]:
        return [epoch / epochs * cost for cost in costs]

    assert loss_weights(schedule, 1, epoch=1, epochs=4, costs=[0.4, 1.0]) == pytest.approx([0.1, 0.25])


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ("rising", "'equal', 'increasing', 'decreasing', 'sdn'"),
        ([1, 1], "expected 3 loss weights, one an output, got 2"),
        ([1, -1, 1], "finite and >= 0"),
        ([1, math.nan, 1], "finite and >= 0"),
        ([0, 0, 0], "at least one loss weight above 0"),
        (lambda *_: [0, 0, 0], "at least one loss weight above 0"),
        ("sdn", "give costs"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(weights: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        loss_weights(weights, 2)


def test_losses_of_three_outputs() -> None:
    each = ExitLosses().each(LOGITS, TARGET)
    assert [loss.item() for loss in each] == pytest.approx([2.239545, 1.551445, 0.239545], abs=2e-6)
    totals = {
        name: ExitLosses().total(each, loss_weights(name, 2), LOGITS).item()
        for name in ("equal", "increasing", "decreasing")
    }
    expected = {"equal": 1.343511, "increasing": 1.010178, "decreasing": 1.676845}
    assert totals == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(("kind", "value"), [("last", 1.735734), ("later", 1.762377), ("next", 1.630300)])
def test_cross_entropy_with_later_outputs(kind: Any, value: float) -> None:
    assert distillation(LOGITS, kind).item() == pytest.approx(value, abs=2e-6)


def test_outputs_that_teach_get_no_gradient() -> None:
    logits = [z.clone().requires_grad_() for z in LOGITS]
    distillation(logits, "last").backward()
    assert logits[2].grad is None
    assert all(z.grad.abs().sum() > 0 for z in logits[:2])


def test_divergence_at_a_temperature() -> None:
    t, (learner, _, teacher) = 4.0, LOGITS
    p, q = torch.softmax(teacher / t, -1), torch.softmax(learner / t, -1)
    by_hand = t**2 * (p * (p / q).log()).sum().item()
    assert distillation([learner, teacher], "last", t).item() == pytest.approx(by_hand, rel=1e-5)


def test_distillation_is_added_with_its_weight() -> None:
    losses = ExitLosses(distill="last", distill_weight=0.5)
    each = losses.each(LOGITS, TARGET)
    assert losses.total(each, [1 / 3] * 3, LOGITS).item() == pytest.approx(1.343511 + 0.5 * 1.735734, abs=2e-6)


def test_at_a_temperature_exits_share_themselves_between_labels_and_later_outputs() -> None:
    losses = ExitLosses(distill="last", distill_temperature=3.0)
    each = losses.each(LOGITS, TARGET)
    expected = 0.1 * (2.239545 + 1.551445) + 0.239545 + 0.9 * distillation(LOGITS, "last", 3.0).item()
    assert losses.total(each, [1, 1, 1], LOGITS).item() == pytest.approx(expected, abs=2e-6)


def test_heads_alone_learn_from_a_final_output_without_a_loss() -> None:
    losses = ExitLosses(distill="last", distill_temperature=3.0)
    each = losses.each(LOGITS[:2], TARGET)
    expected = 0.1 * (2.239545 + 1.551445) / 2 + 0.9 * distillation(LOGITS, "last", 3.0).item()
    assert losses.total(each, [0.5, 0.5], LOGITS).item() == pytest.approx(expected, abs=2e-6)


def test_an_output_of_weight_zero_gets_a_gradient_of_zero_even_where_its_loss_is_not_a_number() -> None:
    logits = [z.clone().requires_grad_() for z in LOGITS]
    with torch.no_grad():
        logits[0][0, 0] = math.nan
    each = ExitLosses().each(logits, TARGET)
    total = ExitLosses().total(each, [0.0, 1.0, 1.0], logits)
    total.backward()
    assert total.item() == pytest.approx(1.551445 + 0.239545, abs=2e-6)
    assert logits[0].grad.tolist() == [[0, 0, 0]]


def test_half_precision_logits_lose_no_digits_in_the_loss() -> None:
    halves = [z.bfloat16() for z in LOGITS]  # these numbers are exact in bfloat16
    losses = ExitLosses(distill="later")
    each = losses.each(halves, TARGET)
    total = losses.total(each, [0, 1, 1], halves)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(1.551445 + 0.239545 + 1.762377, abs=4e-6)


def test_probabilities_are_targets_too() -> None:
    soft = torch.tensor([[0.0, 0.0, 1.0]])
    assert ExitLosses().each(LOGITS, soft)[0].item() == pytest.approx(2.239545, abs=2e-6)


def test_another_criterion_takes_the_place_of_the_cross_entropy() -> None:
    each = ExitLosses(criterion=nn.MultiMarginLoss()).each(LOGITS, TARGET)
    assert [loss.item() for loss in each] == pytest.approx([(3 + 1) / 3, (1 + 2) / 3, 0.0])


def test_a_network_without_exits_has_nothing_to_distil() -> None:
    assert distillation(LOGITS[:1], "later").item() == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weights": "rising"}, "weights must be one of"),
        ({"gradient_scaling": "yes"}, "gradient_scaling must be one of none, equilibrium, got 'yes'"),
        ({"distill": "first"}, "distill must be one of last, later, next, None, got 'first'"),
        ({"distill_temperature": 0.0}, "distill_temperature must be > 0"),
        ({"distill_weight": -1.0}, "distill_weight must be >= 0, got -1.0"),
        ({"distill_weight": 1.5, "distill_temperature": 2.0}, r"distill_weight must lie in \[0, 1\]"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"label_smoothing": 0.1, "criterion": nn.CrossEntropyLoss()}, "give it to the criterion"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ExitLosses(**options)
