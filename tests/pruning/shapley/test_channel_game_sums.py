"""Sums over channels in the place of the layer that reads them give what the whole network gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from channel_networks import NETWORKS, coalitions, network, samples
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.models import LeNet
from lightning_eff.pruning import ChannelGame, GameOptions, NegativeLoss
from lightning_eff.shapley import CachedGame, ExactShapley
from lightning_eff.shapley.games import nested_coalitions
from lightning_eff.surgery import ChannelGraph

WAYS = {  # how each of NETWORKS is evaluated
    ("LeNet", "c1.0"): "DeltaBatch",
    ("LeNet", "c5"): "TailTables",
    ("ResNet-18", "layer2.0.conv1"): "DeltaBatch",
    ("MobileNetV2", "features.2.conv.0.0"): "DeltaBatch",  # read by a 1x1 convolution, behind the depthwise one
    ("concat-flatten", "b"): "DeltaBatch",
    ("concat-flatten", "c"): "DeltaBatch",
}


def game_of(
    model: nn.Module,
    x: Tensor,
    name: str,
    accelerate: Any = "auto",
    *,
    value: Any = "neg_loss",
    y: Tensor | None = None,
    groups: int = 2,
    **options: Any,
) -> ChannelGame:
    """A game on any network; by default with random labels."""
    if y is None:
        y = torch.randint(0, 3, (len(x),), generator=torch.Generator().manual_seed(1))
    graph = ChannelGraph.from_model(model, x[:2], check=False)
    chosen = GameOptions(accelerate=accelerate, **options)
    return ChannelGame(model.eval(), graph, name, samples(x, y, groups), value=value, options=chosen)


def pair(model: nn.Module, x: Tensor, name: str, **settings: Any) -> tuple[ChannelGame, ChannelGame]:
    return game_of(model, x, name, "auto", **settings), game_of(model, x, name, "off", **settings)


def along(start: Tensor, flips: Tensor) -> Tensor:
    rows = [start]
    for player in flips.tolist():
        rows.append(rows[-1].clone())
        rows[-1][player] = not rows[-1][player]
    return torch.stack(rows)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # float32 sums in another order


@pytest.fixture
def lenet() -> tuple[nn.Module, Tensor, Tensor]:
    model, _, inputs, labels = network("LeNet")
    return model, inputs, labels


@pytest.mark.parametrize(("name", "group"), NETWORKS)
def test_coalitions_walks_and_tours_are_worth_what_the_whole_network_says(name: str, group: str) -> None:
    model, _, inputs, labels = network(name)
    ours, off = pair(model, inputs, group, y=labels)
    assert ours._kind.__name__ == WAYS.get((name, group), "GatedBatch")
    n = ours.n_players
    some = torch.cat([coalitions(n), torch.zeros(1, n, dtype=torch.bool)])
    close(ours(some), off(some))
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(n, generator=generator)[:3] for _ in range(2)])
    for start in ("full", "empty"):
        first = torch.full((2, 1, n), start == "full")
        passed = torch.cat([first, nested_coalitions(orders, n, start)], 1)  # type: ignore[arg-type]
        by_group = torch.stack([off.call_group(g, passed.flatten(0, 1)).view(passed.shape[:2]) for g in range(2)])
        close(ours.walk(orders, start=start), by_group.mean(0))  # type: ignore[arg-type]
        for g in range(2):
            close(ours.walk_group(g, orders, start=start), by_group[g])  # type: ignore[arg-type]
    if hasattr(ours, "tour"):
        flips = torch.randint(0, n, (8,), generator=generator)
        close(ours.tour(some[-2], flips), off(along(some[-2], flips)))


@pytest.mark.parametrize("group", ["c1.0", "c3.0", "c5", "f6"])
def test_accuracies_are_equal(lenet: tuple[nn.Module, Tensor, Tensor], group: str) -> None:
    model, inputs, labels = lenet
    ours, off = pair(model, inputs, group, y=labels, value="accuracy")
    some = coalitions(ours.n_players, 30)
    assert torch.equal(ours(some), off(some))
    assert len(set(off(some).tolist())) > 2


def test_only_games_that_gain_by_neighbours_offer_a_tour(lenet: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, inputs, _ = lenet
    assert hasattr(game_of(model, inputs, "c1.0"), "tour")
    assert not hasattr(game_of(model, inputs, "c3.0"), "tour")  # a matrix product for any coalitions
    assert not hasattr(game_of(model, inputs, "c1.0", "prefix"), "tour")


@pytest.mark.parametrize("group", ["c1.0", "c3.0"])
def test_exact_values_are_those_of_brute_force(group: str) -> None:
    torch.manual_seed(0)
    model, x = LeNet(channels=(6, 7, 12, 8), image_size=16), torch.randn(10, 1, 16, 16)
    ours, off = pair(model, x, group)
    expected, got = ExactShapley().estimate(off), ExactShapley().estimate(ours)
    close(got.values, expected.values)
    assert float(got.efficiency_gap) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", ["accuracy", "neg_loss"])
@pytest.mark.parametrize("group", ["c1.0", "c3.0"])
def test_no_bit_depends_on_what_else_is_asked(lenet: tuple[nn.Module, Tensor, Tensor], group: str, value: Any) -> None:
    model, inputs, labels = lenet
    game = game_of(model, inputs, group, value=value, y=labels)
    some = torch.rand(300, game.n_players, generator=torch.Generator().manual_seed(0)) < 0.5
    together = game(some)
    assert torch.equal(game(some.flip(0)).flip(0), together)
    assert torch.equal(torch.cat([game(row[None]) for row in some[:40]]), together[:40])
    assert torch.equal(torch.cat([game(part) for part in some.split(70)]), together)
    orders = torch.stack([torch.randperm(game.n_players) for _ in range(5)])
    walks = game.walk(orders)
    assert torch.equal(torch.cat([game.walk(order[None]) for order in orders]), walks)
    assert torch.equal(walks[:, -1], game(torch.zeros(1, game.n_players, dtype=torch.bool)).expand(5))


def test_long_tours_do_not_drift(lenet: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, inputs, labels = lenet
    ours, off = pair(model, inputs[:4], "c1.0", y=labels[:4], groups=1)
    flips = torch.randint(0, 10, (1000,), generator=torch.Generator().manual_seed(0))
    start = torch.zeros(10, dtype=torch.bool)
    expected = off(along(start, flips)[-70:])
    close(ours.tour(start, flips)[-70:], expected)


@pytest.mark.parametrize("group", ["c1.0", "c3.0"])
def test_memory_is_kept_to_and_changes_no_value(group: str) -> None:
    torch.manual_seed(0)
    model, x = LeNet(), torch.randn(60, 1, 28, 28)
    model(x)
    off, *ours = (
        game_of(model, x, group, accelerate, max_memory_mb=size)
        for accelerate, size in (("off", 512), ("auto", 512), ("auto", 1), ("auto", 0))
    )
    n = off.n_players
    order = torch.randperm(n)[None]
    expected = off(coalitions(n)), off(nested_coalitions(order, n, "full")[0])
    for game, size in zip(ours, (512, 1, 0), strict=True):
        close(game(coalitions(n)), expected[0])
        close(game.walk(order)[0, 1:], expected[1])
        assert sum(e.nbytes for e in game._known.values()) <= size * 2**20
    assert [len(batches) > 1 for batches in ours[1]._batches] == [group == "c1.0"] * 2  # in pieces


class Twice(nn.Module):
    """The reader of ``a`` is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        return self.c(self.b(hidden).relu() + self.b(2 * hidden).relu())


