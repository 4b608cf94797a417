"""Soft actor-critic against Stable-Baselines3's, against its own equations, and on a problem whose answer is known."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from glimpse.agents import AGENT, CAMERA, Aim, Blind, fill, ragged, small_sac, tokens
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from torch import nn

from lightning_eff.glimpse.agent import GlimpseReplayBuffer, GlimpseSAC, make_sac
from lightning_eff.glimpse.agent.sac import NATS_OF_UNITS
from lightning_eff.glimpse.config import ReplayOptions
from lightning_eff.glimpse.observation import Observation
from lightning_eff.glimpse.world import GlimpseWorld


def filled(seed=0, **options):
    sac = small_sac(seed, **options)
    fill(sac.replay_buffer)
    return sac


def parameters(sac):
    return {name: parameter.detach().clone() for name, parameter in sac.policy.named_parameters()}


def differences(a, b):
    return {name: (a[name] - b[name]).abs().max().item() for name in a}


def collect(sac):
    told = {}
    sac.log = lambda name, value: told.__setitem__(name, value.item())
    return told


# against Stable-Baselines3


def test_the_order_of_stable_baselines3_gives_its_parameters():
    ours = filled(update="sb3")
    theirs = copy.deepcopy(ours)
    theirs.set_logger(Logger(None, []))
    for sac, train in ((ours, GlimpseSAC.train), (theirs, SAC.train)):
        torch.manual_seed(3)
        train(sac, 3, 16)
    moved = differences(parameters(ours), parameters(filled(update="sb3")))
    assert moved["actor.features_extractor.sink"] > 1e-3
    # they pad, we pack: sums differ in their last bits, which AdamW's first steps magnify
    assert max(differences(parameters(ours), parameters(theirs)).values()) < 1e-4


def test_losses_of_both_orders_are_equal_at_equal_parameters():
    told = []
    for update in ("fused", "sb3"):
        sac = filled(update=update)
        told.append(collect(sac))
        torch.manual_seed(3)
        sac.train(1, 16)
    fused, in_turn = told
    # the actor's is taken by the new critics in the order of Stable-Baselines3
    assert fused.pop("actor_loss") != pytest.approx(in_turn.pop("actor_loss"), rel=1e-5)
    assert fused == pytest.approx(in_turn, rel=1e-5)


def test_fused_losses_are_those_of_the_equations():
    sac = filled()
    before, batch, told = copy.deepcopy(sac), copy.deepcopy(sac.replay_buffer).draw(16), collect(sac)
    torch.manual_seed(3)
    sac.train(1, 16)
    torch.manual_seed(3)
    with torch.no_grad():
        actions, log_prob = before.actor.action_log_prob(batch.observations)
        after, log_prob_after = before.actor.action_log_prob(batch.next_observations)
        alpha = before.log_ent_coef.exp()
        future = torch.cat(before.critic_target(batch.next_observations, after), 1).min(1).values
        y = batch.rewards[:, 0] + 0.99 * (1 - batch.dones[:, 0]) * (future - alpha * log_prob_after)
        values = before.critic(batch.observations, batch.actions)
        best = torch.cat(before.critic(batch.observations, actions), 1).min(1).values
    expected = {
        "critic_loss": sum(0.5 * (value[:, 0] - y).square().mean() for value in values),
        "actor_loss": (alpha * log_prob - best).mean(),
        "alpha_loss": -(before.log_ent_coef.detach() * (log_prob - 3 + 3 * math.log(2))).mean(),
        "alpha": alpha,
        "entropy": -(log_prob + 3 * math.log(2)).mean(),
        "q_mean": torch.cat(values).mean(),
    }
    assert told == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5, abs=1e-7)


def test_each_loss_moves_its_own_network_alone():
    sac = filled()
    gradients = {}
    sac.backward = lambda loss: (loss.backward(), gradients.update(_gradients(sac)))
    torch.manual_seed(3)
    sac.train(1, 16)
    for loss in ("critic", "actor", "temperature"):
        other = filled()
        torch.manual_seed(3)
        batch = other.replay_buffer.draw(16)
        actions, log_prob = other._actions(batch.observations)
        alpha, alpha_loss = other._temperature(log_prob)
        targets = other._targets(batch, alpha)
        values = torch.cat(other.critic(batch.observations, batch.actions), 1)
        best = torch.cat(other.critic(batch.observations, actions), 1).min(1, keepdim=True).values
        losses = {
            "critic": 0.5 * (values - targets).square().mean(0).sum(),
            "actor": (alpha * log_prob - best).mean(),
            "temperature": alpha_loss,
        }
        networks = {"critic": "critic.", "actor": "actor.", "temperature": "log_ent_coef"}
        losses[loss].backward()
        for name, gradient in _gradients(other).items():
            if name.startswith(networks[loss]):
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def _gradients(sac):
    named = sac.policy.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


@pytest.mark.parametrize("update", ["fused", "sb3"])
def test_the_actors_loss_leaves_nothing_on_the_critics(update):
    sac = filled(update=update)
    left = []
    sac.backward = lambda loss: (loss.backward(), left.append(sac.critic.qf0[0].weight.grad.clone()))
    if update == "sb3":
        sac.backward = lambda loss: (loss.backward(), left.append(_norm(sac.critic)))
        sac.train(1, 16)
        assert left[0] == 0 < left[1] == left[2]
    assert all(parameter.requires_grad for parameter in sac.critic.parameters())


def _norm(module):
    return sum(parameter.grad.norm().item() for parameter in module.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("update", ["fused", "sb3"])
def test_target_critics_follow_by_tau(update):
    sac = filled(update=update, tau=0.25)
    old = [parameter.clone() for parameter in sac.critic_target.parameters()]
    sac.train(1, 16)
    for before, new, target in zip(old, sac.critic.parameters(), sac.critic_target.parameters(), strict=True):
        assert torch.equal(target, torch.add(before * 0.75, new, alpha=0.25))
        assert not target.requires_grad


@pytest.mark.parametrize("update", ["fused", "sb3"])
def test_an_end_has_no_future_whatever_the_target_critics_say(update):
    sac = filled(update=update)
    batch = sac.replay_buffer.draw(32)
    plain = sac._targets(batch, torch.tensor(0.1))
    for parameter in sac.critic_target.parameters():
        parameter.data.fill_(float("inf"))
    targets = sac._targets(batch, torch.tensor(0.1))
    ended = batch.dones[:, 0] == 1
    assert 0 < ended.sum() < 32
    assert torch.equal(targets[ended], batch.rewards[ended])
    assert torch.equal(plain[ended], batch.rewards[ended])
    assert not torch.isclose(plain[~ended], batch.rewards[~ended]).all()


def test_several_updates_in_one_call_are_several_calls():
    one, many = filled(), filled()
    for sac, calls in ((one, [3]), (many, [1, 1, 1])):
        torch.manual_seed(3)
        for steps in calls:
            sac.train(steps, 16)
    assert max(differences(parameters(one), parameters(many)).values()) == 0
    assert one._n_updates == many._n_updates == 3


def test_critics_tell_actions_apart_at_the_width_of_states():
    sac, states = small_sac(), tokens(1, 4)
    first = sac.critic.qf0[0].encoder[0]
    assert (first.in_features, first.out_features) == (3, 32)
    states = states.take(torch.zeros(5, dtype=torch.int64))
    values = sac.critic(states, torch.linspace(-1, 1, 5).unsqueeze(1).expand(-1, 3))
    assert len(values) == 2
    assert all(value.std() > 1e-3 for value in values)
    assert set(sac.critic.q_networks) <= set(sac.critic.children())


# units of actions and entropy


def test_densities_on_the_unit_cube_are_larger_by_the_logarithm_of_two_a_dimension():
    sac = small_sac()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mean, log_std, _ = sac.actor.get_action_dist_params(tokens(1, 4))
        distribution = sac.actor.action_dist.proba_distribution(mean, log_std)
        # the integral over a part of the cube is the share of actions in it
        grid = 0.3 + 0.4 * torch.rand(100_000, 3, generator=generator)
        integral = (distribution.log_prob(2 * grid - 1) + NATS_OF_UNITS).exp().mean() * 0.4**3
        torch.manual_seed(0)
        actions = torch.cat([sac.act(tokens(1, 4).take(torch.zeros(1000, dtype=torch.int64))) for _ in range(100)])
        share = ((actions - 0.5).abs() < 0.2).all(1).float().mean()
    # about 3 000 of 100 000 actions: a deviation of 2 percent
    assert integral.item() == pytest.approx(share.item(), rel=0.1)
    assert integral > 0.01


def test_the_target_entropy_is_converted_from_the_unit_cube():
    assert pytest.approx(3 * math.log(2)) == NATS_OF_UNITS
    assert small_sac(target_entropy=-3.0).target_entropy == pytest.approx(-0.9206, abs=1e-4)
    assert small_sac(target_entropy=-3 - 3 * math.log(2)).target_entropy == pytest.approx(-3)


def test_uniform_actions_have_no_entropy_on_the_unit_cube():
    sac = filled()
    told = collect(sac)
    with torch.no_grad():
        for parameter in sac.actor.parameters():
            parameter.zero_()
        # the density of u is largest in the middle for small sigma, at the ends for large: near 0.88 it is flat
        sac.actor.log_std.bias.fill_(math.log(0.88))
    sac.train(1, 16)
    assert told["entropy"] == pytest.approx(0, abs=0.1)


@torch.no_grad()
def test_actions_lie_in_the_unit_cube_and_their_mode_is_that_of_the_policy():
    sac, states = small_sac(), ragged([0, 4, 12])
    actions = torch.cat([sac.act(states) for _ in range(200)])
    assert actions.min() >= 0
    assert actions.max() <= 1
    assert actions.std(0).min() > 0.1
    mean = sac.actor.get_action_dist_params(states)[0]
    torch.testing.assert_close(sac.act(states, deterministic=True), (mean.tanh() + 1) / 2)


def test_acting_builds_no_graph_and_draws_nothing_when_deterministic():
    sac, states = small_sac(), tokens(2, 4)
    before = torch.get_rng_state()
    assert not sac.act(states, deterministic=True).requires_grad
    assert torch.equal(torch.get_rng_state(), before)
    sac.act(states)
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_agent_stays_in_single_precision_under_autocast():
    sac, plain = filled(), filled()
    states = tokens(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sac.act(states, deterministic=True), plain.act(states, deterministic=True))
        torch.manual_seed(3)
        sac.train(1, 16)
    torch.manual_seed(3)
    plain.train(1, 16)
    assert max(differences(parameters(sac), parameters(plain)).values()) == 0


def test_states_of_half_precision_are_acted_upon():
    sac, states = small_sac(), tokens(2, 4)
    torch.testing.assert_close(sac.act(states.to(dtype=torch.bfloat16), True), sac.act(states, True), atol=0.02, rtol=0)


def test_an_agent_in_double_precision_learns():
    sac = filled()
    sac.policy.double()
    sac.train(1, 16)
    assert sac.act(tokens(2, 4)).dtype == torch.float32


# what a Trainer needs


def test_building_an_agent_sets_no_seed():
    torch.manual_seed(1)
    make_sac(AGENT, CAMERA, Blind())
    a = torch.rand(1)
    torch.manual_seed(2)
    make_sac(AGENT, CAMERA, Blind())
    assert torch.rand(1) != a


def test_agents_of_equal_seeds_are_equal():
    assert max(differences(parameters(small_sac(4)), parameters(small_sac(4))).values()) == 0
    assert max(differences(parameters(small_sac(4)), parameters(small_sac(5))).values()) > 0.01


def test_the_learning_rates_of_optimizers_are_left_to_the_trainer():
    sac = filled()
    for optimizer in sac.optimizers:
        optimizer.param_groups[0]["lr"] = 0.0
    before = parameters(sac)
    sac.train(2, 16)
    frozen = {name: value for name, value in before.items() if not name.startswith("critic_target")}
    assert max(differences(frozen, parameters(sac)).values()) == 0


def test_a_schedule_of_stable_baselines3_is_followed():
    sac = filled()
    sac.set_logger(Logger(None, []))
    sac.learning_rate = lambda left: 0.5 * left
    sac._setup_lr_schedule()
    sac.train(1, 16)
    assert [optimizer.param_groups[0]["lr"] for optimizer in sac.optimizers] == [0.5] * 3


class Counted:
    """As a Trainer wraps an optimizer."""

    def __init__(self, optimizer):
        self.wrapped, self.steps = optimizer, 0
        self.param_groups = optimizer.param_groups

    def zero_grad(self):
        self.wrapped.zero_grad()

    def step(self):
        self.steps += 1
        self.wrapped.step()


@pytest.mark.parametrize("update", ["fused", "sb3"])
def test_steps_and_backward_passes_go_through_what_the_trainer_puts_in_place(update):
    sac, plain = filled(update=update), filled(update=update)
    wrapped = [Counted(optimizer) for optimizer in sac.optimizers]
    sac.optimizers = wrapped
    passes = []
    sac.backward = lambda loss: (passes.append(1), loss.backward())
    for agent in (sac, plain):
        torch.manual_seed(3)
        agent.train(2, 16)
    assert [optimizer.steps for optimizer in wrapped] == [2, 2, 2]
    assert len(passes) == {"fused": 2, "sb3": 6}[update]
    assert max(differences(parameters(sac), parameters(plain)).values()) == 0


def test_as_many_optimizers_are_put_in_place_as_there_are():
    sac = small_sac(ent_coef=0.2)
    assert len(sac.optimizers) == 2
    with pytest.raises(ValueError, match="expected 2 optimizers, got 3"):
        sac.optimizers = small_sac().optimizers


def test_the_temperature_is_a_parameter_of_the_policy():
    sac = small_sac(ent_coef="auto_0.1")
    assert isinstance(sac.log_ent_coef, nn.Parameter)
    assert sac.policy.log_ent_coef is sac.log_ent_coef
    assert sac.policy.state_dict()["log_ent_coef"].exp().item() == pytest.approx(0.1)
    assert sac.ent_coef_optimizer.param_groups[0]["params"][0] is sac.log_ent_coef
    sac.policy.double()
    assert sac.log_ent_coef.dtype == torch.float64


def test_a_fixed_temperature_stays():
    sac = filled(ent_coef=0.2)
    told = collect(sac)
    sac.train(2, 16)
    assert told["alpha"] == pytest.approx(0.2)
    assert "alpha_loss" not in told
    assert sac.log_ent_coef is None


def test_the_temperature_rises_where_entropy_is_too_low_and_falls_where_it_is_too_high():
    rising, falling = filled(target_entropy=5.0), filled(target_entropy=-50.0)
    for sac in (rising, falling):
        sac.train(5, 16)
    assert falling.log_ent_coef.exp() < 0.1 < rising.log_ent_coef.exp()


def test_gradients_are_clipped_network_by_network():
    sac = filled(gradient_clip=0.01)
    norms = []

    class Seen(Counted):
        def step(self):
            grads = [parameter.grad for parameter in self.param_groups[0]["params"] if parameter.grad is not None]
            norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())
            super().step()

    sac.optimizers = [Seen(optimizer) for optimizer in sac.optimizers]
    sac.train(1, 16)
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)


def test_losses_that_are_not_finite_are_told_with_their_names():
    sac = filled()
    sac.replay_buffer._taken[:, 3] = float("inf")
    with pytest.raises(FloatingPointError, match=r"not finite after 1 updates: .*critic_loss inf"):
        sac.train(1, 16)


def test_without_a_trainer_the_logger_of_stable_baselines3_is_told():
    sac = filled()
    sac.train(1, 16)  # nobody to tell
    sac.set_logger(Logger(None, []))
    sac.train(1, 16)
    names = {"actor_loss", "critic_loss", "alpha", "alpha_loss", "entropy", "q_mean", "n_updates"}
    assert {f"train/{name}" for name in names} <= set(sac.logger.name_to_value)


def test_copies_learn_apart_and_hold_together():
    for make in (copy.deepcopy, lambda sac: pickle.loads(pickle.dumps(sac))):
        sac = filled()
        other = make(sac)
        assert other.actor is other.policy.actor
        assert other.log_ent_coef is other.policy.log_ent_coef
        assert other.ent_coef_optimizer.param_groups[0]["params"][0] is other.log_ent_coef
        before = parameters(sac)
        other.train(1, 16)
        assert differences(before, parameters(sac)).keys() == before.keys()
        assert max(differences(before, parameters(sac)).values()) == 0
        assert differences(before, parameters(other))["log_ent_coef"] > 0


@pytest.mark.parametrize("ent_coef", ["auto_0.1", 0.2])
def test_a_saved_agent_is_loaded_with_all_it_has_learnt(tmp_path, ent_coef):
    sac = filled(ent_coef=ent_coef, update="sb3", gradient_clip=1.0)
    sac.train(3, 16)
    collect(sac)  # hooks of a Trainer are not saved
    sac.save(tmp_path / "agent.zip")
    loaded = GlimpseSAC.load(tmp_path / "agent.zip", device="cpu")
    states = ragged([0, 4, 8])
    assert torch.equal(loaded.act(states, True), sac.act(states, True))
    assert max(differences(parameters(sac), parameters(loaded)).values()) == 0
    assert (loaded.update, loaded.gradient_clip, loaded.target_entropy) == ("sb3", 1.0, sac.target_entropy)
    assert isinstance(loaded.replay_buffer, GlimpseReplayBuffer)
    loaded.replay_buffer.load_state_dict(sac.replay_buffer.state_dict())
    for agent in (sac, loaded):
        torch.manual_seed(3)
        agent.train(2, 16)
    assert max(differences(parameters(sac), parameters(loaded)).values()) == 0


def test_an_agent_is_moved_with_its_replay_buffer():
    sac = filled(ent_coef=0.2)
    sac.move_to("meta")
    assert {parameter.device.type for parameter in sac.policy.parameters()} == {"meta"}
    assert sac.ent_coef_tensor.device.type == "meta"
    assert sac.replay_buffer._tokens["patches"].device.type == "meta"
    assert sac.device.type == "meta"


@pytest.mark.parametrize(("part", "has"), [("latent", {"latent_dim": 0}), ("importance", {"has_importance": False})])
def test_a_part_of_the_state_that_the_backbone_lacks_is_named(part, has):
    backbone = Blind()
    for name, value in has.items():
        setattr(backbone, name, value)
    with pytest.raises(ValueError, match=f"state_parts has '{part}', and Blind tells no {part}"):
        small_sac(backbone=backbone)


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="update must be one of fused, sb3, got 'both'"):
        GlimpseSAC("MultiInputPolicy", None, update="both", _init_setup_model=False)


# a problem whose answer is known


@pytest.mark.parametrize(
    ("update", "updates", "tolerance", "temperature"),
    [
        ("fused", 350, 0.2, 0.06),
        pytest.param("fused", 1000, 0.05, 0.02, marks=pytest.mark.slow),
        pytest.param("sb3", 1000, 0.05, 0.02, marks=pytest.mark.slow),
    ],
)
def test_the_best_action_of_a_bandit_is_found(update, updates, tolerance, temperature):
    """Reward -|a - a*|^2 with a* = (0.3, 0.7, 0.2), one state, episodes of one glimpse."""
    torch.manual_seed(0)
    camera = replace(CAMERA, num_glimpses=1, grid=1, patch_size=16, quantize=False)
    replay = ReplayOptions(buffer_size=10_000, batch_size=128)
    target = -3 - 3 * math.log(2)
    sac = small_sac(0, camera, update=update, lr=3e-3, state_parts=("box",), target_entropy=target, replay=replay)
    world = GlimpseWorld(Blind(), Aim(), camera, state_parts=("box",))
    scenes = torch.zeros(16, 1, 32, 32)
    for i in range(150 + updates):
        state = world.reset(scenes)
        step = world.step(torch.rand(16, 3) if i < 150 else sac.act(state))
        sac.replay_buffer.add_step(step.observation, step.actions, step.reward, step.done, step.rows)
        if i >= 150:
            sac.train(1, 128)
    found = sac.act(Observation.of_equal_lengths(torch.zeros(1, 0, 4)), deterministic=True)
    # the policy of no update looks at the middle, 0.3 away, at a temperature of 0.1
    assert (found - torch.tensor([[0.3, 0.7, 0.2]])).abs().max() < tolerance
    assert sac.log_ent_coef.exp() < temperature
