import copy
import math
import pickle

import pytest
import torch

from lightning_eff.early_exit.inference.policies import Custom, Entropy, Margin, MaxProb, Patience, policy_from, score

# p = (.7, .2, .1): by hand from the definitions
LOGITS = torch.tensor([[0.7, 0.2, 0.1]]).log()
NAMES = ("max_prob", "entropy", "normalized_entropy", "margin", "patience")
# predictions at four outputs (rows) of four samples; PABEE (arXiv 2006.04152), figure 2
PREDICTIONS = torch.tensor([[0, 1, 2, 2], [0, 1, 1, 2], [0, 1, 1, 2], [0, 0, 1, 1]])


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("max_prob", 0.7), ("margin", 0.5), ("entropy", -0.801819), ("normalized_entropy", -0.729847)],
)
def test_scores_of_a_known_distribution(policy, expected):
    scores, state = score(policy_from(policy), LOGITS, 0)
    assert scores.item() == pytest.approx(expected, abs=1e-6)
    assert state is None


def leave_at(patience):
    """Exits of PREDICTIONS; the last output takes what is left."""
    state, exits = None, torch.full((4,), 3)
    for exit_index, predictions in enumerate(PREDICTIONS[:3]):
        scores, state = score(Patience(), torch.eye(3)[predictions], exit_index, state)
        exits[(scores >= patience) & (exits == 3)] = exit_index
    return exits.tolist()


@pytest.mark.parametrize(
    ("patience", "exits"), [(0, [0, 0, 0, 0]), (1, [1, 1, 2, 1]), (2, [2, 2, 3, 2]), (3, [3, 3, 3, 3])]
)
def test_patience_counts_predictions_that_agree_in_a_row(patience, exits):
    assert leave_at(patience) == exits


def test_patience_begins_again_after_a_disagreement():
    state, counters = None, []
    for prediction in (1, 1, 1, 0, 0, 1):
        scores, state = score(Patience(), torch.eye(2)[[prediction]], 0, state)
        counters.append(scores.item())
    assert counters == [0, 1, 2, 0, 1, 0]


def test_patience_of_samples_that_stay_travels_with_them():
    _, state = score(Patience(), torch.eye(3)[[0, 1, 2]], 0)
    stay = torch.tensor([2, 0])
    scores, _ = score(Patience(), torch.eye(3)[[2, 1]], 1, tuple(tensor[stay] for tensor in state))
    assert scores.tolist() == [1, 0]


def test_patience_does_not_agree_with_an_exit_that_broke_down():
    broken = torch.full((1, 3), torch.nan)
    _, state = score(Patience(), broken, 0)
    _, state = score(Patience(), broken, 1, state)
    scores, _ = score(Patience(), torch.eye(3)[[0]], 2, state)  # argmax of a row of NaN is class 0 too
    assert scores.item() == 0


def test_ties_go_to_the_lowest_class():
    _, (_, prediction) = score(Patience(), torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]]), 0)
    assert prediction.tolist() == [1, 0]
    assert score(Margin(), torch.tensor([[0.0, 2.0, 2.0]]), 0)[0].item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("policy", NAMES)
def test_scores_are_computed_in_float32(policy, dtype):
    torch.manual_seed(0)
    logits = (8 * torch.randn(64, 10)).to(dtype)
    scores, _ = score(policy_from(policy), logits, 0)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, score(policy_from(policy), logits.float(), 0)[0], rtol=0, atol=0)


def test_confident_bf16_logits_do_not_round_to_certainty():
    logits = torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16)
    assert logits.softmax(-1).amax().item() == 1.0  # what bfloat16 would make of it
    assert score(MaxProb(), logits, 0)[0].item() == pytest.approx(1 / (1 + math.exp(-8)), abs=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", [*NAMES, lambda logits, exit_index, state: (logits[:, 1], state)])
def test_rows_with_logits_that_are_not_finite_never_leave_early(policy, value):
    logits = torch.tensor([[5.0, 0.0, 0.0], [5.0, 0.0, value], [value, value, value], [0.0, 5.0, 0.0]])
    scores, _ = score(policy_from(policy), logits, 0)
    assert scores.isfinite().tolist() == [True, False, False, True]
    assert scores[1:3].tolist() == [-math.inf, -math.inf]


def test_certain_predictions_have_entropy_zero():
    assert score(Entropy(), torch.tensor([[1e4, 0.0, 0.0]]), 0)[0].item() == 0


@pytest.mark.parametrize("temperature", [2.0, torch.tensor(2.0)])
def test_temperature_divides_the_logits(temperature):
    scores, _ = score(MaxProb(), torch.tensor([[4.0, 0.0]]), 0, temperature=temperature)
    assert scores.item() == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-7)