class Tokens(nn.Module):
    """Linear layers on ``[B, T, F]``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).tanh().mean(1))


class Sideways(nn.Module):
    """Something else is added behind the reader, and the outputs are a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.skip = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.b(self.a(x).relu()) + self.skip(x), "other": x}


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str]] = {
    "called twice": (Twice, (4,), "a", "GatedBatch"),
    "tokens": (Tokens, (5, 4), "a", "DeltaBatch"),
    "one dimension": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 3, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(12, 3)
        ),
        (2, 10),
        "0",
        "DeltaBatch",
    ),
    "circular padding, dilated": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.Tanh(),
            nn.Conv2d(6, 4, 3, padding=2, dilation=2, padding_mode="circular", bias=False),
            nn.ReLU(inplace=True),  # writes to what the reader returned
            nn.Flatten(),
            nn.Linear(144, 3),
        ),
        (2, 8, 8),
        "0",
        "DeltaBatch",
    ),
    "double precision": (
        lambda: nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).double(),
        (4,),
        "0",
        "DeltaBatch",
    ),
    "double precision, linear tail": (
        lambda: nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.Linear(5, 3)).double(),
        (4,),
        "0",
        "TailTables",
    ),
    "linear up to a norm": (
        lambda: nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
        (4,),
        "0",
        "TailTables",
    ),
}


@pytest.mark.parametrize("removal", ["remove", "mean"])
@pytest.mark.parametrize("case", CASES)
def test_readers_of_every_kind(case: str, removal: str) -> None:
    torch.manual_seed(0)
    build, shape, name, way = CASES[case]
    model = build()
    x = torch.randn(9, *shape, dtype=next(model.parameters()).dtype)
    ours, off = pair(model, x, name, removal=removal)
    assert ours._kind.__name__ == way
    some = torch.cat([coalitions(ours.n_players), torch.zeros(1, ours.n_players, dtype=torch.bool)])
    close(ours(some), off(some))
    order = torch.randperm(ours.n_players)[None]
    close(ours.walk(order)[0, 1:], off(nested_coalitions(order, ours.n_players, "full")[0]))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.9), nn.Hardtanh(-1e3, 1e3), nn.Softplus()])
