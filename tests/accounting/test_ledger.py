import json
import math

import numpy as np
import pytest
from opacus.accountants import PRVAccountant, RDPAccountant

from lightning_eff.accounting import PrivacyBudgetExceeded, PrivacyEvent, PrivacyLedger


def spent(**arguments):
    ledger = PrivacyLedger(**arguments)
    for _ in range(3):
        ledger.record(1.0, 0.01, 100, label="training")
    ledger.record(2.0, 0.02, 50)
    return ledger


def test_equal_steps_in_a_row_are_one_entry():
    ledger = spent()
    assert ledger.history == [PrivacyEvent(1.0, 0.01, 300, "training"), PrivacyEvent(2.0, 0.02, 50)]
    assert ledger.steps == 350


def test_empty_ledger_spent_nothing():
    assert PrivacyLedger().epsilon() == 0


def test_releases_are_exact_between_either_kind_of_neighbours():
    for adjacency in ("add_remove", "replace_one"):
        ledger = PrivacyLedger(adjacency=adjacency)
        for _ in range(3):
            ledger.record(3.7306316348, sensitivity=2.0)
        assert ledger.epsilon() == pytest.approx(1.834965, abs=1e-6)  # three releases at epsilon 1
        assert ledger.facts()["accountant"] == "exact"


def test_budget_is_refused_before_anything_is_recorded():
    ledger = PrivacyLedger(max_epsilon=1.5)
    ledger.record(3.7306316348, label="first release")
    ledger.record(3.7306316348)
    before = ledger.state_dict()
    with pytest.raises(PrivacyBudgetExceeded, match=r"third would bring epsilon from 1\.465 to 1\.835 .* above"):
        ledger.record(3.7306316348, label="third")
    assert ledger.state_dict() == before


def test_asking_what_a_step_would_cost_costs_nothing():
    ledger = spent()
    before = ledger.state_dict()
    assert ledger.epsilon_after(1.0, 0.01, 1000) > ledger.epsilon()
    assert ledger.state_dict() == before


def test_steps_left_is_the_last_number_within_the_budget():
    ledger = PrivacyLedger(max_epsilon=1.5)
    left = ledger.steps_left(1.0, 0.01, 10_000)
    assert ledger.epsilon_after(1.0, 0.01, left) <= 1.5 < ledger.epsilon_after(1.0, 0.01, left + 1)
    assert ledger.steps_left(1.0, 0.01, left - 5) == left - 5
    ledger.record(1.0, 0.01, left)
    assert ledger.steps_left(1.0, 0.01, 100) == 0


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_steps_left_are_found_by_few_questions_where_training_has_no_end(accountant, monkeypatch):
    ledger = PrivacyLedger(max_epsilon=2.0, accountant=accountant)
    ledger.record(1.0, 0.01, 50)
    asked, ask = [], PRVAccountant.get_epsilon
    monkeypatch.setattr(
        PRVAccountant, "get_epsilon", lambda *args, **kwargs: asked.append(args) or ask(*args, **kwargs)
    )
    left = ledger.steps_left(1.01, 0.01, 1 << 24)
    assert len(asked) <= (12 if accountant == "prv" else 0)
    assert ledger.epsilon_after(1.01, 0.01, left) <= 2.0 < ledger.epsilon_after(1.01, 0.01, left + 1)


def test_no_step_is_left_where_the_first_one_costs_too_much():
    assert PrivacyLedger(max_epsilon=0.1).steps_left(1.0, 0.02, 1 << 24) == 0


def test_the_report_tells_which_accountant_it_took():
    ledger = PrivacyLedger()
    for place in range(8):
        ledger.record(1 + place, 0.001)
    assert ledger.facts()["accountant"] == "prv"
    ledger.record(9.0, 0.001)
    assert ledger.facts()["accountant"] == "rdp"


def test_steps_of_other_libraries_numbers_are_recorded_as_plain_ones():
    ledger = PrivacyLedger()
    ledger.record(np.float32(1.0), 0.01, np.int64(3))
    ledger.record(1.0, 0.01, np.int64(2))
    assert json.loads(json.dumps(ledger.state_dict()))["history"][0]["steps"] == 5


def test_without_a_budget_every_step_is_left():
    assert PrivacyLedger().steps_left(0.1, 1.0, 7) == 7


def test_state_is_plain_and_comes_back():
    ledger = spent(delta=1e-6, max_epsilon=9.0, accountant="rdp")
    ledger.assumptions.append("Records are independent.")
    ledger.caveats.append("Batches were shuffled.")
    again = PrivacyLedger()
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert again.state_dict() == ledger.state_dict()
    assert again.epsilon() == ledger.epsilon()


