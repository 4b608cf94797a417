"""Feature networks: fixed by their arguments, with the parameters that the published ones have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_eff.synthesis.networks import ConvFeatureNet, FCFeatureNet, paper_feature_net


def size(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "widths", "outputs", "expected"),
    [
        ("fc_1l", (1, 28, 28), None, 10, 636_010),  # 784 * 800 + 800 + 800 * 10 + 10
        ("fc_2l", (3, 32, 32), None, 10, 3072 * 3000 + 3000 + 3000 * 200 + 200 + 200 * 10 + 10),
        ("cnn_1l", (14,), (6,), 2, 6 * 3 + 6 + 6 * 14 * 2 + 2),
        ("cnn_2l", (14,), (30, 200), 2, 30 + 30 + 30 * 14 * 200 + 200 + 200 * 2 + 2),
    ],
)
def test_published_networks_have_their_parameters(
    name: Any, shape: tuple[int, ...], widths: Any, outputs: int, expected: int
) -> None:
    network = paper_feature_net(name, shape, widths, outputs)
    assert size(network) == expected
    assert network(torch.rand(2, *shape)).shape == (2, outputs)


def test_seed_fixes_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = FCFeatureNet(4, (3,), seed=1), FCFeatureNet(4, (3,), seed=1), FCFeatureNet(4, (3,), seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.layers[0].weight, other.layers[0].weight)
    first, again = (ConvFeatureNet((1, 8, 8), seed=1).layers[0].weight for _ in range(2))
    assert torch.equal(first, again)


def test_flat_inputs_are_taken() -> None:
    x = torch.rand(2, 3, 8, 8)
    for network in (ConvFeatureNet((3, 8, 8)), FCFeatureNet(192)):
        assert torch.equal(network(x), network(x.flatten(1)))
    assert ConvFeatureNet((12,)).input_shape == (1, 12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FCFeatureNet(0), "in_features >= 1"),
        (lambda: FCFeatureNet(3, ()), "at least one width"),
        (lambda: FCFeatureNet(3, (4, 4), activations=[True]), "one of activations for each of the 2 widths, got 1"),
        (lambda: ConvFeatureNet((1, 2, 3, 4)), "expected input_shape"),
        (lambda: ConvFeatureNet((1, 8, 8), kernel_size=2), "odd kernel_size"),
        (lambda: ConvFeatureNet((1, 2, 2), (4, 4, 4)), "pass pool=False"),
        (lambda: ConvFeatureNet((1, 8, 8), ()), "at least one of channels"),
        (lambda: paper_feature_net("fc_9l", (3,)), "expected one of"),
        (lambda: paper_feature_net("fc_2l", (3,), (4,)), "expected 2 widths"),
    ],
)
def test_impossible_networks_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_networks_are_the_same_whatever_the_default_type_and_device_are() -> None:
    expected = FCFeatureNet(4, (3,), seed=1)
    default = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            with torch.device("meta"):
                actual = FCFeatureNet(4, (3,), seed=1)
            assert torch.get_default_dtype() == dtype
            assert all(torch.equal(a, b) for a, b in zip(actual.parameters(), expected.parameters(), strict=True))
    finally:
        torch.set_default_dtype(default)


def test_only_the_generator_of_the_cpu_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("another generator than that of the CPU would be seeded, and not be put back")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    monkeypatch.setattr(torch, "manual_seed", refuse)
    FCFeatureNet(4, (3,))
