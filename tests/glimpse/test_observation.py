"""States as packed tokens, and as the padded dicts of Stable-Baselines3."""

import pytest
import torch
from glimpse.agents import CAMERA, ragged, tokens

from lightning_eff.glimpse.observation import PARTS, Observation, observation_space, part_shapes

ALL = ("patch", "box", "importance", "latent")


def equal(a, b):
    assert torch.equal(a.lengths, b.lengths)
    for name in PARTS.values():
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)


def test_states_of_equal_lengths_lie_one_behind_the_other():
    boxes = torch.arange(24.0).view(2, 3, 4)
    observation = Observation.of_equal_lengths(boxes)
    assert observation.lengths.tolist() == [3, 3]
    assert observation.boxes.tolist() == boxes.flatten(0, 1).tolist()
    assert observation.patches is None


def test_states_before_the_first_glimpse_have_no_tokens():
    observation = tokens(5, 0)
    assert len(observation) == 5
    assert observation.lengths.tolist() == [0] * 5
    assert observation.patches.shape == (0, 1, 8, 8)


def test_what_is_packed_comes_back_from_padding():
    observation = ragged([2, 0, 5, 1])
    padded = observation.padded(6)
    assert padded["patch"].shape == (4, 6, 1, 8, 8)
    assert padded["present"].tolist() == [[1, 1, 0, 0, 0, 0], [0] * 6, [1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]
    equal(Observation.from_padded(padded), observation)


def test_padding_is_zero_where_there_is_no_token():
    padded = ragged([1, 2]).padded(4)
    for key in ALL:
        assert not padded[key][0, 1:].any()
        assert not padded[key][1, 2:].any()
        assert padded[key][1, :2].any()


def test_what_stands_in_absent_slots_is_not_read():
    observation = ragged([2, 0, 3])
    padded = observation.padded(4)
    for key in ALL:
        padded[key][~padded["present"].bool()] = float("nan")
    equal(Observation.from_padded(padded), observation)


def test_tokens_may_stand_anywhere_among_absent_slots():
    boxes = torch.arange(12.0).view(1, 3, 4)
    packed = Observation.from_padded({"present": torch.tensor([[1, 0, 1]]), "box": boxes})
    assert packed.lengths.tolist() == [2]
    assert torch.equal(packed.boxes, boxes[0, [0, 2]])


def test_states_that_are_too_long_for_the_padding_are_refused():
    with pytest.raises(ValueError, match="at most max_tokens = 4 tokens a state, got 5"):
        ragged([2, 5]).padded(4)


def test_taking_states_keeps_their_tokens_together():
    observation = ragged([2, 0, 3, 1])
    taken = observation.take(torch.tensor([3, 0, 1]))
    assert taken.lengths.tolist() == [1, 2, 0]
    assert torch.equal(taken.latents, observation.latents[[5, 0, 1]])
    equal(observation.take(torch.tensor([True, False, True, False])), observation.take(torch.tensor([0, 2])))
    assert len(observation.take(torch.zeros(4, dtype=torch.bool))) == 0


def test_types_change_and_lengths_stay_on_the_cpu():
    moved = ragged([2, 1]).to("meta", torch.float64)
    assert moved.latents.dtype == torch.float64
    assert moved.device.type == "meta"
    assert moved.lengths.device.type == "cpu"


def test_a_detached_observation_carries_no_graph():
    latents = torch.randn(2, 3, 8, requires_grad=True)
    observation = Observation.of_equal_lengths(torch.zeros(2, 3, 4), latents=latents)
    assert observation.latents.requires_grad
    assert not observation.detach().latents.requires_grad


def test_the_space_holds_what_padding_makes():
    space = observation_space(CAMERA, ALL, channels=1, latent_dim=8)
    assert space["patch"].shape == (12, 1, 8, 8)
    padded = tokens(1, 4).padded(CAMERA.max_patches)
    assert space.contains({key: padded[key][0].numpy() for key in space})
    assert part_shapes(space) == {"patch": (1, 8, 8), "box": (4,), "importance": (1,), "latent": (8,)}


def test_the_space_has_the_parts_asked_for_alone():
    assert set(observation_space(CAMERA, ("latent", "box"), 3, 16)) == {"present", "box", "latent"}


def test_another_space_is_told_from_that_of_observations():
    with pytest.raises(ValueError, match="a mask 'present' and one or more of"):
        part_shapes(observation_space(CAMERA, ("box",), 1)["box"])
