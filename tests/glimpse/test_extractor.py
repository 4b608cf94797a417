"""One vector of a set of tokens."""

import pytest
import torch
from glimpse.agents import CAMERA, ragged, tokens
from gymnasium import spaces

from lightning_eff.glimpse.agent import GlimpseExtractor
from lightning_eff.glimpse.config import GlimpseConfig
from lightning_eff.glimpse.observation import Observation, observation_space

ALL = ("patch", "box", "importance", "latent")


def extractor(parts=ALL, hidden=32, camera=CAMERA, **options):
    torch.manual_seed(0)
    return GlimpseExtractor(observation_space(camera, parts, 1, 8), hidden=hidden, **options).eval()


@torch.no_grad()
def test_packed_and_padded_states_have_exactly_the_same_vectors():
    model, states = extractor(), ragged([4, 0, 12, 8, 1])
    assert torch.equal(model(states.padded(12)), model(states))


@torch.no_grad()
def test_the_order_of_tokens_changes_nothing():
    model, states = extractor(), tokens(1, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    shuffled = Observation(
        states.lengths, *(getattr(states, name)[order] for name in ("boxes", "patches", "importance", "latents"))
    )
    torch.testing.assert_close(model(shuffled), model(states))


@pytest.mark.parametrize("poison", [float("nan"), 1e9])
@torch.no_grad()
def test_what_stands_in_absent_slots_changes_nothing_not_even_before_the_first_glimpse(poison):
    model = extractor()
    padded = ragged([4, 0, 8]).padded(12)
    clean = model(padded)
    for key in ALL:
        padded[key][padded["present"] == 0] = poison
    assert torch.equal(model(padded), clean)


@torch.no_grad()
def test_all_states_before_the_first_glimpse_are_one():
    vectors = extractor()(tokens(6, 0))
    assert torch.equal(vectors, vectors[:1].expand(6, -1))
    assert vectors.isfinite().all()


@torch.no_grad()
def test_no_state_has_no_vector():
    assert extractor()(tokens(0, 4)).shape == (0, 32)


@torch.no_grad()
def test_a_state_has_the_same_vector_in_any_company():
    model, states = extractor(), ragged([4, 0, 12, 8])
    together = model(states)
    for i in range(4):
        torch.testing.assert_close(model(states.take(torch.tensor([i])))[0], together[i])


@torch.no_grad()
def test_the_number_of_equal_tokens_is_seen():
    model, one = extractor(), tokens(1, 1)
    three = one.take(torch.tensor([0, 0, 0]))
    three = Observation(torch.tensor([3]), three.boxes, three.patches, three.importance, three.latents)
    assert not torch.allclose(model(one), model(three), atol=1e-3)


@pytest.mark.parametrize("part", ALL)
@torch.no_grad()
def test_every_part_of_the_state_is_looked_at_if_asked_for_and_not_otherwise(part):
    states, others = tokens(3, 4, seed=0), tokens(3, 4, seed=1)
    name = {"patch": "patches", "box": "boxes", "importance": "importance", "latent": "latents"}
    changed = {key: getattr(others if key == name[part] else states, key) for key in name.values()}
    changed = Observation(states.lengths, **changed)
    looking, blind = extractor(), extractor(tuple(other for other in ALL if other != part), hidden=48)
    assert not torch.allclose(looking(changed), looking(states))
    assert torch.equal(blind(changed), blind(states))


def test_every_parameter_learns():
    model = extractor().train()
    model(ragged([3, 0, 5])).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("side", [1, 2, 4, 8, 15, 16, 32])
@torch.no_grad()
def test_patches_of_any_size_are_read(side):
    camera = GlimpseConfig(image_size=64, num_glimpses=2, patch_size=side, grid=2)
    model = extractor(("patch",), camera=camera)
    assert model(tokens(2, 3, side=side)).shape == (2, 32)


def test_sixteen_pixels_shrink_to_one_as_in_the_paper():
    model = extractor(("patch",), camera=GlimpseConfig(image_size=64, patch_size=16))
    widths = [layer.in_features for layer in model.encoders["patch"] if isinstance(layer, torch.nn.Linear)]
    assert widths == [32]


@torch.no_grad()
def test_states_of_another_precision_are_read_in_the_agents_own():
    model, states = extractor(), tokens(2, 3)
    assert model(states.to(dtype=torch.bfloat16)).dtype == torch.float32
    assert model.double()(states).dtype == torch.float64


def test_a_part_that_the_state_lacks_is_named():
    states = tokens(2, 3)
    with pytest.raises(ValueError, match="looks at the latent of each patch, but the observation has none"):
        extractor()(Observation(states.lengths, states.boxes, states.patches, states.importance))


@pytest.mark.parametrize(("hidden", "heads", "parts"), [(30, 8, ALL), (32, 8, ("box", "patch", "latent"))])
def test_a_width_that_does_not_fit_is_refused(hidden, heads, parts):
    with pytest.raises(ValueError, match=f"hidden must be a multiple of heads = 8.*got {hidden}"):
        extractor(parts, hidden=hidden, heads=heads)


def test_a_space_of_something_else_is_refused():
    with pytest.raises(ValueError, match="a mask 'present'"):
        GlimpseExtractor(spaces.Dict({"box": spaces.Box(0, 1, (3, 4))}))