@pytest.mark.parametrize(
    "change",
    [
        {"version": 9},
        {"delta": 2.0},
        {"history": [{"noise_multiplier": -1.0}]},
        {"history": [{"sigma": 1.0}]},
        {"history": 3},
        {"adjacency": "replace_one"},  # its history holds sampled steps
        {"caveats": None},
    ],
)
def test_state_that_cannot_be_changes_nothing(change):
    ledger = spent()
    before = ledger.state_dict()
    with pytest.raises(ValueError, match="not the state of a PrivacyLedger"):
        ledger.load_state_dict({**spent(delta=1e-7).state_dict(), **change})
    with pytest.raises(ValueError, match="not the state of a PrivacyLedger: it has no 'version'"):
        ledger.load_state_dict({})
    assert ledger.state_dict() == before


@pytest.mark.parametrize("sigma", [1.0, 0.0])
def test_file_comes_back_and_is_valid_json(tmp_path, sigma):
    ledger = spent(max_epsilon=math.inf)
    ledger.record(sigma, 0.5)
    path = ledger.save(tmp_path / "deep" / "privacy.json")
    assert PrivacyLedger.load(path).state_dict() == ledger.state_dict()
    content = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert content["report"]["steps"] == 351


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"ledger": 1}', '{"ledger": {}}'])
def test_file_that_holds_no_ledger_is_told(tmp_path, text):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=r"privacy ledger|PrivacyLedger"):
        PrivacyLedger.load(tmp_path / "file.json")


def test_report_tells_figures_history_and_what_they_rest_on():
    ledger = spent()
    ledger.assumptions.append("Batches are Poisson samples.")
    ledger.not_covered.append("The validation loss.")
    report = ledger.facts()
    assert report["epsilon"] == ledger.epsilon()
    assert report["epsilons"][0] == {"delta": 1e-5, "prv": ledger.epsilon(), "rdp": ledger.epsilon(accountant="rdp")}
    assert [row["delta"] for row in report["epsilons"]] == [1e-5, 1e-6]
    assert report["private"] is True
    markdown = ledger.to_markdown()
    rests, lacks = "| rests on | Batches are Poisson samples. |", "| does not cover | The validation loss. |"
    for part in ("delta = 1e-05", "| training", *(" ".join(row.split()) for row in (rests, lacks))):
        assert part in " ".join(markdown.split())


def test_caveats_stand_first_everywhere():
    ledger = spent()
    ledger.caveats.append("Epsilon is approximate.")
    assert ledger.to_markdown().startswith("> Epsilon is approximate.")
    assert str(ledger).startswith("Epsilon is approximate.")
    assert ledger.table().caption.startswith("Epsilon is approximate.")
    assert ledger.facts()["private"] is False


def test_ledger_without_noise_says_not_private():
    ledger = PrivacyLedger()
    ledger.record(0.0)
    assert "NOT PRIVATE" in ledger.to_markdown()
    assert ledger.facts()["private"] is False


def test_history_composes_with_that_of_opacus():
    accountant = RDPAccountant()
    accountant.step(noise_multiplier=1.5, sample_rate=0.1)
    ledger = spent()
    ledger.to_opacus(accountant)
    assert accountant.history == [(1.5, 0.1, 1), (1.0, 0.01, 300), (2.0, 0.02, 50)]


def test_replaced_records_are_not_handed_to_opacus():
    with pytest.raises(ValueError, match="this ledger for 'replace_one'"):
        PrivacyLedger(adjacency="replace_one").to_opacus(RDPAccountant())


def test_sampled_steps_between_replaced_records_are_refused():
    with pytest.raises(ValueError, match="use a PrivacyLedger\\(adjacency='add_remove'\\)"):
        PrivacyLedger(adjacency="replace_one").record(1.0, 0.01)


@pytest.mark.parametrize(
    "arguments", [{"delta": 0}, {"max_epsilon": 0}, {"accountant": "gdp"}, {"adjacency": "neighbour"}]
)
def test_ledger_checks_its_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments)).removeprefix("max_")):
        PrivacyLedger(**arguments)


def test_exact_value_of_a_release_is_below_what_renyi_divergences_tell():
    ledger = PrivacyLedger()
    ledger.record(3.7306316348)
    assert ledger.epsilon() == pytest.approx(1, abs=1e-9)
    assert ledger.to_opacus(RDPAccountant()).get_epsilon(delta=1e-5) == pytest.approx(1.093, abs=1e-3)
