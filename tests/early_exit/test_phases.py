"""Which phase it is: regimes, shares of the trainer's epochs or steps, moving on, schedules as long as a phase."""

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from lightning_eff.early_exit.training.phases import Phase, PhaseClock, phases_from, timetable
from lightning_eff.early_exit.training.schedules import build_schedule, check_schedule


def lengths(regime: Any, **options: Any) -> tuple[int | None, ...]:
    return timetable(phases_from(regime), **options).lengths


def test_regimes_are_lists_of_phases() -> None:
    assert {name: [phase.train for phase in phases_from(name)] for name in ("mixed", "joint", "disjoint")} == {
        "mixed": ["backbone", "all"],
        "joint": ["all"],
        "disjoint": ["backbone", "heads"],
    }
    mine = phases_from([Phase("backbone", 2), {"train": "heads", "epochs": 3}])
    assert mine == (Phase("backbone", 2), Phase("heads", 3))


@pytest.mark.parametrize(
    ("regime", "told"),
    [
        ("half", "one of mixed, joint, disjoint, or a list of phases, got 'half'"),
        ([], "at least one phase"),
        ([{"train": "head"}], "'backbone', 'all', 'heads', got 'head'"),
        ([{"train": "all", "epochs": 0}], "at least one epoch"),
        ([{"train": "all", "epochs": -2}], "at least one epoch"),
        ([{"train": "all", "epoch": 2}], "a phase with 'train' and any of"),
        ([{"epochs": 2}], "a phase with 'train'"),
    ],
)
def test_regimes_that_cannot_be_meant_are_refused(regime: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        phases_from(regime)


def test_two_phases_share_the_epochs_by_the_split() -> None:
    assert lengths("mixed", max_epochs=60) == (30, 30)
    assert lengths("mixed", max_epochs=200, split=0.25) == (50, 150)
    assert lengths("mixed", max_epochs=200, split=0.0) == (0, 200)
    assert lengths("mixed", max_epochs=10, split=0.01) == (1, 9)
    assert lengths("joint", max_epochs=60) == (60,)


def test_phases_without_epochs_share_what_the_others_leave() -> None:
    assert lengths([{"train": "backbone"}, {"train": "all"}, {"train": "heads"}], max_epochs=10) == (3, 3, 4)
    assert lengths([{"train": "backbone", "epochs": 2}, {"train": "all"}, {"train": "heads"}], max_epochs=10) == (
        2,
        4,
        4,
    )


def test_skipped_phases_get_nothing() -> None:
    assert lengths("mixed", start=1, max_epochs=60) == (0, 60)


def test_steps_are_shared_where_the_trainer_counts_nothing_else() -> None:
    table = timetable(phases_from("mixed"), max_steps=1000, split=0.3)
    assert (table.unit, table.lengths, table.total) == ("step", (300, 700), 1000)


def test_without_limits_the_phases_tell_the_length_of_the_fit() -> None:
    table = timetable([Phase("backbone", 3), Phase("all", 4)])
    assert (table.lengths, table.total, table.notes) == ((3, 4), 7, ())


def test_the_last_phase_takes_what_is_left_and_says_so() -> None:
    table = timetable([Phase("backbone", 3), Phase("all", 4)], max_epochs=10)
    assert table.lengths == (3, 7)
    assert table.notes == ("the phases have 7 epochs and max_epochs is 10: the last one is extended by 3",)


def test_too_few_epochs_cut_the_phases_short_and_say_so() -> None:
    table = timetable([Phase("backbone", 3), Phase("all", 4), Phase("heads", 2)], max_epochs=5)
    assert table.lengths == (3, 2, 0)
    assert table.notes == ("max_epochs=5 is too few for the phases, which get: backbone 3, all 2, heads 0",)
    assert timetable(phases_from("mixed"), max_epochs=1).notes != ()


def test_a_length_that_nobody_knows_is_refused_unless_something_ends_phases() -> None:
    with pytest.raises(ValueError, match=r"nothing says how long the phases \['backbone', 'all'\] last"):
        timetable(phases_from("mixed"))
    with pytest.raises(ValueError, match="nothing says how long"):
        timetable([Phase("backbone", 3), Phase("all")], max_steps=100)
    assert timetable(phases_from("mixed"), open_ended=True).lengths == (None, None)
    assert timetable(phases_from("joint")).lengths == (None,)


def clock(regime: Any, start: int = 0, **limits: Any) -> PhaseClock:
    made = PhaseClock(phases_from(regime), start)
    made.table = timetable(made.phases, start=start, **limits)
    made.restart()
    return made


def test_phases_begin_when_the_one_before_is_over() -> None:
    ticking = clock("mixed", max_epochs=4)
    moved = [(epoch, ticking.advance(epoch, 10 * epoch), ticking.phase.train) for epoch in range(4)]
    assert moved == [(0, False, "backbone"), (1, False, "backbone"), (2, True, "all"), (3, False, "all")]
    assert ticking.began == {"epoch": 2, "step": 20}
    assert ticking.progress(3, 30) == (2, 2)


def test_phases_of_steps_begin_in_the_middle_of_an_epoch() -> None:
    ticking = clock("mixed", max_steps=10)
    assert not ticking.advance(0, 4)
    assert ticking.advance(0, 5)
    assert ticking.progress(0, 7) == (3, 5)


def test_phases_without_length_are_passed_over() -> None:
    assert clock("mixed", max_epochs=4, split=0.0).index == 1
    assert clock("mixed", start=1, max_epochs=4).index == 1
    short = clock([{"train": "backbone", "epochs": 2}, {"train": "all"}, {"train": "heads", "epochs": 3}], max_epochs=5)
    assert short.advance(2, 0)
    assert (short.phase.train, short.length) == ("heads", 3)


def test_a_phase_that_is_ended_early_shortens_the_fit() -> None:
    ticking = clock("mixed", max_epochs=20)
    ticking.advance(3, 0)
    ticking.ask_next()
    assert ticking.advance(4, 0)
    assert (ticking.saved, ticking.length) == (6, 10)
    assert not ticking.finished(13, 0)
    assert ticking.finished(14, 0)


def test_the_trainer_ends_a_fit_whose_phases_had_their_time() -> None:
    ticking = clock("mixed", max_epochs=4)
    ticking.advance(2, 0)
    assert not ticking.finished(4, 0)


def test_open_phases_last_until_they_are_ended() -> None:
    ticking = clock("mixed", open_ended=True)
    assert not ticking.advance(10_000, 0)
    ticking.ask_next()
    assert ticking.advance(10_001, 0)
    assert ticking.length is None
    assert not ticking.finished(20_000, 0)


def test_a_clock_goes_on_from_its_state_even_when_more_epochs_are_given() -> None:
    before = clock("mixed", max_epochs=4)
    before.advance(2, 20)
    after = clock("mixed", max_epochs=9)
    after.load_state_dict(before.state_dict())
    assert (after.phase.train, after.began, after.length) == ("all", {"epoch": 2, "step": 20}, 7)
    asked = clock("mixed", max_epochs=4)
    asked.ask_next()
    again = clock("mixed", max_epochs=4)
    again.load_state_dict(asked.state_dict())
    assert again.advance(1, 10)


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)


