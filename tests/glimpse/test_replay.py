"""A replay buffer whose states share their patches."""

import copy
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from glimpse.agents import CAMERA, fill, small_sac, tokens
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer

from lightning_eff.glimpse.agent import GlimpseReplayBuffer
from lightning_eff.glimpse.config import GlimpseConfig, ReplayOptions
from lightning_eff.glimpse.observation import PARTS, Observation, observation_space

ALL = ("patch", "box", "importance", "latent")


def buffer(size=96, parts=ALL, **options):
    options = {"patches_per_glimpse": 4, "seed": 0, "device": "cpu"} | options
    return GlimpseReplayBuffer(size, observation_space(CAMERA, parts, 1, 8), spaces.Box(0, 1, (3,)), **options)


def step(number, t, images=1, rows=None):
    """Glimpse t of image ``number``, ``number + 1``, ...: all numbers of a state tell image and glimpse."""
    image = torch.arange(number, number + images).float() if rows is None else number + rows.float()
    patch = (image.view(-1, 1) + torch.arange(1, t + 1).repeat_interleave(4) / 10).unsqueeze(2)
    state = Observation.of_equal_lengths(
        patch.expand(-1, -1, 4),
        patch.view(len(image), 4 * t, 1, 1, 1).expand(-1, -1, 1, 8, 8),
        patch + t / 100,
        (patch + t / 100).expand(-1, -1, 8),
    )
    reward = image + t / 10
    return state, (reward / 1000).unsqueeze(1).expand(-1, 3), reward


def add(replay, number, t, images=1, rows=None, done=None):
    state, actions, rewards = step(number, t, images, rows)
    done = torch.full((len(rewards),), t == 3) if done is None else done
    replay.add_step(state, actions, rewards, done, rows)


def equal(a, b):
    assert torch.equal(a.lengths, b.lengths)
    for name in PARTS.values():
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)


def assert_consistent(batch):
    """Every transition drawn leads from where its predecessor led to where it led, by its own action."""
    for i in range(len(batch.rewards)):
        reward = round(batch.rewards[i].item(), 4)
        image, t = int(reward), round(10 * (reward - int(reward)))
        one = torch.tensor([i])
        equal(batch.next_observations.take(one), step(image, t)[0])
        before = batch.observations.take(one)
        if t > 1:
            equal(before, step(image, t - 1)[0])
        else:
            assert before.lengths.tolist() == [0]
        torch.testing.assert_close(batch.actions[i], torch.full((3,), 2 * reward / 1000 - 1))
        assert batch.dones[i].item() == (t == 3)


def rewards_held(replay, draws=2000):
    return sorted({round(reward, 4) for reward in replay.draw(draws).rewards.flatten().tolist()})


def test_transitions_come_back_whole():
    replay = buffer()
    for batch in range(3):
        for t in (1, 2, 3):
            add(replay, 10 * batch, t, images=5)
    assert replay.size() == 45
    batch = replay.draw(200)
    assert len(set(batch.rewards.flatten().tolist())) > 40
    assert_consistent(batch)


@pytest.mark.parametrize("size", [12, 15, 17, 23, 24])
def test_the_oldest_episodes_leave_whole_wherever_the_ring_closes(size):
    replay = buffer(size)
    for batch in range(9):
        for t in (1, 2, 3):
            add(replay, 10 * batch, t, images=4)
            assert replay.size() <= size
            assert_consistent(replay.draw(50))
    kept = size // 12
    assert replay.size() == 12 * kept
    expected = [10 * batch + image + t / 10 for batch in range(9 - kept, 9) for image in range(4) for t in (1, 2, 3)]
    assert rewards_held(replay) == pytest.approx(sorted(expected), abs=1e-3)


def test_images_that_have_stopped_add_no_more_transitions():
    replay = buffer(24)
    for batch in range(5):
        add(replay, 10 * batch, 1, images=4, done=torch.tensor([False, True, False, False]))
        add(replay, 10 * batch, 2, rows=torch.tensor([0, 2, 3]), done=torch.tensor([True, False, False]))
        add(replay, 10 * batch, 3, rows=torch.tensor([2, 3]))
        lengths = Counter(replay.draw(500).next_observations.lengths.tolist())
        assert set(lengths) == {4, 8, 12}
    assert replay.size() == 18  # another batch might need 12 of 24, and each left 9
    batch = replay.draw(100)
    for i in range(100):
        reward = round(batch.rewards[i].item(), 4)
        image, t = int(reward), round(10 * (reward - int(reward)))
        equal(batch.next_observations.take(torch.tensor([i])), step(image, t)[0])
        assert batch.dones[i].item() == ((image % 10, t) in {(1, 1), (0, 2), (2, 3), (3, 3)})


def test_a_batch_that_was_cut_short_leaves_its_transitions():
    replay = buffer()
    add(replay, 0, 1, images=4)
    add(replay, 0, 2, images=4)
    for t in (1, 2, 3):
        add(replay, 10, t, images=2)
    assert replay.size() == 14
    assert_consistent(replay.draw(100))


