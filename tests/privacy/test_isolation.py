"""Losses and layers that mix samples are found; those that do not are let through."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_eff.privacy.isolation import check_sample_isolation


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator), torch.arange(n) % 3


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), *layers, nn.Linear(8, 3))


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def weighted(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1], weight=torch.tensor([1.0, 5.0, 0.2]))


def with_ignored(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1], ignore_index=2)


def contrastive(module: nn.Module, batch: Any) -> Tensor:
    features = functional.normalize(module(batch[0]))
    return functional.cross_entropy(features @ features.T, torch.arange(len(features)))


def mixed_up(module: nn.Module, batch: Any) -> Tensor:
    mixed = (batch[0] + batch[0].flip(0)) / 2
    return functional.cross_entropy(module(mixed), batch[1])


def test_plain_mean_is_isolated_and_says_so() -> None:
    report = check_sample_isolation(network(), cross_entropy, batch())
    assert report.isolated
    assert report.outcome == "each of 6 samples has the gradient it has alone"
    assert max(report.differences) < 1e-5


@pytest.mark.parametrize("loss", [weighted, with_ignored, contrastive, mixed_up])
@pytest.mark.filterwarnings("ignore:a per-sample gradient is not finite")
def test_losses_that_mix_examples_are_found(loss: Callable[[nn.Module, Any], Tensor]) -> None:
    report = check_sample_isolation(network(), loss, batch())
    assert not report.isolated
    assert "depends on the other samples" in report.outcome


def test_a_sum_is_told_from_other_mixing_and_class_weights_get_the_code_that_works() -> None:
    def summed(module: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(module(batch[0]), batch[1], reduction="sum")

    def advised(module: nn.Module, batch: Any) -> Tensor:
        weights = torch.tensor([1.0, 5.0, 0.2])
        return functional.cross_entropy(module(batch[0]), batch[1], weight=weights, reduction="none").mean()

    told = str(check_sample_isolation(network(), summed, batch()))
    assert "inside of a batch of 6 is 6 times its gradient alone: this looks like a sum over the samples" in told
    told = str(check_sample_isolation(network(), weighted, batch()))
    assert 'F.cross_entropy(outputs, targets, weight=w, reduction="none").mean()' in told
    assert "sum over" not in told
    assert check_sample_isolation(network(), advised, batch()).isolated


@pytest.mark.filterwarnings("ignore:a per-sample gradient is not finite")
@pytest.mark.parametrize("change", [lambda x: x, lambda x: x + 0.1 * torch.randn_like(x)])
def test_an_example_that_is_not_finite_does_not_look_like_dependence(change: Callable[[Tensor], Tensor]) -> None:
    x, y = batch()
    x[2] = float("nan")
    model = network(Augmented(change))
    assert check_sample_isolation(model, cross_entropy, (x, y)).isolated
    assert not check_sample_isolation(model, weighted, (x, y)).isolated


def test_weighted_mean_has_the_ratio_that_its_weights_give() -> None:
    # inside, a sample of class c counts w_c / mean(w) times; mean over two samples each of 1, 5 and 0.2
    report = check_sample_isolation(network(), weighted, batch())
    assert report.inside[1] / report.alone[1] == pytest.approx(5 / (6.2 / 3), rel=1e-4)


def test_gradients_of_equal_norm_in_another_direction_are_found() -> None:
    def turned(module: nn.Module, batch: Any) -> Tensor:
        # alone, the gradient turns round: norms stay, directions do not
        sign = 1.0 if len(batch[0]) > 1 else -1.0
        return sign * module(batch[0]).mean(0).sum()

    report = check_sample_isolation(network(), turned, batch())
    assert max(report.differences) < 1e-5
    assert not report.isolated


def test_sequence_first_layer_is_found_where_positions_pass_for_examples() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.view(len(x), 2, 2).repeat(1, 3, 1).transpose(0, 1)).tanh().mean(0)

    assert not check_sample_isolation(SequenceFirst(), cross_entropy, batch()).isolated


def test_dropout_does_not_look_like_dependence() -> None:
    model = network(nn.Dropout(0.5), nn.Unflatten(1, (2, 4)), nn.TransformerEncoderLayer(4, 2, 8, 0.3), nn.Flatten())
    model[4] = nn.TransformerEncoderLayer(4, 2, 8, 0.3, batch_first=True)
    report = check_sample_isolation(model, cross_entropy, batch())
    assert report.isolated
    assert model.training
    assert model[2].training


class Augmented(nn.Module):
    """Changes its input where it trains."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x) if self.training else x


