"""Who learns when and how fast, and random numbers that go on."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_eff.glimpse.config import TrainingPlan
from lightning_eff.glimpse.in_trainer import progress
from lightning_eff.glimpse.scheduling import phases
from lightning_eff.glimpse.scheduling.options import options_from, paper_optimizer, plain_arguments
from lightning_eff.glimpse.scheduling.phases import (
    AGENT,
    BACKBONE,
    BOTH,
    PRETRAINING,
    learning_rate_factor,
    phase_of,
    progress_after,
)
from lightning_eff.glimpse.scheduling.randomness import RandomStream

CPU = torch.device("cpu")


def course(plan, epochs, batches=4):
    """Phase of each batch of each epoch."""
    turns, found = 0, []
    for epoch in range(epochs):
        for _ in range(batches):
            found.append(phase_of(plan, epoch, turns))
            turns += phases.turns_begun(plan, epoch)
    return found


def test_paper_trains_the_agent_alone_and_then_agent_and_backbone_epoch_by_epoch():
    assert course(TrainingPlan(rl_only_epochs=2), 6, 1) == [AGENT, AGENT, AGENT, BACKBONE, AGENT, BACKBONE]


def test_pretraining_comes_first():
    assert course(TrainingPlan(pretrain_epochs=1, rl_only_epochs=1), 4, 1) == [PRETRAINING, AGENT, AGENT, BACKBONE]


def test_turns_of_batches_are_counted_over_epochs_from_the_end_of_the_agents_own():
    plan = TrainingPlan(pretrain_epochs=1, rl_only_epochs=1, alternate_every=3, alternate_unit="batch")
    found = course(plan, 4)
    assert found[:8] == [PRETRAINING] * 4 + [AGENT] * 4
    assert found[8:] == [AGENT] * 3 + [BACKBONE] * 3 + [AGENT] * 2


@pytest.mark.parametrize(("regime", "phase"), [("constant", BOTH), ("frozen", AGENT), ("backbone_only", BACKBONE)])
def test_other_regimes_stay_as_they_are(regime, phase):
    assert course(TrainingPlan(rl_only_epochs=1, regime=regime), 3, 1) == [AGENT, phase, phase]


@pytest.mark.parametrize(
    ("plan", "backbone", "agent"),
    [
        (TrainingPlan(regime="frozen"), False, True),
        (TrainingPlan(regime="frozen", pretrain_epochs=1), True, True),
        (TrainingPlan(regime="backbone_only", rl_only_epochs=0), True, False),
        (TrainingPlan(regime="backbone_only", rl_only_epochs=1), True, True),
        (TrainingPlan(), True, True),
    ],
)
def test_plan_tells_who_ever_learns(plan, backbone, agent):
    assert phases.trains_backbone(plan) is backbone
    assert phases.trains_agent(plan) is agent


def test_learning_rate_rises_over_the_warmup_and_falls_along_half_a_cosine():
    plan = TrainingPlan(warmup_fraction=0.2)
    factors = [learning_rate_factor(plan, share) for share in (0.05, 0.1, 0.2, 0.6, 1.0, 1.1)]
    assert factors == pytest.approx([0.25, 0.5, 1, 0.5, 0, 0])
    assert learning_rate_factor(TrainingPlan(warmup_fraction=0), 0) == 1


def test_learning_rate_stays_where_it_is_to_or_where_no_end_is_known():
    assert learning_rate_factor(TrainingPlan(learning_rates="constant"), 0.9) == 1
    assert learning_rate_factor(TrainingPlan(), None) == 1


def test_agents_clock_starts_after_pretraining():
    assert [progress_after(share, 0.5) for share in (0.2, 0.5, 0.75, 1)] == [0, 0, 0.5, 1]
    assert progress_after(0.7, 0) == 0.7
    assert progress_after(0.7, 1) == 0
    assert progress_after(None, 0.5) is None


def trainer_at(epoch=0, max_epochs=4, batches=10, global_step=0, max_steps=-1):
    return SimpleNamespace(
        current_epoch=epoch,
        max_epochs=max_epochs,
        num_training_batches=batches,
        global_step=global_step,
        max_steps=max_steps,
    )


def test_progress_is_that_of_epochs_or_of_steps_whichever_is_further():
    assert progress(trainer_at(epoch=1), 5) == pytest.approx((1 + 0.55) / 4)
    assert progress(trainer_at(epoch=1, global_step=80, max_steps=100), 5) == pytest.approx(0.8)
    assert progress(trainer_at(epoch=1, global_step=10, max_steps=100), 5) == pytest.approx((1 + 0.55) / 4)


def test_progress_of_training_without_an_end_is_unknown():
    assert progress(trainer_at(max_epochs=-1), 5) is None


def test_progress_of_epochs_without_a_length_is_that_of_whole_epochs():
    assert progress(trainer_at(epoch=3, batches=float("inf")), 5) == 0.75


def test_stream_draws_the_same_from_the_same_seed_and_goes_on_where_it_stopped():
    def draws(stream, count=3):
        numbers = []
        for _ in range(count):
            with stream.running(CPU):
                numbers.append(torch.rand(2).tolist())
        return numbers

    whole = draws(RandomStream(7), 5)
    begun = RandomStream(7)
    assert draws(begun, 2) == whole[:2]
    resumed = RandomStream(0)
    resumed.load_state_dict(begun.state_dict())
    assert draws(resumed, 3) == whole[2:]
    assert draws(RandomStream(8), 5) != whole


def test_stream_leaves_global_random_numbers_as_they_were_also_after_an_error():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    stream = RandomStream(7)
    with pytest.raises(RuntimeError), stream.running(CPU):
        torch.randn(10) @ torch.randn(11)
    assert torch.equal(torch.rand(4), expected)


def test_processes_that_resume_draw_each_their_own_numbers():
    begun = RandomStream(7)
    with begun.running(CPU):
        torch.rand(2)
    drawn = []
    for rank in range(3):
        stream = RandomStream(0)
        stream.load_state_dict(begun.state_dict(), other=rank)
        with stream.running(CPU):
            drawn.append(torch.rand(3).tolist())
    assert len({tuple(one) for one in drawn}) == 3


def test_states_of_a_stream_are_read_back_with_weights_only(tmp_path):
    stream = RandomStream(7)
    with stream.running(CPU):
        torch.rand(2)
    torch.save(stream.state_dict(), tmp_path / "stream.pt")
    assert torch.load(tmp_path / "stream.pt", weights_only=True)["seed"] == 7


def test_backbones_optimizer_is_the_papers_by_default():
    optimizer = paper_optimizer([torch.zeros(1, requires_grad=True)])
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-5, 1e-4)


def test_options_come_back_from_plain_python():
    plan = TrainingPlan(pretrain_epochs=2, loss_at="all")
    plain = plain_arguments({"plan": plan, "baselines": ("random",), "backbone": torch.nn.Linear(1, 1), "path": Path()})
    assert set(plain) == {"plan", "baselines"}
    assert options_from(TrainingPlan, plain["plan"]) == plan
    assert options_from(TrainingPlan, plan) is plan