def test_a_last_batch_may_be_smaller():
    replay = buffer(30)
    for batch, images in enumerate((6, 2, 6, 1, 4)):
        for t in (1, 2, 3):
            add(replay, 10 * batch, t, images=images)
    assert_consistent(replay.draw(100))


def test_episodes_of_one_glimpse_are_kept():
    sac = small_sac(camera=replace(CAMERA, num_glimpses=1))
    for batch in range(20):
        sac.replay_buffer.add_step(tokens(8, 4, batch), torch.rand(8, 3), torch.randn(8), torch.ones(8).bool())
    assert sac.replay_buffer.size() == 96
    assert not sac.replay_buffer.draw(5).observations.lengths.any()


def test_draws_are_uniform_and_the_generator_is_the_buffers_own():
    replay = buffer()
    for t in (1, 2, 3):
        add(replay, 0, t, images=4)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    counts = Counter(round(reward, 4) for reward in replay.draw(12_000).rewards.flatten().tolist())
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert len(counts) == 12
    # each is binomial with mean 1000 and deviation 30
    assert all(abs(count - 1000) < 5 * 30.3 for count in counts.values())


def test_the_generator_follows_the_global_seed_without_moving_it():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        replay = fill(buffer(seed=None))
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(replay.draw(20).rewards)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_padded_samples_are_the_packed_ones():
    packed, padded = fill(buffer()), fill(buffer())
    a, b = packed.draw(20), padded.sample(20)
    equal(Observation.from_padded(b.observations), a.observations)
    equal(Observation.from_padded(b.next_observations), a.next_observations)
    for name in ("actions", "rewards", "dones"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert list(b.observations) == list(packed.observation_space.spaces)


def test_half_precision_rounds_latents_alone():
    whole, half = fill(buffer()), fill(buffer(latent_dtype="float16"))
    a, b = whole.draw(30).next_observations, half.draw(30).next_observations
    assert b.latents.dtype == torch.float32
    assert torch.equal(b.latents, a.latents.half().float())
    assert torch.equal(b.patches, a.patches)
    assert torch.equal(b.importance, a.importance)
    assert half.nbytes < whole.nbytes


def test_parts_that_the_agent_does_not_see_are_not_kept():
    state = fill(buffer(parts=("patch", "box"))).draw(5).observations
    assert state.latents is None
    assert state.importance is None
    blind = buffer(parts=("latent",))
    fill(blind)
    assert blind.draw(5).observations.patches is None


def test_memory_is_a_sixth_of_that_of_padded_pairs():
    camera = GlimpseConfig(image_size=224, num_glimpses=14)
    space = observation_space(camera, ALL, 3, 768)
    action = spaces.Box(0, 1, (3,))
    ours = GlimpseReplayBuffer(140, space, action, patches_per_glimpse=4, device="cpu")
    half = GlimpseReplayBuffer(140, space, action, patches_per_glimpse=4, latent_dtype="float16", device="cpu")
    theirs = DictReplayBuffer(140, space, action, device="cpu")
    held = [theirs.actions, *theirs.observations.values(), *theirs.next_observations.values()]
    padded = sum(array.nbytes for array in held)
    assert 6 * ours.nbytes <= padded
    assert ours.nbytes / 140 < 107e3  # bytes a transition; patches 12 288, latents of 30 tokens 92 160
    assert half.nbytes / 140 < 61e3


def test_a_buffer_goes_on_where_another_one_stopped():
    first = buffer(30)
    for batch in range(5):
        for t in (1, 2, 3):
            add(first, 10 * batch, t, images=4)
    add(first, 50, 1, images=4)
    first.draw(7)
    second = buffer(30, seed=99)
    add(second, 90, 1, images=3)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert second.size() == first.size()
    for replay in (first, second):
        add(replay, 50, 2, images=4)  # in the middle of an episode
        add(replay, 50, 3, images=4)
        for t in (1, 2, 3):
            add(replay, 60, t, images=4)
    a, b = first.draw(200), second.draw(200)
    assert torch.equal(a.rewards, b.rewards)
    equal(a.next_observations, b.next_observations)
    assert_consistent(b)


def test_what_is_saved_is_tensors_and_numbers_of_no_more_than_is_held(tmp_path):
    replay = buffer()
    for t in (1, 2, 3):
        add(replay, 0, t, images=2)
    state = replay.state_dict()
    assert state["patches"].shape == (24, 1, 8, 8)
    assert state["latents"].shape == (2 * (4 + 8 + 12), 8)
    torch.save(state, tmp_path / "replay.pt")
    loaded = torch.load(tmp_path / "replay.pt", weights_only=True)
    other = buffer()
    other.load_state_dict(loaded)
    assert_consistent(other.draw(20))


def test_equal_buffers_are_saved_as_equal_files():
    states = []
    for before in (0, 3):  # what has left the ring is not told
        replay = buffer(12)
        for batch in [*range(before), 7]:
            for t in (1, 2, 3):
                add(replay, 10 * batch, t, images=4)
        states.append(replay.state_dict())
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key]))


