"""Who goes where with which weight; balance and stability losses with their exact values."""

import math

import pytest
import torch

from lightning_eff.moe import balance_loss, z_loss
from lightning_eff.moe.routing import Assignment, bias_step, expert_choice, token_choice


def scores_of(tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=random, dtype=torch.float64).softmax(1)


def as_matrix(assignment: Assignment, tokens: int) -> torch.Tensor:
    """Weight of every token at every expert [T, n]; 0 where it does not go."""
    n = assignment.counts.numel()
    matrix = torch.zeros(tokens, n, dtype=assignment.weights.dtype)
    experts = torch.arange(n).repeat_interleave(assignment.counts)
    computed = int(assignment.counts.sum())
    matrix.index_put_(
        (assignment.token_index[:computed], experts), assignment.weights.detach()[:computed], accumulate=True
    )
    return matrix


def test_every_token_takes_its_largest_scores() -> None:
    scores = scores_of(50, 12)
    assignment = token_choice(scores, 3)
    threshold = scores.sort(1).values[:, -3:-2]
    torch.testing.assert_close(as_matrix(assignment, 50), scores.where(scores >= threshold, 0))
    assert torch.equal(assignment.load, (scores >= threshold).sum(0))
    assert torch.equal(assignment.load, assignment.counts)


def test_weights_are_normalised_and_scaled() -> None:
    weights = as_matrix(token_choice(scores_of(50, 12), 3, normalize=True, scale=2.5), 50)
    torch.testing.assert_close(weights.sum(1), torch.full((50,), 2.5, dtype=torch.float64))


def test_bias_moves_the_choice_and_not_the_weights() -> None:
    scores, bias = scores_of(50, 12), torch.zeros(12)
    bias[7] = 2
    assignment = token_choice(scores, 3, bias=bias)
    assert assignment.counts[7] == 50
    torch.testing.assert_close(as_matrix(assignment, 50)[:, 7], scores[:, 7])


def test_equal_scores_still_give_different_experts() -> None:
    weights = as_matrix(token_choice(torch.full((20, 6), 1 / 6), 4), 20)
    assert ((weights > 0).sum(1) == 4).all()


def test_padding_goes_nowhere() -> None:
    scores, mask = scores_of(20, 6), torch.arange(20) % 3 > 0
    assignment = token_choice(scores, 2, token_mask=mask)
    assert assignment.token_index.numel() == 40
    assert assignment.counts.sum() == 2 * mask.sum() == assignment.load.sum()
    weights = as_matrix(assignment, 20)
    assert not weights[~mask].any()
    torch.testing.assert_close(weights[mask], as_matrix(token_choice(scores[mask], 2), int(mask.sum())))


@pytest.mark.parametrize("masked", [False, True])
def test_capacity_keeps_the_largest_weights(masked) -> None:
    scores, k, factor = scores_of(40, 5), 2, 0.75
    mask = torch.arange(40) % 4 > 0 if masked else None
    every = as_matrix(token_choice(scores, k, token_mask=mask), 40)
    assignment = token_choice(scores, k, capacity_factor=factor, token_mask=mask)
    capacity = math.floor(factor * 40 * k / 5)
    expected = torch.zeros_like(every)
    for expert in range(5):
        kept = every[:, expert].topk(capacity).indices
        expected[kept, expert] = every[kept, expert]
    torch.testing.assert_close(as_matrix(assignment, 40), expected)
    assert torch.equal(assignment.load, (every > 0).sum(0))
    assert assignment.dropped == (every > 0).sum() - (expected > 0).sum() > 0


def test_capacity_prefers_lower_tokens_among_equal_weights_and_leaves_one_at_least() -> None:
    scores = torch.tensor([0.75, 0.25]).repeat(8, 1)
    assignment = token_choice(scores, 1, capacity_factor=0.5)
    assert assignment.counts.tolist() == [2, 0]
    assert assignment.token_index[:2].tolist() == [0, 1]
    assert token_choice(scores, 1, capacity_factor=0.01).counts.tolist() == [1, 0]


def test_not_a_number_stays_within_range() -> None:
    scores = scores_of(20, 6)
    scores[3] = math.nan
    assignment = token_choice(scores, 2)
    assert assignment.counts.sum() == 40
    assert assignment.token_index.max() < 20


@pytest.mark.parametrize("experts", [3, 40000])
def test_any_number_of_experts_can_be_sorted(experts) -> None:
    scores = torch.zeros(2, experts)
    scores[0, experts - 1] = scores[1, 1] = 1
    assignment = token_choice(scores, 1)
    assert assignment.token_index.tolist() == [1, 0]
    assert assignment.counts[[1, experts - 1]].tolist() == [1, 1]


