"""The world as Stable-Baselines3 and gymnasium want it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from glimpse.agents import CAMERA, Aim, Blind, small_sac
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3 import SAC
from stable_baselines3.common.env_checker import check_env
from torch.utils.data import TensorDataset

from lightning_eff.glimpse.agent import GlimpseExtractor, GlimpseReplayBuffer
from lightning_eff.glimpse.config import ReplayOptions, RewardOptions
from lightning_eff.glimpse.environments import GlimpseEnv, GlimpseVecEnv
from lightning_eff.glimpse.world import GlimpseWorld

ALL = ("patch", "box", "importance", "latent")


class Surer(Aim):
    """Sure after a first glimpse of a wide view, and not at all later."""

    def confidence(self, prediction):
        wide = prediction[:, 0, 2] > 24
        return (wide & (prediction.size(1) == 1)).float()


def world(parts=ALL, task=None, **options):
    return GlimpseWorld(Blind(), task or Aim(), replace(CAMERA, **options), RewardOptions(), parts)


def scenes(number=10):
    """Scenes that are all of one value, their number; so that a state tells which one it is of."""
    values = torch.arange(float(number))
    return TensorDataset(values.view(-1, 1, 1, 1).expand(-1, 1, 32, 32).clone(), torch.zeros(number))


def actions(environments=4, seed=0):
    return np.random.default_rng(seed).random((environments, 3), np.float32)


def ended(infos):
    """Scenes whose episodes have ended."""
    last = [info["terminal_observation"] for info in infos if "terminal_observation" in info]
    return [round(float(state["patch"][0, 0, 0, 0])) for state in last]


def test_an_episode_ends_after_as_many_glimpses_as_configured_and_another_begins():
    env = GlimpseVecEnv(world(), scenes(), 4)
    assert not env.reset()["present"].any()
    for tokens in (4, 8):
        observations, _, dones, infos = env.step(actions())
        assert observations["present"].sum(1).tolist() == [tokens] * 4
        assert not dones.any()
        assert "terminal_observation" not in infos[0]
    observations, _, dones, infos = env.step(actions())
    assert dones.all()
    assert not observations["present"].any()
    assert [info["terminal_observation"]["present"].sum() for info in infos] == [12] * 4


def test_an_end_is_never_told_to_be_a_time_limit():
    env = GlimpseVecEnv(world(), scenes(), 2)
    env.reset()
    for _ in range(3):
        _, _, _, infos = env.step(actions(2))
    assert [info["TimeLimit.truncated"] for info in infos] == [False, False]


def test_the_last_state_of_an_episode_is_that_of_its_own_scene_and_no_longer_changes():
    env = GlimpseVecEnv(world(), scenes(), 4)
    env.reset()
    before = [env.step(actions(seed=seed)) for seed in range(3)]
    terminal = [info["terminal_observation"] for info in before[2][3]]
    for i in range(4):
        assert np.ptp(terminal[i]["patch"]) < 1e-5
        assert np.array_equal(terminal[i]["box"][:8], before[1][0]["box"][i, :8])
    kept = [part["patch"].copy() for part in terminal]
    env.step(actions())
    assert all(np.array_equal(part["patch"], copy) for part, copy in zip(terminal, kept, strict=True))


def test_states_given_out_do_not_change_with_the_next_step():
    env = GlimpseVecEnv(world(), scenes(), 4)
    first = env.reset()
    second = env.step(actions())[0]
    kept = {key: part.copy() for key, part in second.items()}
    env.step(actions())
    assert not first["present"].any()
    assert all(np.array_equal(second[key], kept[key]) for key in kept)


def test_returns_are_sums_of_rewards():
    env = GlimpseVecEnv(world(), scenes(), 4)
    env.reset()
    total = np.zeros(4)
    for seed in range(3):
        _, rewards, _, infos = env.step(actions(seed=seed))
        total += rewards
    assert [info["episode"]["l"] for info in infos] == [3] * 4
    np.testing.assert_allclose([info["episode"]["r"] for info in infos], total, rtol=1e-6)


def test_images_that_stop_early_make_room_while_others_go_on():
    env = GlimpseVecEnv(world(task=Surer(), stop_threshold=0.5), scenes(), 4)
    env.reset()
    first = actions()
    first[:, 2] = [1, 0, 1, 0]  # wide views stop
    observations, _, dones, infos = env.step(first)
    assert dones.tolist() == [True, False, True, False]
    assert observations["present"].sum(1).tolist() == [0, 4, 0, 4]
    first[:, 2] = [0, 0, 1, 0]
    observations, _, dones, infos = env.step(first)
    assert dones.tolist() == [False, False, True, False]
    assert observations["present"].sum(1).tolist() == [4, 8, 0, 8]
    first[:, 2] = 0
    observations, _, dones, infos = env.step(first)
    assert dones.tolist() == [False, True, False, True]
    assert observations["present"].sum(1).tolist() == [8, 0, 4, 0]
    assert [info["episode"]["l"] for info in infos if "episode" in info] == [3, 3]


def test_every_scene_comes_once_before_one_comes_again():
    env = GlimpseVecEnv(world(), scenes(8), 4)
    env.reset()
    seen = []
    for _ in range(6):
        infos = env.step(actions())[3]
        seen += ended(infos)
    assert sorted(seen) == list(range(8))


def test_scenes_are_fetched_together_where_the_data_set_can():
    class Together(TensorDataset):
        fetched = []

        def __getitems__(self, indices):
            self.fetched.append(len(indices))
            return [self[i] for i in indices]

    GlimpseVecEnv(world(), Together(*scenes().tensors), 4).reset()
    assert Together.fetched == [4]


def test_more_environments_than_scenes_are_possible():
    env = GlimpseVecEnv(world(), scenes(3), 7)
    assert len(env.reset()["present"]) == 7


def test_the_same_seed_gives_the_same_scenes_and_another_one_others():
    def first(seed):
        env = GlimpseVecEnv(world(), scenes(), 4)
        env.seed(seed)
        env.reset()
        return env.step(actions())[0]["patch"][:, 0, 0, 0, 0].tolist()

    assert first(3) == first(3) != first(4)


def test_the_world_given_is_not_changed():
    given = world()
    env = GlimpseVecEnv(given, scenes(), 4)
    env.reset()
    env.step(actions())
    assert not hasattr(given, "rows")
    assert given.taken == 0


@pytest.mark.parametrize("learner", ["its own extractor", "ours", "our buffer"])
def test_stable_baselines3_learns_on_it(learner):
    env = GlimpseVecEnv(world(("patch", "box")), scenes(), 8)
    options = {"learning_starts": 64, "buffer_size": 256, "batch_size": 16, "device": "cpu"}
    if learner != "its own extractor":
        kwargs = {"features_extractor_class": GlimpseExtractor, "features_extractor_kwargs": {"hidden": 16}}
        options["policy_kwargs"] = kwargs
    if learner == "our buffer":
        options |= {
            "replay_buffer_class": GlimpseReplayBuffer,
            "replay_buffer_kwargs": {"patches_per_glimpse": 4},
        }
    sac = SAC("MultiInputPolicy", env, **options)
    before = [parameter.clone() for parameter in sac.actor.parameters()]
    sac.learn(256)
    assert sac.num_timesteps == 256
    assert any(not torch.equal(a, b) for a, b in zip(before, sac.actor.parameters(), strict=True))
    assert sac.ep_info_buffer[-1]["l"] == 3
    action, _ = sac.predict(env.reset(), deterministic=True)
    assert action.shape == (8, 3)
    assert np.abs(action - 0.5).max() <= 0.5


def test_stable_baselines3_keeps_last_states_and_ends_of_the_right_scenes():
    env = GlimpseVecEnv(world(("patch", "box")), scenes(), 4)
    sac = SAC("MultiInputPolicy", env, learning_starts=100, buffer_size=96, device="cpu")
    sac.learn(24)
    buffer = sac.replay_buffer
    for step in range(6):
        last = step % 3 == 2
        assert buffer.dones[step].tolist() == [float(last)] * 4
        assert not buffer.timeouts[step].any()
        assert buffer.next_observations["present"][step].sum(1).tolist() == [4 * (step % 3 + 1)] * 4
        values = buffer.next_observations["patch"][step].reshape(4, 12, -1)[:, :4]
        assert np.ptp(values, axis=(1, 2)).max() < 1e-5


def test_our_agent_learns_on_it_as_that_of_stable_baselines3_does():
    env = GlimpseVecEnv(world(), scenes(), 8)
    sac = small_sac()
    sac.set_env(env)
    sac.learning_starts = 48
    sac.learn(96)
    assert sac._n_updates > 0
    assert sac.replay_buffer.size() > 0


def test_our_agent_waits_for_the_first_episode_to_end():
    sac = small_sac()
    sac.set_env(GlimpseVecEnv(world(), scenes(), 8))
    sac.learning_starts = 0
    sac.learn(16)
    assert (sac._n_updates, sac.replay_buffer.size()) == (0, 0)
    with pytest.raises(ValueError, match=r"none of which has ended an episode yet: use learning_starts >= 24"):
        sac.replay_buffer.draw(1)
    sac.learn(24)
    assert (sac._n_updates, sac.replay_buffer.size()) == (1, 24)


@pytest.mark.parametrize("number", [4, 8, 16])
def test_our_agent_goes_on_with_other_environments_after_stopping_inside_of_episodes(number):
    sac = small_sac(replay=ReplayOptions(buffer_size=240, batch_size=16))
    sac.set_env(GlimpseVecEnv(world(), scenes(), 8))
    sac.learn(8 * 4)
    assert sac.replay_buffer.size() == 24
    sac.set_env(GlimpseVecEnv(world(task=Surer()), scenes(), number))
    sac.learn(number * 6)
    held = sac.replay_buffer.draw(500)
    assert 24 < sac.replay_buffer.size() <= 24 + 6 * number
    assert (held.next_observations.lengths - held.observations.lengths).unique().tolist() == [4]


@pytest.mark.filterwarnings("ignore:.*A Box observation space (minimum|maximum) value is")  # patches and latents
def test_the_single_environment_passes_the_checks_of_both_libraries():
    env = GlimpseEnv(world(), scenes())
    check_env(env, warn=False)
    gymnasium_check_env(env, skip_render_check=True)


def test_the_single_environment_walks_through_an_episode():
    env = GlimpseEnv(world(), scenes(), seed=1)
    state, _ = env.reset()
    assert not state["present"].any()
    ends, total = [], 0.0
    for seed in range(3):
        state, reward, terminated, truncated, info = env.step(actions(1, seed)[0])
        ends.append(terminated)
        total += reward
        assert not truncated
        assert info["view"].shape == (3,)
    assert ends == [False, False, True]
    assert state["present"].sum() == 12
    assert total == pytest.approx(info["score"], abs=1e-6)  # the score of nothing is 0


def test_the_single_environment_cannot_compare_scenes():
    compared = GlimpseWorld(Blind(), Aim(), CAMERA, RewardOptions(kind="score_normalized"), ALL)
    with pytest.raises(ValueError, match=r"use RewardOptions\(kind='score'\), or GlimpseVecEnv"):
        GlimpseEnv(compared, scenes())


def test_both_environments_see_the_same():
    many, one = GlimpseVecEnv(world(), scenes(), 1, seed=5), GlimpseEnv(world(), scenes(), seed=5)
    many.reset()
    one.reset()
    for seed in range(2):
        states, rewards, _, _ = many.step(actions(1, seed))
        state, reward, _, _, _ = one.step(actions(1, seed)[0])
        assert rewards[0] == pytest.approx(reward)
        assert all(np.array_equal(states[key][0], state[key]) for key in state)


def test_attributes_and_methods_are_reached_as_stable_baselines3_does():
    env = GlimpseVecEnv(world(), scenes(), 3)
    assert env.get_attr("num_envs", [0, 2]) == [3, 3]
    env.set_attr("note", 1)
    assert env.get_attr("note") == [1, 1, 1]
    assert env.env_method("has_attr", "note", indices=0) == [True]
    assert env.env_is_wrapped(object) == [False] * 3
    assert not env.has_attr("nothing")
    env.close()


@pytest.mark.parametrize(
    ("number", "environments", "message"), [(5, 0, "num_envs must be a whole number >= 1, got 0"), (0, 2, "empty")]
)
def test_no_environment_and_no_scene_are_refused(number, environments, message):
    with pytest.raises(ValueError, match=message):
        GlimpseVecEnv(world(), scenes(number), environments)