def test_an_empty_buffer_is_saved_and_comes_back_empty():
    replay = fill(buffer())
    replay.load_state_dict(buffer().state_dict())
    assert replay.size() == 0
    fill(replay)
    assert replay.size() == 96


def test_a_saved_buffer_fits_a_larger_one_and_no_smaller_one():
    state = fill(buffer(96)).state_dict()
    larger = buffer(200)
    larger.load_state_dict(state)
    assert larger.size() == 96
    with pytest.raises(ValueError, match="buffer_size must be >= 96, the transitions saved, got 48"):
        buffer(48).load_state_dict(state)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_glimpses", 5, "has num_glimpses = 5, this one 3"),
        ("patches_per_glimpse", 1, "has patches_per_glimpse = 1, this one 4"),
        ("latents", torch.zeros(3, 16), r"'latents': \(16,\)"),
        ("importance", None, "'importance': None"),
    ],
)
def test_a_buffer_of_another_agent_is_refused_with_the_way_out(key, value, message):
    state = fill(buffer()).state_dict()
    if value is None:
        del state[key]
    else:
        state[key] = value
    with pytest.raises(ValueError, match=message + r".*resume_buffer=False"):
        buffer().load_state_dict(state)


def test_an_emptied_buffer_takes_new_episodes():
    replay = fill(buffer())
    replay.reset()
    assert replay.size() == 0
    with pytest.raises(ValueError, match="got an empty one"):
        replay.draw(1)
    for t in (1, 2, 3):
        add(replay, 0, t, images=2)
    assert_consistent(replay.draw(20))


def test_copies_are_independent():
    replay = fill(buffer())
    others = copy.deepcopy(replay), pickle.loads(pickle.dumps(replay))
    drawn = replay.draw(10).rewards
    for other in others:
        assert torch.equal(other.draw(10).rewards, drawn)
        other.reset()
    assert replay.size() == 96


def test_what_is_kept_carries_no_graph():
    replay = buffer()
    state, actions, rewards = step(0, 1, images=2)
    latents = state.latents.clone().requires_grad_()
    state = Observation(state.lengths, state.boxes, state.patches, state.importance, latents * 2)
    replay.add_step(state, actions, rewards, torch.zeros(2, dtype=torch.bool))
    assert not replay.draw(2).next_observations.latents.requires_grad


def test_a_buffer_too_small_for_one_batch_of_episodes_says_how_large_it_must_be():
    with pytest.raises(ValueError, match="buffer_size must be >= 27: 9 images of a batch, 3 glimpses each; got 24"):
        add(buffer(24), 0, 1, images=9)


def test_a_glimpse_without_the_one_before_is_refused():
    replay = buffer()
    with pytest.raises(ValueError, match="glimpse 2 of a batch of episodes was added without glimpse 1"):
        add(replay, 0, 2, images=2)
    add(replay, 0, 1, images=2)
    with pytest.raises(ValueError, match="glimpse 3 of a batch of episodes was added without glimpse 2"):
        add(replay, 0, 3, images=2)
    assert replay.size() == 2


@pytest.mark.parametrize("lengths", [[4, 8], [3, 3], [16, 16], [0, 0]])
def test_states_that_are_no_whole_glimpses_are_refused(lengths):
    state = Observation(torch.tensor(lengths), torch.zeros(sum(lengths), 4))
    with pytest.raises(ValueError, match="equally many tokens, 4 a glimpse and at most 12"):
        buffer().add_step(state, torch.zeros(2, 3), torch.zeros(2), torch.zeros(2))


def test_no_image_adds_nothing():
    replay = buffer()
    replay.add_step(tokens(0, 4), torch.zeros(0, 3), torch.zeros(0), torch.zeros(0))
    assert replay.size() == 0


def test_episodes_of_environments_enter_when_they_end():
    replay = buffer(parts=ALL)
    ends = {0: 3, 1: 2}
    before = [step(image, 0)[0].padded(12) for image in (0, 1)]
    for t in (1, 2, 3):
        after = [step(image, min(t, ends[image]))[0].padded(12) for image in (0, 1)]
        obs, new = (
            {key: torch.cat([state[key] for state in states]).numpy() for key in before[0]}
            for states in (before, after)
        )
        rewards = np.array([t / 10, 1 + t / 10], np.float32)
        actions = (2 * rewards / 1000 - 1)[:, None].repeat(3, 1)
        done = np.array([t == 3, t == 2])
        if t < 3:
            replay.add(obs, new, actions, rewards, done, [{}, {}])
            assert replay.size() == (0 if t == 1 else 2)
        before = after
    batch = replay.draw(20)
    assert set(batch.next_observations.lengths.tolist()) == {4, 8}
    for i in range(20):
        t = round(10 * (batch.rewards[i].item() - 1))
        equal(batch.next_observations.take(torch.tensor([i])), step(1, t)[0])
        assert batch.dones[i].item() == (t == 2)


def test_sizes_of_batches_and_buffers_must_fit():
    with pytest.raises(ValueError, match="buffer_size must be >= batch_size = 256, got 100"):
        ReplayOptions(buffer_size=100)