def test_every_expert_takes_its_quota_of_every_position_of_every_group() -> None:
    groups, size, positions, n, quota = 2, 6, 5, 3, 2
    scores = scores_of(groups * size * positions, n)
    assignment = expert_choice(scores.view(groups, size, positions, n), quota)
    assert assignment.counts.tolist() == [groups * positions * quota] * n
    taken = as_matrix(assignment, len(scores)).view(groups, size, positions, n)
    assert ((taken > 0).sum(1) == quota).all()
    threshold = scores.view(groups, size, positions, n).sort(1).values[:, -quota]
    torch.testing.assert_close(taken, scores.view_as(taken).where(scores.view_as(taken) >= threshold[:, None], 0))


def test_experts_take_padding_last_and_drop_it() -> None:
    scores, mask = scores_of(24, 3).view(1, 8, 3, 3), torch.ones(1, 8, 3, dtype=torch.bool)
    mask[0, 2:, 1] = False  # two of eight sequences reach position 1
    mask[0, :, 2] = False
    assignment = expert_choice(scores, 4, token_mask=mask)
    taken = as_matrix(assignment, 24).view(8, 3, 3)
    assert (taken > 0).sum(0).tolist() == [[4, 4, 4], [2, 2, 2], [0, 0, 0]]
    assert not taken[~mask[0]].any()
    assert assignment.counts.tolist() == [6, 6, 6] == assignment.load.tolist()


@pytest.mark.parametrize("uniform", ["scores", "loads"])
def test_balance_loss_is_one_where_scores_or_loads_are_uniform(uniform) -> None:
    scores, load = scores_of(30, 6), torch.tensor([30, 0, 30, 0, 0, 0])
    if uniform == "scores":
        scores = torch.full((30, 6), 1 / 6, dtype=torch.float64)
    else:
        load = torch.full((6,), 10)
    assert balance_loss(scores, load).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("norm", "value"), [("topk", 2.0), ("switch", 4.0)])
def test_balance_loss_is_n_over_k_where_everybody_wants_the_same_experts(norm, value) -> None:
    scores = torch.tensor([30.0, 30.0, -30.0, -30.0]).repeat(16, 1).softmax(1)
    load = token_choice(scores, 2).load
    assert load.tolist() == [16, 16, 0, 0]
    assert balance_loss(scores, load, norm=norm, top_k=2).item() == pytest.approx(value, abs=1e-6)


def test_balance_loss_pushes_scores_away_from_busy_experts() -> None:
    logits = torch.zeros(16, 4, requires_grad=True)
    balance_loss(logits.softmax(1), torch.tensor([40, 10, 10, 4])).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 3] < 0).all()


def test_balance_loss_takes_sigmoid_scores_by_their_shares() -> None:
    scores = torch.tensor([[0.9, 0.3], [0.4, 0.4]])
    share = (torch.tensor([0.75, 0.25]) + 0.5) / 2
    expected = 2 * (torch.tensor([0.8, 0.2]) * share).sum()
    torch.testing.assert_close(balance_loss(scores, torch.tensor([8, 2])), expected)


def test_z_loss_of_zero_logits_is_the_square_of_the_log_of_their_number() -> None:
    assert z_loss(torch.zeros(5, 16)).item() == pytest.approx(math.log(16) ** 2, rel=1e-6)


def test_losses_count_no_padding() -> None:
    logits, mask = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), torch.arange(20) < 7
    load = token_choice(logits[:7].softmax(1), 2).load
    torch.testing.assert_close(balance_loss(logits.softmax(1), load, mask), balance_loss(logits[:7].softmax(1), load))
    torch.testing.assert_close(z_loss(logits, mask), z_loss(logits[:7]))


@pytest.mark.parametrize("masked", [False, True])
def test_losses_of_no_tokens_are_zero(masked) -> None:
    mask = torch.zeros(3, dtype=torch.bool) if masked else None
    logits = torch.randn(3 if masked else 0, 6)
    assert balance_loss(logits.softmax(1), torch.zeros(6), mask) == 0
    assert z_loss(logits, mask) == 0


def test_bias_moves_by_the_rate_towards_idle_experts_and_keeps_its_mean() -> None:
    step = bias_step(torch.tensor([10, 2, 4, 4]), 1e-3)  # mean 5
    torch.testing.assert_close(step, 1e-3 * (torch.tensor([-1.0, 1, 1, 1]) - 0.5))
    assert not bias_step(torch.zeros(4), 1e-3).any()
