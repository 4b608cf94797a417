import math

import numpy as np
import pytest

from lightning_eff.accounting import PrivacyEvent, subsampled_epsilon, subsampled_sigma


# noise multiplier, sample rate, steps, delta, epsilon by opacus 1.6 (prv, rdp); dp-accounting agrees to 0.01
@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta", "prv", "rdp"),
    [
        (1.1, 256 / 60000, 14062, 1e-5, 2.3917, 2.5966),
        (1.0, 0.01, 1000, 1e-5, 1.8384, 2.1014),
        (1.0, 64 / 1437, 220, 1e-4, 3.7070, 4.2521),
    ],
)
def test_sampled_steps_cost_what_opacus_says(sigma, rate, steps, delta, prv, rdp):
    events = [PrivacyEvent(sigma, rate, steps)]
    assert subsampled_epsilon(events, delta) == pytest.approx(prv, abs=1e-3)
    assert subsampled_epsilon(events, delta, "rdp") == pytest.approx(rdp, abs=1e-3)


def test_two_phases_compose():
    events = [PrivacyEvent(1.0, 0.01, 500), PrivacyEvent(2.0, 0.02, 500)]
    assert subsampled_epsilon(events, 1e-5) == pytest.approx(1.6252, abs=1e-3)
    assert subsampled_epsilon(events, 1e-5, "rdp") == pytest.approx(1.8946, abs=1e-3)


def test_only_what_was_done_counts_not_its_order_nor_its_labels():
    split = [PrivacyEvent(1.0, 0.01, 400, "a"), PrivacyEvent(2.0, 0.02, 500), PrivacyEvent(1.0, 0.01, 100, "b")]
    whole = [PrivacyEvent(2.0, 0.02, 500), PrivacyEvent(1.0, 0.01, 500)]
    assert subsampled_epsilon(split, 1e-5) == subsampled_epsilon(whole, 1e-5)


@pytest.mark.parametrize(("sigma", "steps", "epsilon"), [(1, 1, 4.37718), (2, 1, 1.99309), (4, 10, 3.34141)])
def test_full_batches_are_exact_and_prv_lies_just_above(sigma, steps, epsilon):
    exact = subsampled_epsilon([PrivacyEvent(sigma, 1.0, steps)], 1e-5)
    assert exact == pytest.approx(epsilon, abs=1e-5)
    # a first step that hardly looks at anything makes opacus account for all of it
    by_opacus = subsampled_epsilon([PrivacyEvent(sigma, 1.0, steps), PrivacyEvent(50.0, 1e-6)], 1e-5)
    assert exact <= by_opacus <= exact + 0.02


def test_nothing_done_costs_nothing_and_no_noise_costs_everything():
    assert subsampled_epsilon([], 1e-5) == 0
    assert subsampled_epsilon([PrivacyEvent(0.0, 0.01), PrivacyEvent(1.0, 0.01)], 1e-5) == math.inf


def test_a_step_that_costs_next_to_nothing_is_not_reported_at_a_tenth():
    # opacus' own orders end at 63 and report 0.10 for it
    assert subsampled_epsilon([PrivacyEvent(50.0, 1e-3, 10)], 1e-5) < 0.004


def test_so_little_noise_that_the_prv_grid_would_not_fit_is_told_by_rdp():
    events = [PrivacyEvent(0.1, 0.5, 1000)]
    assert 60 < subsampled_epsilon(events, 1e-5) == subsampled_epsilon(events, 1e-5, "rdp") < math.inf


def test_so_many_phases_that_prv_would_take_long_are_told_by_rdp(monkeypatch):
    phases = [PrivacyEvent(1 + place / 10, 0.01, 20) for place in range(9)]
    assert subsampled_epsilon(phases[:8], 1e-5) < subsampled_epsilon(phases[:8], 1e-5, "rdp")
    monkeypatch.setattr("opacus.accountants.PRVAccountant.get_epsilon", lambda *args, **kwargs: pytest.fail("asked"))
    assert subsampled_epsilon(phases, 1e-5) == subsampled_epsilon(phases, 1e-5, "rdp")


def test_numbers_of_other_libraries_become_plain_ones():
    event = PrivacyEvent(np.float32(1.5), np.float64(0.25), np.int64(3), sensitivity=np.float64(2))
    assert event == PrivacyEvent(1.5, 0.25, 3, sensitivity=2.0)
    assert {type(value) for value in vars(event).values()} == {float, int, str}
    with pytest.raises(ValueError, match="steps must be a whole number >= 1, got True"):
        PrivacyEvent(1.0, steps=True)


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps", "prv", "rdp"),
    [(2, 512 / 60000, 468, 0.8057, 0.8826), (3, 1024 / 60000, 590, 0.9277, 0.9814)],
)
def test_noise_multiplier_for_a_budget(epsilon, rate, steps, prv, rdp):
    for accountant, expected in (("prv", prv), ("rdp", rdp)):
        sigma = subsampled_sigma(epsilon, 1e-5, rate, steps, accountant)
        assert sigma == pytest.approx(expected, abs=0.005)
        reached = subsampled_epsilon([PrivacyEvent(sigma, rate, steps)], 1e-5, accountant)
        assert epsilon - 0.01 < reached <= epsilon


def test_noise_multiplier_for_full_batches_is_exact_within_its_digits():
    # one release at epsilon 1 needs 3.7306316348
    assert 3.7306 <= subsampled_sigma(1.0, 1e-5, 1.0, 1) <= 3.7306 * 1.001


def test_what_was_spent_before_needs_more_noise_after():
    before = [PrivacyEvent(1.0, 0.01, 500)]
    sigma = subsampled_sigma(2.0, 1e-5, 0.01, 500, history=before)
    assert subsampled_epsilon([*before, PrivacyEvent(sigma, 0.01, 500)], 1e-5) <= 2.0
    assert sigma > subsampled_sigma(2.0, 1e-5, 0.01, 500)


def test_infinite_budget_asks_for_no_noise():
    assert subsampled_sigma(math.inf, 1e-5, 0.01, 10) == 0


def test_budget_out_of_reach_is_told_with_the_smallest_within_reach():
    spent = [PrivacyEvent(1.0, 0.01, 1000)]
    with pytest.raises(ValueError, match=r"epsilon 1 is out of reach: .* end at epsilon 1\.8"):
        subsampled_sigma(1.0, 1e-5, 0.01, 10, history=spent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_rate": 0.0}, r"sample_rate must lie in \(0, 1\], got 0.0"),
        ({"sample_rate": 1.1}, r"sample_rate must lie in \(0, 1\], got 1.1"),
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"steps": 1.5}, r"steps must be a whole number >= 1, got 1\.5"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be >= 0, got -1"),
        ({"sensitivity": 0.0}, "sensitivity must be > 0, got 0"),
    ],
)
def test_event_that_cannot_be_is_told(change, message):
    with pytest.raises(ValueError, match=message):
        PrivacyEvent(**{"noise_multiplier": 1.0, **change})


def test_accountant_must_be_known():
    with pytest.raises(ValueError, match="accountant must be one of prv, rdp, got 'gdp'"):
        subsampled_epsilon([], 1e-5, "gdp")