def permuted(x: Tensor) -> Tensor:
    return 0.8 * x + 0.2 * x[torch.randperm(len(x))]


def permuted_by_numpy(x: Tensor) -> Tensor:
    return 0.8 * x + 0.2 * x[np.random.permutation(len(x))]


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) * (1 + 0.1 * torch.rand(()))


def sometimes_permuted(x: Tensor) -> Tensor:
    return permuted(x) if torch.rand(()) < 0.5 else x


def test_noise_for_each_example_does_not_look_like_dependence() -> None:
    report = check_sample_isolation(network(Augmented(lambda x: x + torch.randn_like(x))), cross_entropy, batch())
    assert report.isolated
    assert report.outcome == "each of 6 samples keeps its gradient among other neighbours"


@pytest.mark.parametrize("change", [permuted, permuted_by_numpy, standardised, sometimes_permuted])
@pytest.mark.parametrize("n", [3, 12])
def test_examples_that_are_mixed_at_random_while_training_are_found(change: Callable[[Tensor], Tensor], n: int) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    report = check_sample_isolation(network(Augmented(change)), cross_entropy, batch(n))
    assert not report.isolated
    assert not report.random
    assert "depends on the other samples" in report.outcome


@pytest.mark.parametrize("loss", [weighted, with_ignored, contrastive, mixed_up])
@pytest.mark.filterwarnings("ignore:a per-sample gradient is not finite")
def test_losses_that_mix_examples_are_found_behind_noise_too(loss: Callable[[nn.Module, Any], Tensor]) -> None:
    model = network(Augmented(lambda x: x + 0.1 * torch.randn_like(x)))
    assert not check_sample_isolation(model, loss, batch(9)).isolated


@pytest.mark.parametrize("scale", [lambda n: n, lambda n: 1 / n])
def test_a_loss_that_grows_with_the_batch_is_found_behind_noise_too(scale: Callable[[int], float]) -> None:
    model = network(Augmented(lambda x: x + 0.1 * torch.randn_like(x)))

    def scaled(module: nn.Module, batch: Any) -> Tensor:
        return scale(len(batch[0])) * cross_entropy(module, batch)

    assert not check_sample_isolation(model, scaled, batch(12)).isolated
    assert check_sample_isolation(model, cross_entropy, batch(12)).isolated


def test_numbers_that_are_drawn_and_not_used_leave_the_comparison_exact() -> None:
    def drawing(module: nn.Module, batch: Any) -> Tensor:
        torch.rand(())
        return len(batch[0]) ** 0.01 * cross_entropy(module, batch)

    assert not check_sample_isolation(network(), drawing, batch()).isolated


def test_a_step_with_a_generator_of_its_own_cannot_be_judged() -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(module: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(module, (batch[0] + torch.randn(batch[0].shape, generator=generator), batch[1]))

    report = check_sample_isolation(network(), noisy, batch())
    assert report.random
    assert not report.isolated
    assert "every time it runs" in report.outcome


def test_a_step_that_fails_for_one_example_is_told() -> None:
    def paired(module: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(module, (batch[0] + batch[0][1], batch[1]))

    with pytest.raises(ValueError, match="works for 6 samples and fails for one: index 1 is out of bounds"):
        check_sample_isolation(network(), paired, batch())


def test_batch_statistics_are_refused_with_both_ways_out() -> None:
    with pytest.raises(ValueError, match=r"(?s)eval\(\).*GroupNorm"):
        check_sample_isolation(network(nn.BatchNorm1d(8)), cross_entropy, batch())
    assert check_sample_isolation(network(nn.BatchNorm1d(8).eval()), cross_entropy, batch()).isolated


def test_one_example_is_too_few() -> None:
    with pytest.raises(ValueError, match="at least two samples"):
        check_sample_isolation(network(), cross_entropy, batch(1))


def test_rounding_of_autocast_passes_and_weights_are_still_found() -> None:
    def narrow(loss: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
        def step(module: nn.Module, batch: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss(module, batch)

        return step

    assert check_sample_isolation(network(), narrow(cross_entropy), batch()).isolated
    assert not check_sample_isolation(network(), narrow(weighted), batch()).isolated


def test_nothing_is_left_behind() -> None:
    model = network(nn.Dropout())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check_sample_isolation(model, cross_entropy, batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
