"""Numerical rank against matrices whose singular values are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.early_exit.analysis import layer_ranks, numerical_rank


def with_singular_values(values: list[float], n: int = 40, m: int = 12, seed: int = 0) -> Tensor:
    """``[n, m]`` with these singular values once columns are centred, plus a mean that must not count."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(n, len(values), generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(left - left.mean(0)).Q  # columns of a centred matrix stay orthogonal to the ones
    right = torch.linalg.qr(torch.randn(m, len(values), generator=generator, dtype=torch.float64)).Q
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T + torch.arange(m)


class Net(nn.Module):
    exits = ("a", "b")

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def features(self, x: Tensor) -> list[Tensor]:
        x = self.dropout(x)
        return [x.unflatten(1, (3, 2, 2)), x[:, :3], torch.zeros(len(x), 2)]


def test_singular_values_one_tenth_one_hundredth_are_rank_two() -> None:
    assert numerical_rank(with_singular_values([1, 0.1, 0.01])) == 2


def test_tolerance_is_on_eigenvalues_the_squares() -> None:
    assert numerical_rank(with_singular_values([1, 0.1, 0.01]), rtol=0.9e-4) == 3
    assert numerical_rank(with_singular_values([1, 0.1, 0.01]), rtol=1.1e-2) == 1


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])  # both Gram matrices
def test_a_planted_rank_is_found(shape: tuple[int, int]) -> None:
    n, m = shape
    planted = with_singular_values([1.0] * 7 + [1e-6] * 3, n, m)
    assert numerical_rank(planted) == 7


@pytest.mark.parametrize("kind", ["numerical", "stable", "effective"])
def test_nothing_that_varies_is_rank_zero(kind: str) -> None:
    assert numerical_rank(torch.zeros(5, 3), kind=kind) == 0
    equal = torch.rand(1, 300, generator=torch.Generator().manual_seed(0)).repeat(77, 1)
    assert numerical_rank(equal, kind=kind) == 0


def test_stable_rank_is_the_frobenius_over_the_spectral_norm_squared() -> None:
    assert numerical_rank(with_singular_values([2, 1, 1]), kind="stable") == pytest.approx((4 + 1 + 1) / 4, abs=1e-9)


def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values() -> None:
    assert numerical_rank(with_singular_values([1] * 5), kind="effective") == pytest.approx(5, abs=1e-6)
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert numerical_rank(with_singular_values([2, 1, 1]), kind="effective") == pytest.approx(math.exp(entropy))


def test_more_dimensions_are_flattened_and_scale_does_not_matter() -> None:
    planted = with_singular_values([1, 0.5, 0.2])
    assert numerical_rank(planted.unflatten(1, (3, 2, 2)) * 1e200) == 3
    assert numerical_rank(planted * 1e-200) == 3


def test_at_most_so_many_samples_and_columns_are_looked_at() -> None:
    noise = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    assert numerical_rank(noise, 1e-12, n_max=11) == 10  # centring takes one
    assert numerical_rank(noise, 1e-12, max_columns=9) == 9


def test_draws_depend_on_the_seed_alone() -> None:
    noise = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    ranks = [numerical_rank(noise, kind="stable", n_max=20, max_columns=20, seed=seed) for seed in (3, 3, 4)]
    assert ranks[0] == ranks[1] != ranks[2]
    assert torch.equal(state, torch.get_rng_state())


def test_half_precision_features_are_ranked_in_float64() -> None:
    planted = with_singular_values([1.0] * 4).half()
    assert numerical_rank(planted) == 4


def test_layers_of_a_network_are_ranked_in_evaluation_mode() -> None:
    network = Net().train()
    planted = with_singular_values([1.0, 1.0, 1.0, 1.0, 1.0]).float()
    loader = [(rows, torch.zeros(len(rows))) for rows in planted.split(16)]
    assert layer_ranks(network, loader) == {"a": 5, "b": 3, "final": 0}
    assert network.training
    assert layer_ranks(network, loader, max_columns=2) == {"a": 2, "b": 2, "final": 0}
    assert layer_ranks(network, loader, 1e-12, n_max=4) == {"a": 3, "b": 3, "final": 0}


def test_batches_of_another_form_are_split() -> None:
    planted = with_singular_values([1.0, 1.0]).float()
    ranks = layer_ranks(Net(), [{"x": planted}], split_batch=lambda batch: ({"x": batch["x"]}, None))
    assert ranks["a"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "full"}, "kind must be one of numerical, stable, effective, got 'full'"),
        ({"rtol": 0.0}, r"rtol must lie in \(0, 1\), got 0.0"),
        ({"rtol": 1.0}, r"rtol must lie in \(0, 1\), got 1.0"),
        ({"n_max": 1}, "n_max must be a whole number >= 2, got 1"),
        ({"max_columns": 0}, "max_columns must be a whole number >= 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        numerical_rank(torch.rand(4, 3), **arguments)
    with pytest.raises(ValueError, match=message):
        layer_ranks(Net(), [], **arguments)


def test_features_without_a_rank_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least two samples, got shape \[1, 3\]"):
        numerical_rank(torch.rand(1, 3))
    with pytest.raises(ValueError, match="expected finite features"):
        numerical_rank(torch.tensor([[1.0], [math.nan]]))


def test_a_network_without_features_and_an_empty_loader_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a method features\(\*inputs\).*got a Linear"):
        layer_ranks(nn.Linear(3, 3), [(torch.rand(4, 3), None)])
    with pytest.raises(ValueError, match="the loader gave no batch"):
        layer_ranks(Net(), [])