@pytest.mark.parametrize("policy", NAMES)
def test_empty_batches_have_no_scores(policy):
    assert score(policy_from(policy), torch.empty(0, 3), 0)[0].shape == (0,)


@pytest.mark.parametrize("policy", NAMES)
def test_thresholds_survive_the_way_to_scores_and_back(policy):
    policy = policy_from(policy)
    for threshold in (*policy.grid(4, 3, 10), None):
        assert policy.to_threshold(policy.to_score(threshold)) == threshold
    assert policy.to_score(None) == math.inf


def test_entropy_thresholds_are_upper_bounds():
    assert Entropy().to_score(0.8) == -0.8
    scores, _ = score(Entropy(), LOGITS, 0)
    assert scores >= Entropy().to_score(0.81)
    assert not scores >= Entropy().to_score(0.80)
    assert Entropy().to_score(math.inf) == -math.inf  # every entropy is at most inf


@pytest.mark.parametrize(("policy", "threshold"), [(MaxProb(), 1.01), (Margin(), 2)])
def test_thresholds_out_of_reach_disable_the_exit(policy, threshold):
    assert policy.to_score(threshold) == math.inf


@pytest.mark.parametrize(
    ("policy", "threshold"),
    [
        (MaxProb(), math.nan),
        (Entropy(), math.nan),
        (Margin(), "0.5"),
        (MaxProb(), True),
        (Patience(), 1.5),
        (Patience(), -1),
    ],
)
def test_nonsense_is_no_threshold(policy, threshold):
    with pytest.raises(ValueError, match=f"got {threshold!r}"):
        policy.check(threshold)
    with pytest.raises(ValueError, match=f"got {threshold!r}"):
        policy.to_score(threshold)


@pytest.mark.parametrize("policy", NAMES)
def test_grids_lead_from_all_leave_at_once_to_few_leave(policy):
    policy = policy_from(policy)
    thresholds = [policy.to_score(threshold) for threshold in policy.grid(5, 3, 10)]
    torch.manual_seed(0)
    scores, _ = score(policy, torch.randn(100, 10), 0)
    assert thresholds == sorted(thresholds)
    assert (scores >= thresholds[0]).all()
    assert not (scores >= thresholds[-1]).any()


def test_grids_have_the_published_points():
    assert MaxProb().grid(5, 3, 10) == [0, 0.25, 0.5, 0.75, 1]
    assert Entropy().grid(3, 3, 10) == pytest.approx([math.log(10), math.log(10) / 2, 0])
    assert Patience().grid(100, 3, 10) == [0, 1, 2, 3]
    assert Custom(lambda *_: None, low=-1, high=3).grid(3, 3, 10) == [-1, 1, 3]


def test_functions_are_policies_and_keep_a_state():
    def seen(logits, exit_index, state):
        state = torch.zeros(len(logits)) if state is None else state + exit_index
        return state, state

    policy = policy_from(seen)
    scores, state = score(policy, torch.zeros(2, 3), 0)
    scores, state = score(policy, torch.zeros(2, 3), 2, state)
    assert scores.tolist() == [2, 2]
    assert policy.name == "seen"
    assert policy_from(policy) is policy


@pytest.mark.parametrize("result", [torch.zeros(2), (torch.zeros(2, 3), None), (0.5, None)])
def test_functions_that_do_not_return_a_score_per_sample_are_refused(result):
    with pytest.raises(ValueError, match=r"return \(scores \[2\], state\)"):
        score(Custom(lambda *_: result), torch.zeros(2, 3), 0)


@pytest.mark.parametrize("policy", ["confidence", 3, None, MaxProb])
def test_unknown_policies_are_refused_with_the_choices(policy):
    with pytest.raises(ValueError, match="max_prob, entropy, normalized_entropy, margin, patience"):
        policy_from(policy)


def test_ranges_of_custom_policies_are_checked():
    with pytest.raises(ValueError, match="low < high"):
        Custom(torch.sum, low=1, high=1)


@pytest.mark.parametrize("name", NAMES)
def test_policies_have_names_and_survive_pickle_and_copy(name):
    policy = policy_from(name)
    assert policy.name == name
    assert pickle.loads(pickle.dumps(policy)) == policy == copy.deepcopy(policy)


def test_negative_entropy_is_taken_for_the_score_it_is():
    with pytest.raises(ValueError, match=r"expected an entropy >= 0.*set_thresholds\(calibration\)"):
        Entropy().to_score(-0.1)