def length(interval: str) -> int:
    return {"epoch": 30, "step": 3000}[interval]


COSINE = "torch.optim.lr_scheduler.CosineAnnealingLR"


@pytest.mark.parametrize(
    "schedule",
    [
        {"class_path": COSINE, "init_args": {"T_max": None}},
        {"class_path": "CosineAnnealingLR", "init_args": {"T_max": None}},
        partial(CosineAnnealingLR, T_max=None),
    ],
)
def test_an_open_length_becomes_that_of_the_phase(schedule: Any) -> None:
    built = build_schedule(schedule, sgd(), length)
    assert built["scheduler"].T_max == 30
    assert built["interval"] == "epoch"


def test_a_schedule_of_steps_is_as_many_steps_long() -> None:
    cosine = {"scheduler": {"class_path": COSINE, "init_args": {"T_max": None}}, "interval": "step"}
    built = build_schedule(cosine, sgd(), length)
    assert (built["scheduler"].T_max, built["interval"]) == (3000, "step")
    built = build_schedule(partial(OneCycleLR, max_lr=0.1, total_steps=None), sgd(), length)
    assert (built["scheduler"].total_steps, built["interval"]) == (3000, "step")


def test_a_length_that_is_given_stays() -> None:
    built = build_schedule({"class_path": COSINE, "init_args": {"T_max": 7}}, sgd(), length)
    assert built["scheduler"].T_max == 7


def test_callables_are_called_with_the_optimizer() -> None:
    optimizer = sgd()
    built = build_schedule(lambda one: CosineAnnealingLR(one, 5), optimizer, length)
    assert isinstance(built["scheduler"], LRScheduler)
    assert built["scheduler"].optimizer is optimizer
    built = build_schedule(lambda one: {"scheduler": CosineAnnealingLR(one, 5), "interval": "step"}, optimizer, length)
    assert (built["scheduler"].T_max, built["interval"]) == (5, "step")


def test_a_plateau_schedule_tells_what_it_watches() -> None:
    built = build_schedule(partial(ReduceLROnPlateau, monitor="val/loss"), sgd(), length)
    assert built["monitor"] == "val/loss"
    torch_plateau = {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau", "init_args": {}}
    built = build_schedule({"scheduler": torch_plateau, "monitor": "val/loss"}, sgd(), length)
    assert built["monitor"] == "val/loss"


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ({"class_path": "torch.optim.lr_scheduler.Cosine"}, "no schedule 'torch.optim.lr_scheduler.Cosine'"),
        ({"class_path": COSINE, "init_args": {}}, "cannot be built from"),
        ({"class_path": COSINE, "init_args": {"T_max": 3, "tmin": 1}}, "cannot be built from"),
        ({"scheduler": partial(CosineAnnealingLR, T_max=3), "every": "step"}, r"has no \['every'\]"),
        ({"scheduler": partial(CosineAnnealingLR, T_max=3), "interval": "batch"}, "'epoch' or 'step'"),
        ({"T_max": 3}, "a callable, a dict of class_path and init_args"),
    ],
)
def test_schedules_that_cannot_be_built_are_refused_early(schedule: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_schedule(schedule)


def test_an_open_length_needs_a_phase_with_an_end() -> None:
    with pytest.raises(ValueError, match="T_max is to be the length of the phase, which is open"):
        build_schedule(partial(CosineAnnealingLR, T_max=None), sgd(), lambda interval: None)
