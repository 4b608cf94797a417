"""Randomness of a step: secret by default, the same on all ranks, never repeated."""

import copy
import pickle

import lightning as L
import pytest
import torch

from lightning_eff.privacy.noise import SecretStreams

LIKE = torch.empty(4096)


def test_seed_everything_does_not_decide_the_noise():
    draws = []
    for _ in range(2):
        L.seed_everything(42, verbose=False)
        draws.append(SecretStreams().normal(0, LIKE))
    first, second = draws
    # standard error of a correlation of 4096 pairs
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / 64


def test_drawing_leaves_the_global_generators_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    SecretStreams().normal(0, LIKE)
    assert torch.equal(torch.rand(3), expected)


def test_noise_is_standard_normal_and_steps_are_unrelated():
    streams = SecretStreams.from_seed(0)
    noise = torch.stack([streams.normal(step, LIKE) for step in range(50)])
    assert abs(float(noise.mean())) < 4 / 50**0.5 / 64
    assert float(noise.std()) == pytest.approx(1, abs=4 / (2 * 50 * 4096) ** 0.5)
    off_diagonal = torch.corrcoef(noise)[~torch.eye(50, dtype=torch.bool)]
    assert float(off_diagonal.abs().max()) < 5 / 64  # the largest of 1225 correlations
    assert float(off_diagonal.square().mean()) == pytest.approx(1 / 4096, rel=0.2)


def test_one_key_gives_every_process_the_same_noise():
    ours = SecretStreams()
    theirs = SecretStreams(ours.key)
    assert torch.equal(ours.normal(7, LIKE), theirs.normal(7, LIKE))
    assert not torch.equal(ours.normal(7, LIKE), theirs.normal(8, LIKE))


def test_a_seed_repeats_and_another_seed_does_not():
    assert torch.equal(SecretStreams.from_seed(1).normal(0, LIKE), SecretStreams.from_seed(1).normal(0, LIKE))
    assert not torch.equal(SecretStreams.from_seed(1).normal(0, LIKE), SecretStreams.from_seed(2).normal(0, LIKE))


def test_the_whole_state_of_the_generator_is_secret():
    # manual_seed(s) and manual_seed(s + 2**32) draw the same numbers: 32 bits, which can be tried one after the other
    generator = SecretStreams().torch_generator("noise", 0)
    words = generator.get_state()[24 : 24 + 8 * 624].view(torch.int64)
    assert len(words.unique()) > 600
    seeded = torch.Generator().manual_seed(int(words[0])).get_state()[24 : 24 + 8 * 624].view(torch.int64)
    assert not torch.equal(words[1:], seeded[1:])


def test_doubles_get_noise_of_their_own_precision():
    noise = SecretStreams().normal(0, LIKE.double())
    assert noise.dtype == torch.float64
    assert not torch.equal(noise, noise.float().double())


@pytest.mark.parametrize("copier", [pickle.dumps, copy.deepcopy])
def test_the_key_cannot_get_into_a_file(copier):
    with pytest.raises(TypeError, match="never leaves the process"):
        copier(SecretStreams())