def test_activation_that_no_coalition_wakes_is_not_taken_for_linear(activation: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), activation, nn.Linear(5, 3))
    with torch.no_grad():
        model[1].bias += 50  # far from where the activation bends
    ours, off = pair(model, torch.randn(8, 4), "0")
    assert ours._kind.__name__ == "DeltaBatch"
    close(ours(coalitions(6)), off(coalitions(6)))


def test_logits_in_a_dict_and_other_paths_to_them() -> None:
    torch.manual_seed(0)
    ours, off = pair(Sideways(), torch.randn(8, 4), "a", value=NegativeLoss(output="logits"))
    assert ours._kind.__name__ == "TailTables"
    close(ours(coalitions(6)), off(coalitions(6)))


def test_value_of_your_own_sees_the_logits(lenet: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, inputs, labels = lenet

    def margin(outputs: Tensor, target: Tensor) -> Tensor:
        assert outputs.shape == (6, 10)
        return outputs.gather(1, target[:, None])[:, 0] - outputs.mean(1)

    ours, off = pair(model, inputs, "c3.0", y=labels, value=margin)
    assert ours._kind.__name__ == "TailTables"
    close(ours(coalitions(20)), off(coalitions(20)))


def test_labels_that_the_loss_ignores(lenet: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, inputs, labels = lenet
    labels = labels.clone()
    labels[::3] = -100
    ours, off = pair(model, inputs, "c3.0", y=labels)
    close(ours(coalitions(20)), off(coalitions(20)))


def test_ties_go_to_the_lowest_class() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))
    with torch.no_grad():
        model[2].weight[2] = model[2].weight[1]  # classes 1 and 2 always tie; all four when nobody is left
    x, y = torch.randn(40, 4), torch.arange(40) % 4
    ours, off = pair(model, x, "0", value="accuracy", y=y)
    assert ours._kind.__name__ == "TailTables"
    some = torch.cat([coalitions(6, 20), torch.zeros(1, 6, dtype=torch.bool)])
    assert torch.equal(ours(some), off(some))
    assert ours(some)[-1] == 0.25


def test_low_precision_keeps_sums_in_single(lenet: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, inputs, labels = lenet
    graph = ChannelGraph.from_model(model, inputs[:2])

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    given = samples(inputs, labels)
    low = ChannelGame(model, graph, "c1.0", given, value="neg_loss", autocast=autocast)
    exact = ChannelGame(model, graph, "c1.0", given, value="neg_loss", options=GameOptions(accelerate="off"))
    assert low._kind.__name__ == "DeltaBatch"
    order = torch.arange(10)[None]
    low_values, values = low.walk(order), exact.walk(order)
    torch.testing.assert_close(low_values, values, rtol=0.02, atol=0)  # bfloat16 has three digits
    assert not torch.allclose(low_values, values, rtol=1e-6)


class Squaring(nn.Conv2d):
    """Looks like a convolution and is none."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input**2 - input, weight, bias)


def test_reader_that_is_not_linear_is_found_out_and_the_network_is_run() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Tanh(), Squaring(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    hooked = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(8, 2, 8, 8)
    ours, off = pair(model, x, "0")
    close(ours(coalitions(6)), off(coalitions(6)))  # squares of single channels do add up
    hooked[2]._conv_forward = lambda x, weight, bias: F.conv2d(x, weight, bias) * (1 + x.mean())
    with pytest.warns(UserWarning, match=r"channels of 0 are not summed up: sums over its channels err by"):
        ours, off = pair(hooked, x, "0")
    close(ours.walk(torch.arange(6)[None])[0], off(torch.tril(torch.ones(7, 6, dtype=torch.bool), -1).flip(0, 1)))
    assert ours._kind.__name__ == "GatedBatch"


@pytest.mark.parametrize(
    ("name", "group", "options", "reason"),
    [
        ("ResNet-18", "layer2.0.conv2", {}, "3 layers read its channels"),
        ("grouped", "a", {}, "no plain convolution"),
        ("LeNet", "c1.0", {"removal": "pre_norm"}, "removed where they are produced"),
        ("LeNet", "c1.0", {"max_memory_mb": 0}, "does not hold a single sample"),
    ],
)
def test_delta_that_cannot_be_had_is_told(name: str, group: str, options: dict[str, Any], reason: str) -> None:
    model, _, inputs, labels = network(name)
    with pytest.warns(UserWarning, match=f"cannot be summed up: .*{reason}"):
        ours = game_of(model, inputs, group, "delta", y=labels, **options)
    off = game_of(model, inputs, group, "off", y=labels, **options)
    close(ours(coalitions(ours.n_players)), off(coalitions(ours.n_players)))


@pytest.mark.parametrize("group", ["c1.0", "c3.0"])
def test_network_and_random_numbers_are_as_they_were_also_when_interrupted(
    lenet: tuple[nn.Module, Tensor, Tensor], group: str
) -> None:
    model, inputs, labels = lenet
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = 0

    def interrupt(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return outputs.sum(1)

    graph = ChannelGraph.from_model(model, inputs[:2])
    torch.manual_seed(3)
    state = torch.get_rng_state()
    game = ChannelGame(model, graph, group, samples(inputs, labels), value=interrupt)
    with pytest.raises(KeyboardInterrupt):
        game.walk(torch.arange(10)[None])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.isfinite(game.walk(torch.arange(10)[None])).all()  # and goes on


class Hungry(nn.Module):
    """Runs out of memory on batches above a size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.most = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3), 1000

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"no room for {len(x)}")
        return self.c(self.b(self.a(x).relu()).relu())


