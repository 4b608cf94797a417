"""Learning the importance of channels without a Trainer: what ranks first, what stays untouched, what is refused."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.pruning import PUBLISHED, DirichletOptions, Draws, Gate, Prior, dirichlet, dirichlet_scores
from lightning_eff.pruning.dirichlet.data import Data, Likelihood
from lightning_eff.pruning.dirichlet.scoring import SwitchTraining, _Settling
from lightning_eff.pruning.dirichlet.switches import EPSILON, Switches
from lightning_eff.surgery import ChannelGraph

Batch = tuple[Tensor, Tensor]
QUICK = DirichletOptions(prior=Prior(weight=0.0))
BOLD = replace(QUICK, lr=0.1)  # moves far enough in a few batches


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Planted(nn.Module):
    """Eight channels, of which the next layer reads two; norm, dropout and a second layer around them."""

    def __init__(self, useful: Sequence[int] = (0, 3)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.read = nn.Conv2d(8, 12, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, 4)
        useless = [c for c in range(8) if c not in useful]
        with torch.no_grad():
            self.read.weight[:, useless] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.read(F.relu(self.norm(self.conv(x)))))).mean((2, 3)))


def voters(useful: Sequence[int], dead: int | None = None) -> tuple[nn.Module, ChannelGraph, list[Batch]]:
    """Eight channels; each useful one speaks for one class, so all of them matter alike and the others not at all."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, len(useful)))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
        model[0].bias.zero_()
        model[2].weight.zero_()
        model[2].bias.zero_()
        model[2].weight[range(len(useful)), list(useful)] = 4
        if dead is not None:
            model[0].weight[dead] = 0
            model[2].weight[:, dead] = torch.randn(len(useful), generator=torch.Generator().manual_seed(0))
    x = torch.randn(960, 8, generator=torch.Generator().manual_seed(2))
    data = list(zip(x.split(32), model(x).argmax(1).split(32), strict=True))
    return model, ChannelGraph.from_model(model, x[:2]), data


