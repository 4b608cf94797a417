"""KL by Fisher information: its factors, the Hessian of the divergence, agreement with the divergence itself."""

from __future__ import annotations

import pytest
import torch
from channel_networks import network
from criteria_networks import cross_entropy, only
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_eff.models import SmallCNN
from lightning_eff.pruning.criteria import KL, KLFisher, importance
from lightning_eff.pruning.criteria.fisher import gaussian_factors, softmax_factors
from lightning_eff.surgery import ChannelGraph

EXACT = KLFisher(backwards=None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fisher(logits: Tensor) -> Tensor:
    """``diag(p) - p p^T`` for logits ``[B, K]``: float64 ``[B, K, K]``."""
    p = logits.double().softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def gram(factors: list[Tensor]) -> Tensor:
    return sum(v.double()[:, :, None] * v.double()[:, None, :] for v in factors)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 2000.0])  # equal classes ... all others underflow
def test_one_factor_for_each_class_but_one_gives_the_fisher_information_without_error(scale: float) -> None:
    logits = scale * torch.randn(4, 6, generator=generator()).double()
    factors = list(softmax_factors(logits, None, generator()))
    assert len(factors) == 5
    assert torch.allclose(gram(factors), fisher(logits), rtol=1e-9, atol=1e-12)


def test_small_probabilities_between_large_ones_keep_their_digits() -> None:
    logits = torch.tensor([[0.0, -1e-3, -92.0, -92.5, -300.0]]).double()
    assert torch.allclose(gram(list(softmax_factors(logits, None, generator()))), fisher(logits), rtol=1e-9, atol=1e-14)


def test_factors_put_together_with_random_signs_are_right_in_the_mean() -> None:
    logits = torch.randn(2, 6, generator=generator())
    drawn = generator(1)
    draws = [gram(list(softmax_factors(logits, 3, drawn))) for _ in range(1000)]
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 1000**0.5
    assert len(list(softmax_factors(logits, 3, drawn))) == 3
    assert bool(((mean - fisher(logits)).abs() <= 5 * error + 1e-12).all())  # five standard errors


def test_few_classes_take_no_more_passes_than_they_need() -> None:
    assert len(list(softmax_factors(torch.randn(3, 3), 5, generator()))) == 2
    assert len(list(gaussian_factors(torch.randn(3, 2), 5, generator()))) == 2
    assert len(list(softmax_factors(torch.randn(3, 1000), 4, generator()))) == 4