def test_walks_in_halved_batches_are_the_same() -> None:
    torch.manual_seed(0)
    model, x, order = Hungry(), torch.randn(64, 4), torch.arange(6)[None]
    game = game_of(model, x, "a", groups=1)
    expected = game_of(model, x, "a", groups=1).walk(order)
    model.most = 20
    close(game.walk(order), expected)
    assert [len(inputs) for inputs, _ in game._batches[0]] == [16, 16, 16, 16]


def test_compiled_networks_are_summed_up_too(lenet: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, inputs, labels = lenet
    expected = game_of(model, inputs, "c1.0", "off", y=labels)(coalitions(10))
    graph = ChannelGraph.from_model(model, inputs[:2])
    compiled = torch.compile(model, backend="eager")
    model.c3[0].compile(backend="eager")
    game = ChannelGame(model, graph, "c1.0", samples(inputs, labels), value="neg_loss")
    assert game._kind.__name__ == "DeltaBatch"
    close(game(coalitions(10)), expected)
    assert torch.equal(compiled._orig_mod.c1[0].weight, model.c1[0].weight)


def test_quick_pooling_changes_no_bit_and_no_layout(lenet: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, inputs, labels = lenet
    prefix, off = (game_of(model, inputs, "c1.0", how, y=labels) for how in ("prefix", "off"))
    seen: list[bool] = []
    handle = model.c3[1].register_forward_hook(lambda module, args, output: seen.append(output.is_contiguous()))
    assert torch.equal(prefix(coalitions(10)), off(coalitions(10)))
    handle.remove()
    assert seen == [True] * len(seen) != []


# Cached values


def test_cached_values_of_the_same_game_are_taken(lenet: tuple[nn.Module, Tensor, Tensor], tmp_path: Any) -> None:
    model, inputs, labels = lenet
    first = game_of(model, inputs, "c3.0", y=labels)
    cached = CachedGame(first, first.fingerprint)
    values = cached(coalitions(20))
    cached.save(tmp_path / "values.npz")
    again = game_of(model, inputs, "c3.0", y=labels)
    loaded = CachedGame(again, again.fingerprint)
    loaded.load(tmp_path / "values.npz")
    assert torch.equal(loaded(coalitions(20)), values)
    assert loaded.misses == 0


@pytest.mark.parametrize("change", ["weights", "group", "value", "removal", "count", "inputs", "labels"])
def test_cached_values_of_another_game_are_refused(
    lenet: tuple[nn.Module, Tensor, Tensor], change: str, tmp_path: Any
) -> None:
    model, inputs, labels = lenet
    first = game_of(model, inputs, "c3.0", y=labels)
    cached = CachedGame(first, first.fingerprint)
    cached(coalitions(20))
    cached.save(tmp_path / "values.npz")
    options: dict[str, Any] = {}
    name = "c3.0"
    if change == "weights":
        with torch.no_grad():
            model.out.bias[0] += 1e-6
    elif change == "group":
        name = "c1.0"
    elif change == "value":
        options["value"] = "accuracy"
    elif change == "removal":
        options["removal"] = "mean"
    elif change == "count":
        inputs, labels = inputs[:-1], labels[:-1]
    elif change == "inputs":
        inputs = inputs + 1e-6
    else:
        labels = labels.flip(0)
    other = game_of(model, inputs, name, y=labels, **options)
    with pytest.raises(ValueError, match="another game"):
        CachedGame(other, other.fingerprint).load(tmp_path / "values.npz")