def batches(model: nn.Module, count: int = 20, size: int = 16, shape: Sequence[int] = (1, 6, 6)) -> list[Batch]:
    """Random images and labels that the model itself gives them, or no channel would matter."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * size, *shape, generator=generator)
    with torch.no_grad():
        model.train()(x)
        y = (model.eval()(x) - model(x).mean(0)).argmax(1)
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.fixture
def planted() -> tuple[nn.Module, ChannelGraph, list[Batch]]:
    model = Planted()
    with torch.no_grad():
        model.head.weight *= 20  # sure of itself, as a trained network is
    data = batches(model)
    with torch.no_grad():
        model.head.bias -= model(data[0][0]).mean(0)
    return model, ChannelGraph.from_model(model, data[0][0]), data


def by_hand(model: nn.Module, graph: ChannelGraph, data: list[Batch], options: DirichletOptions) -> dict[str, Tensor]:
    """The algorithm as the paper tells it: one run per layer, whole forward passes; means only."""
    found = {}
    for name in graph.prunable:
        theta = torch.full((graph.sizes[name],), options.init, requires_grad=True)
        optimizer = torch.optim.Adam([theta], options.lr)
        for x, y in data:
            phi = F.softplus(theta) + EPSILON
            with graph.gate(model, {name: phi / phi.sum()}, site=options.gate.site):
                loss = F.cross_entropy(model(x), y)
            prior = torch.distributions.Dirichlet(torch.full_like(phi, options.prior.alpha0))
            kl = torch.distributions.kl_divergence(torch.distributions.Dirichlet(phi), prior)
            loss = loss + options.prior.weight * kl / sum(len(y) for _, y in data)
            (theta.grad,) = torch.autograd.grad(loss, theta)
            optimizer.step()
        found[name] = F.softplus(theta.detach()) + EPSILON
    return found


@pytest.mark.parametrize("site", ["consumer", "producer"])
def test_one_pass_for_all_layers_equals_one_run_per_layer(planted: Any, site: Any) -> None:
    model, graph, data = planted
    options = DirichletOptions(gate=Gate(site=site))
    found = dirichlet_scores(model, graph, data, cross_entropy, options=options, progress=False)
    assert set(found) == {"conv", "read"}
    for name, phi in by_hand(model, graph, data, options).items():
        torch.testing.assert_close(found[name].concentration, phi, rtol=0, atol=1e-6)


def test_layers_scored_alone_and_together_are_equal(planted: Any) -> None:
    model, graph, data = planted
    together = dirichlet_scores(model, graph, data, cross_entropy, progress=False)
    for name in graph.prunable:
        others = {other: "not now" for other in graph.prunable if other != name}
        alone = dirichlet_scores(model, graph.protect(others), data, cross_entropy, progress=False)
        torch.testing.assert_close(alone[name].concentration, together[name].concentration, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [QUICK, replace(QUICK, estimator="sample"), DirichletOptions(layers="joint")],
    ids=["mean", "sample", "joint"],
)
def test_channels_that_are_read_rank_first(options: DirichletOptions, seed: int) -> None:
    model, graph, data = voters((0, 3))
    found = dirichlet_scores(model, graph, data, cross_entropy, options=options, seed=seed, progress=False)
    assert set(found["0"].rank()[:2]) == {0, 3}


def test_scores_are_permuted_with_the_channels(planted: Any) -> None:
    model, graph, data = planted
    order = torch.tensor([5, 2, 7, 0, 3, 1, 6, 4])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.conv.weight.copy_(model.conv.weight[order])
        other.conv.bias.copy_(model.conv.bias[order])
        other.read.weight.copy_(model.read.weight[:, order])
        for name, value in model.norm.state_dict().items():
            if value.ndim:
                other.norm.state_dict()[name].copy_(value[order])
    first, second = (dirichlet_scores(m, graph, data, cross_entropy, progress=False)["conv"] for m in (model, other))
    torch.testing.assert_close(second.concentration, first.concentration[order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["mean", "sample"])
def test_dead_channel_gets_the_lowest_score(estimator: Any) -> None:
    model, graph, data = voters((0, 1, 2, 3, 4, 6, 7), dead=5)
    options = replace(QUICK, estimator=estimator)
    phi = dirichlet_scores(model, graph, data, cross_entropy, options=options, progress=False)["0"].concentration
    others = torch.cat([phi[:5], phi[6:]])
    assert phi[5] < others.min()


def everything(model: nn.Module) -> list[Any]:
    """Weights, buffers, flags, hooks, and the state of every random generator."""
    tensors = [value.clone() for value in model.state_dict().values()]
    flags = [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules()]
    gradients = [p.grad for p in model.parameters()]
    return [*tensors, torch.get_rng_state(), flags, hooks, gradients, random.getstate(), str(np.random.get_state())]


def assert_unchanged(before: list[Any], model: nn.Module) -> None:
    for old, new in zip(before, everything(model), strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new


@pytest.mark.parametrize(
    "options",
    [
        QUICK,
        replace(QUICK, estimator="sample"),
        replace(QUICK, layers="joint"),
        replace(QUICK, gate=Gate(site="producer", train_bn=True)),
        replace(QUICK, estimator="sample", draws=Draws(2, "batch", "logits")),
    ],
    ids=["mean", "sample", "joint", "train_bn", "logits"],
)
def test_model_and_generators_are_bit_for_bit_the_same_afterwards(planted: Any, options: DirichletOptions) -> None:
    model, graph, data = planted
    model.train()
    model.norm.eval()
    model.conv.requires_grad_(False)
    before = everything(model)
    loader = DataLoader(TensorDataset(*map(torch.cat, zip(*data, strict=True))), 32, shuffle=True)
    dirichlet_scores(model, graph, loader, cross_entropy, options=options, progress=False)
    assert_unchanged(before, model)


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_model_is_the_same_after_a_break_too(planted: Any, error: type[BaseException]) -> None:
    model, graph, data = planted
    model.train()
    before = everything(model)
    calls = []

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        if len(calls) == 40:
            torch.rand(3)
            raise error
        return cross_entropy(net, batch)

    with pytest.raises(error):
        dirichlet_scores(model, graph, data, loss, progress=False)
    assert_unchanged(before, model)


def test_what_a_loss_piles_up_in_modules_is_taken_back(planted: Any) -> None:
    model, graph, data = planted
    model.seen, model.total = ["before"], torch.tensor(1.0)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        value = cross_entropy(net, batch)
        net.seen.append(1)
        net.total += 1
        net.new = 3
        with torch.no_grad():
            net.head.bias += 0.1
        return value

    before = everything(model)
    dirichlet_scores(model, graph, data[:2], loss, progress=False)
    assert_unchanged(before, model)
    assert (model.seen, float(model.total), hasattr(model, "new")) == (["before"], 1.0, False)


def test_same_seed_gives_the_same_scores_and_another_one_others(planted: Any) -> None:
    model, graph, data = planted
    options = replace(QUICK, estimator="sample")
    first, second, other = (
        dirichlet_scores(model, graph, data, cross_entropy, options=options, seed=seed, progress=False)["read"]
        for seed in (3, 3, 4)
    )
    assert torch.equal(first.concentration, second.concentration)
    assert not torch.equal(first.concentration, other.concentration)


def test_strong_prior_wins_and_is_told(planted: Any) -> None:
    model, graph, data = planted
    options = DirichletOptions(prior=Prior(weight=1e6), epochs=8)
    with pytest.warns(UserWarning, match="equal within 1 %, so they say nothing"):
        found = dirichlet_scores(model, graph, data, cross_entropy, options=options, progress=False)
    for posterior in found.values():
        torch.testing.assert_close(posterior.concentration, torch.full_like(posterior.mean, 0.5), rtol=0, atol=5e-3)


def test_prior_does_not_matter_without_weight(planted: Any) -> None:
    model, graph, data = planted
    first, second = (
        dirichlet_scores(
            model,
            graph,
            data[:5],
            cross_entropy,
            options=replace(QUICK, prior=Prior(alpha0, weight=0.0)),
            progress=False,
        )["conv"].concentration
        for alpha0 in (0.1, 2.0)
    )
    assert torch.equal(first, second)


def test_annealed_prior_counts_less_at_first(planted: Any) -> None:
    model, graph, data = planted
    training = {
        anneal: SwitchTraining(
            Likelihood(model, lambda batch, index: cross_entropy(model, batch), model),
            graph,
            Data(lambda: data, len(data), 320),
            DirichletOptions(prior=Prior(anneal_epochs=anneal)),
        )
        for anneal in (0.0, 2.0)
    }
    assert training[0.0]._kl_weight(0, 0) == 1 / 320
    assert [training[2.0]._kl_weight(*at) * 320 for at in ((0, 0), (0, 10), (1, 0), (2, 0), (3, 5))] == pytest.approx(
        [0, 0.25, 0.5, 1, 1]
    )


def test_gates_of_size_one_on_average_change_the_result(planted: Any) -> None:
    model, graph, data = planted
    plain, scaled = (
        dirichlet_scores(model, graph, data, cross_entropy, options=replace(QUICK, gate=Gate(scale=s)), progress=False)[
            "read"
        ]
        for s in (1.0, "dim")
    )
    assert not torch.allclose(plain.concentration, scaled.concentration, atol=1e-3)
    same = dirichlet_scores(
        model, graph, data, cross_entropy, options=replace(QUICK, gate=Gate(scale=12)), progress=False
    )
    assert torch.equal(same["read"].concentration, scaled.concentration)


def test_mean_of_the_outputs_of_several_draws_is_what_the_loss_sees(planted: Any) -> None:
    model, graph, data = planted
    outputs: list[Tensor] = []

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        outputs.append(net(batch[0]).detach())
        return F.cross_entropy(net(batch[0]), batch[1])

    passes: list[Tensor] = []
    handle = model.head.register_forward_hook(lambda module, args, output: passes.append(output.detach()))
    options = replace(QUICK, estimator="sample", draws=Draws(3, average="logits"), max_batches=1)
    dirichlet_scores(model, graph, data, loss, options=options, progress=False)
    handle.remove()
    # the first pass is without switches (once for each call in the loss), then three draws for each call
    torch.testing.assert_close(outputs[1], torch.stack(passes[2:5]).mean(0))


def test_averaged_logits_need_a_loss_that_calls_the_model(planted: Any) -> None:
    model, graph, data = planted
    options = replace(QUICK, estimator="sample", draws=Draws(2, average="logits"))
    with pytest.raises(ValueError, match='average="logits" needs a loss that calls the model'):
        dirichlet_scores(model, graph, data, lambda net, b: net.head.weight.sum(), options=options, progress=False)


def test_loss_of_several_draws_is_averaged(planted: Any) -> None:
    model, graph, data = planted
    options = replace(QUICK, estimator="sample", optimizer="sgd", lr=30.0)
    few, many = (
        torch.stack(
            [
                dirichlet_scores(
                    model, graph, data[:1], cross_entropy,
                    options=replace(options, draws=Draws(k, "batch")),
                    seed=seed, progress=False,
                )["read"].concentration
                for seed in range(12)
            ]
        )
        for k in (1, 8)
    )  # fmt: skip
    assert many.var(0).sum() < 0.5 * few.var(0).sum()  # about an eighth


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_options_run(planted: Any, name: str) -> None:
    model, graph, data = planted
    published = PUBLISHED[name]
    draws = replace(published.draws, number=min(2, published.draws.number))
    options = replace(published, draws=draws, epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*equal within 1 %.*")  # three batches teach little
        found = dirichlet_scores(model, graph, data[:3], cross_entropy, options=options, progress=False)
    assert all(bool(posterior.concentration.isfinite().all()) for posterior in found.values())


UNTRAINED = pytest.mark.filterwarnings("ignore:the loss .* is that of guessing")


@UNTRAINED
def test_dict_batches_and_several_inputs_work() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(3, 8), nn.Linear(8, 4)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.out(F.relu(self.a(left)) + F.relu(self.b(right)))

    model = Two()
    data = [
        {"left": torch.randn(8, 5), "right": torch.randn(8, 3), "y": torch.randint(0, 4, (8,)), "id": "x"}
        for _ in range(3)
    ]
    graph = ChannelGraph.from_model(model, {"left": data[0]["left"], "right": data[0]["right"]})
    found = dirichlet_scores(
        model, graph, data, lambda net, b: F.cross_entropy(net(b["left"], b["right"]), b["y"]), progress=False
    )
    assert list(found) == ["a"]  # produced by both, read together
    assert len(found["a"].mean) == 8


@pytest.mark.parametrize("limit", [3, 0.15])
def test_passes_stop_at_the_largest_number_of_batches(planted: Any, limit: Any) -> None:
    model, graph, data = planted
    seen = []

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        seen.append(float(batch[0].sum()))
        return cross_entropy(net, batch)

    options = replace(QUICK, max_batches=limit, layers="joint")
    dirichlet_scores(model, graph, data, loss, options=options, progress=False)
    assert len(set(seen)) == 3


def test_loader_without_a_length_needs_the_size_of_the_data(planted: Any) -> None:
    model, graph, data = planted

    class Stream:
        def __iter__(self) -> Any:
            return iter(data[:4])

    with pytest.raises(ValueError, match=r"give Prior\(dataset_size=...\), or Prior\(weight=0\)"):
        dirichlet_scores(model, graph, Stream(), cross_entropy, progress=False)
    with pytest.raises(ValueError, match=r"max_batches=0.5 is a fraction"):
        dirichlet_scores(model, graph, Stream(), cross_entropy, options=replace(QUICK, max_batches=0.5), progress=False)
    options = DirichletOptions(prior=Prior(dataset_size=64))
    found = dirichlet_scores(model, graph, Stream(), cross_entropy, options=options, progress=False)
    expected = dirichlet_scores(model, graph, data[:4], cross_entropy, progress=False)
    assert torch.equal(found["conv"].concentration, expected["conv"].concentration)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_loss_that_is_no_number_stops_with_layer_and_batch(planted: Any, value: float) -> None:
    model, graph, data = planted
    before = everything(model)
    data[2][0][0, 0, 0, 0] = value
    with pytest.raises(FloatingPointError, match=r"switches on conv is nan, .* in batch 2: nothing was pruned"):
        dirichlet_scores(model, graph, data, cross_entropy, progress=False)
    assert_unchanged(before, model)


def test_empty_loader_is_refused(planted: Any) -> None:
    model, graph, _ = planted
    with pytest.raises(ValueError, match="the loader gave no batch"):
        dirichlet_scores(model, graph, [], cross_entropy, options=QUICK, progress=False)


def test_nothing_to_prune_is_refused_with_reasons(planted: Any) -> None:
    model, graph, data = planted
    none = graph.protect(dict.fromkeys(graph.groups, "wanted whole"))
    with pytest.raises(ValueError, match=r"there is nothing to prune in the network: .*wanted whole"):
        dirichlet_scores(model, none, data, cross_entropy, progress=False)


@UNTRAINED
def test_group_of_one_channel_is_skipped() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    data = [(torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,))) for _ in range(2)]
    graph = ChannelGraph.from_model(model, data[0][0])
    assert list(dirichlet_scores(model, graph, data, cross_entropy, options=BOLD, progress=False)) == ["2"]


@pytest.mark.parametrize("count", [1, 4, 6])
def test_untrained_network_is_told(count: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10))
    data = [(torch.randn(64, 6), torch.randint(0, 10, (64,))) for _ in range(count)]
    graph = ChannelGraph.from_model(model, data[0][0])
    with pytest.warns(UserWarning, match="guessing among 10 classes: scores of an untrained network mean little"):
        dirichlet_scores(model, graph, data, cross_entropy, options=replace(QUICK, lr=0.1), progress=False)


def test_draws_per_example_need_the_batch_first() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x.transpose(0, 1)))).mean(0)

    model = TimeFirst()
    data = [(torch.randn(6, 5, 3), torch.randint(0, 4, (6,))) for _ in range(2)]
    graph = ChannelGraph.from_model(model, data[0][0])
    options = replace(QUICK, estimator="sample")
    with pytest.raises(ValueError, match=r'not the first dimension .* use Draws\(scope="batch"\)'):
        dirichlet_scores(model, graph, data, cross_entropy, options=options, progress=False)
    dirichlet_scores(
        model, graph, data, cross_entropy, options=replace(options, draws=Draws(scope="batch")), progress=False
    )


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda net, b: F.cross_entropy(net(b[0]), b[1], reduction="none"), "expected the loss of a batch, one number"),
        (lambda net, b: None, "got None: give loss_fn"),
        (
            lambda net, b: cross_entropy(net, b).detach(),
            "does not depend on the channels of conv, read, or is detached",
        ),
    ],
)
def test_losses_that_cannot_serve_are_refused(planted: Any, loss: Callable[..., Any], message: str) -> None:
    model, graph, data = planted
    with pytest.raises(ValueError, match=message):
        dirichlet_scores(model, graph, data, loss, options=replace(QUICK, layers="joint"), progress=False)


@UNTRAINED
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit"])
def test_reference_networks_are_scored(name: str) -> None:
    import torchvision

    torch.manual_seed(0)
    if name == "vit":
        model: nn.Module = torchvision.models.VisionTransformer(
            image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=4
        )
        torch.nn.init.normal_(model.heads.head.weight, std=0.5)  # zero in torchvision: nothing would matter
    elif name == "resnet18":
        model = torchvision.models.ResNet(
            torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4, width_per_group=64
        )
    else:
        model = torchvision.models.mobilenet_v2(num_classes=4, width_mult=0.25)
    size = 16 if name == "vit" else 32
    data = batches(model, 2, 8, (3, size, size))
    exclude = ["conv_proj"] if name == "vit" else []
    graph = ChannelGraph.from_model(model, data[0][0][:2], exclude=exclude)
    chosen = graph.prunable[::6] if name == "mobilenet_v2" else graph.prunable
    graph = graph.protect({other: "to save time" for other in graph.prunable if other not in chosen})
    before = everything(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*equal within 1 %.*")  # two batches teach little
        found = dirichlet_scores(model, graph, data, cross_entropy, progress=False)
    assert_unchanged(before, model)
    assert list(found) == list(chosen)
    for group, phi in by_hand(model, graph, data, DirichletOptions()).items():
        torch.testing.assert_close(found[group].concentration, phi, rtol=0, atol=1e-4)


def test_early_stop_ends_once_two_looks_see_the_same_ranking() -> None:
    model, graph, data = voters((0, 3))
    seen: list[int] = []

    def counting(network: nn.Module, batch: Batch) -> Tensor:
        seen.append(1)
        return cross_entropy(network, batch)

    whole = dirichlet_scores(model, graph, data, counting, options=BOLD, progress=False)
    runs = len(seen)
    seen.clear()
    early = dirichlet_scores(model, graph, data, counting, options=replace(BOLD, early_stop=True), progress=False)
    assert len(seen) < runs / 2
    assert set(early["0"].rank()[:2]) == set(whole["0"].rank()[:2]) == {0, 3}


def test_early_stop_does_not_end_while_rankings_change() -> None:
    switches = Switches({"a": 4, "b": 4}, QUICK)
    settling = _Settling()
    orders = ([0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 3, 2], [0, 1, 3, 2], [0, 1, 3, 2])
    found = []
    for order in orders:
        with torch.no_grad():
            switches.theta["a"].copy_(torch.tensor(order))
            switches.theta["b"].copy_(torch.arange(4))
        found.append(settling.settled(switches))
    assert found == [False, False, False, False, True]


def test_mathematics_runs_without_lightning() -> None:
    folder = Path(dirichlet.__file__).parent
    for name in ("data", "gradients", "memory", "options", "posterior", "scoring", "switches"):
        imports = [line for line in (folder / f"{name}.py").read_text().splitlines() if "import" in line]
        assert imports
        assert not any(line.startswith(("from lightning.", "import lightning ")) for line in imports), name


def test_annealing_needs_to_know_how_long_a_pass_is(planted: Any) -> None:
    model, graph, data = planted
    options = DirichletOptions(prior=Prior(anneal_epochs=1.0, dataset_size=320))
    with pytest.raises(ValueError, match="the loader has no length: give max_batches"):
        dirichlet_scores(model, graph, iter(data), cross_entropy, options=options, progress=False)


def test_history_of_a_loader_without_length_has_its_last_batch(planted: Any) -> None:
    model, graph, data = planted
    likelihood = Likelihood(model, lambda batch, number: cross_entropy(model, batch), model)
    options = replace(QUICK, epochs=2)
    training = SwitchTraining(likelihood, graph, Data(lambda: iter(data[:7])), options)
    training.run()
    assert sorted({row[0] for row in training.history}) == [7, 14]


@UNTRAINED
def test_batches_with_words_in_them_are_scored() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    data = [{"x": torch.randn(16, 6), "y": torch.randint(0, 4, (16,)), "words": ["a"] * 16} for _ in range(3)]
    graph = ChannelGraph.from_model(model, data[0]["x"])

    def loss(net: nn.Module, batch: dict[str, Any]) -> Tensor:
        assert len(batch["words"]) == len(batch["x"])
        return F.cross_entropy(net(batch["x"]), batch["y"])

    options = replace(QUICK, lr=0.1)
    found = dirichlet_scores(model, graph, data, loss, options=options, progress=False)["0"]
    plain = [(batch["x"], batch["y"]) for batch in data]
    expected = dirichlet_scores(model, graph, plain, cross_entropy, options=options, progress=False)["0"]
    assert torch.equal(found.concentration, expected.concentration)