def toy() -> tuple[nn.Module, ChannelGraph, Tensor]:
    """A softmax over a linear map of five channels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x = torch.randn(7, 3).double()
    return model, ChannelGraph.from_model(model, x), x


def test_scores_are_half_the_diagonal_of_the_hessian_of_the_divergence() -> None:
    model, graph, x = toy()
    hidden = model[1](model[0](x)).detach()
    dense = model[2](hidden).log_softmax(1).detach()

    def divergence(gate: Tensor) -> Tensor:
        masked = model[2](hidden * gate).log_softmax(1)
        return nn.functional.kl_div(masked, dense, reduction="batchmean", log_target=True)

    hessian = torch.autograd.functional.hessian(divergence, torch.ones(5).double())
    scores = importance(model, graph, EXACT, [(x[:4], None), (x[4:], None)])["0"]
    assert torch.allclose(scores, 0.5 * hessian.diagonal(), rtol=1e-8)


@pytest.mark.parametrize(
    ("net", "name"),
    [
        ("ResNet-18", "layer2.0.conv2"),
        ("ViT", "encoder.layers.encoder_layer_0.mlp.0"),
        ("LeNet", "c3.0"),
    ],
)
def test_scores_are_the_expected_squares_of_derivatives_of_log_probabilities(net: str, name: str) -> None:
    """With the loss ``-sqrt(p_y) log p_y`` the Taylor criterion is ``p_y (d log p_y / d gate)^2``: class by class."""
    model, graph, x, _ = network(net, count=3)
    graph = only(graph, name)
    x = x[..., :16, :16] if net == "ResNet-18" else x
    roots = model(x).detach().softmax(1).sqrt()
    expected = torch.zeros(graph.groups[name].size, dtype=torch.float64)
    for y in range(roots.shape[1]):

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor], y: int = y) -> Tensor:
            return -(batch[1][:, y] * model(batch[0]).log_softmax(1)[:, y]).mean()

        expected += 0.5 * importance(model, graph, "taylor", [(x, roots)], loss)[name]
    scores = importance(model, graph, EXACT, [(x, None)])[name]
    assert torch.allclose(scores, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


def trained() -> tuple[nn.Module, ChannelGraph, list[tuple[Tensor, Tensor]]]:
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    torch.manual_seed(0)
    model = SmallCNN(width=8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for epoch in range(3):
        for rows in torch.randperm(1280, generator=generator(epoch)).split(64):
            loss = cross_entropy(model, (x[rows], y[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    assert (model(x[1280:]).argmax(1) == y[1280:]).double().mean() > 0.8
    batches = [(x[i : i + 100], y[i : i + 100]) for i in (1300, 1400)]
    return model, ChannelGraph.from_model(model, x[:2]), batches


def test_ranking_of_a_trained_network_is_that_of_the_divergence_itself() -> None:
    model, graph, batches = trained()
    exact = importance(model, graph, "kl", batches)
    fisher, quick = (importance(model, graph, criterion, batches) for criterion in (EXACT, KLFisher()))

    def agreement(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sorted(spearmanr(a[name], b[name]).statistic for name in graph.prunable)[len(graph.prunable) // 2]

    assert agreement(fisher, exact) > 0.75  # to remove a channel of eight is no small change
    assert agreement(quick, fisher) > 0.9


def test_gaussian_divergence_of_a_linear_reader_is_met_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    x = torch.randn(6, 3).double()
    graph = ChannelGraph.from_model(model, x)
    kl = importance(model, graph, KL(output="gaussian"), [(x, None)])["0"]
    second_order = importance(model, graph, KLFisher(backwards=None, output="gaussian"), [(x, None)])["0"]
    assert torch.allclose(kl, second_order, rtol=1e-8)


def test_images_as_outputs_are_added_up_with_random_signs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 1, 3, padding=1))
    x = torch.randn(64, 1, 8, 8)
    graph = ChannelGraph.from_model(model, x[:2])
    kl = importance(model, graph, KL(output="gaussian"), [(x, None)])["0"]
    scores = importance(model, graph, KLFisher(backwards=8, output="gaussian"), [(x, None)])["0"]
    # the mean of 64 x 8 squares of about normal numbers errs by sqrt(2 / 512) = 6 %; five of these
    assert torch.allclose(scores, kl, rtol=0.3)
    assert spearmanr(scores, kl).statistic > 0.9


def test_pixelwise_classes_are_added_up_with_random_signs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 3, padding=1))
    x = torch.randn(64, 1, 6, 6)
    graph = ChannelGraph.from_model(model, x[:2])
    drawn = torch.stack(
        [importance(model, graph, KLFisher(backwards=None, seed=seed), [(x, None)])["0"] for seed in range(20)]
    )
    kl = importance(model, graph, "kl", [(x, None)])["0"]
    # the logits are linear in a gate and small, so the divergence is nearly its second order
    assert torch.allclose(drawn.mean(0), kl, rtol=0.1)


def test_same_seed_same_scores() -> None:
    model, graph, x, _ = network("SmallCNN", count=4)
    one, again, other = (importance(model, graph, "kl_fisher", [(x, None)], seed=s)["layers.conv1"] for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_network_that_folds_its_batch_is_told_what_to_use() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.flatten(0, 1)).relu()).reshape(*x.shape[:2], -1).mean(1)

    model, x = Folded(), torch.randn(3, 7, 5)
    graph = ChannelGraph.from_model(model, x)
    with pytest.raises(ValueError, match=r'the first dimension there is not the batch.*use the criterion "kl"'):
        importance(model, graph, "kl_fisher", [(x, None)])


@pytest.mark.parametrize("backwards", [0, -1])
def test_fewer_than_one_pass_is_refused(backwards: int) -> None:
    with pytest.raises(ValueError, match=f"backwards must be a whole number >= 1, got {backwards}"):
        KLFisher(backwards=backwards)
