"""Answering calls that no gate reaches from a tape gives what an ordinary run gives, whatever ``forward`` does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import NETWORKS, build
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lightning_eff.batch import call_model
from lightning_eff.surgery import ChannelGraph, Gates, PrefixCache
from lightning_eff.surgery.prefix import tape_bytes

CONV = {"kernel_size": 3, "padding": 1}


class Cached:
    """A network with one gated group, its cache and a second batch."""

    def __init__(self, model: nn.Module, x: Tensor, group: str, graph: ChannelGraph | None = None) -> None:
        self.model, self.x = model.eval(), x
        self.graph = graph or ChannelGraph.from_model(model, x)
        self.group = self.graph.resolve(group)
        self.other = x.flip(0).flip(-1) * 0.5
        self.gates = Gates(self.graph.groups, model, {self.group.name: torch.ones(self.group.size)})
        with self.gates:
            self.cache = PrefixCache(
                model,
                self.run(x),
                self.gates,
                self.group.name,
                self.group.size,
                other=self.run(self.other),
            )

    def run(self, x: Tensor) -> Callable[[], Any]:
        return lambda: call_model(self.model, x)

    def masks(self, count: int = 3) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        random = [(torch.rand(self.group.size, generator=generator) < 0.5).float() for _ in range(count)]
        return [torch.ones(self.group.size), torch.zeros(self.group.size), *random]

    def check(self) -> Cached:
        """Replay two batches' tapes alternately; every output equals an ordinary run's bit for bit."""
        with torch.no_grad(), self.gates:
            self.gates.set(self.group.name, torch.ones(self.group.size))
            tapes = [(self.cache.record(self.run(x)), self.run(x)) for x in (self.x, self.other)]
            for mask in self.masks():
                self.gates.set(self.group.name, mask)
                for tape, run in tapes:
                    got = pytree.tree_leaves(self.cache.replay(tape, run))
                    expected = pytree.tree_leaves(run())
                    assert len(got) == len(expected)
                    for a, b in zip(got, expected, strict=True):
                        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        return self

    def calls(self, path: str, x: Tensor | None = None) -> int:
        """Number of times that the kernel of one layer really runs in a replay."""
        seen = []
        layer = self.model.get_submodule(path)
        original = type(layer).forward

        def counting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is layer:
                seen.append(1)
            return original(module, *args, **kwargs)

        with torch.no_grad(), self.gates:
            tape = self.cache.record(self.run(self.x))
            type(layer).forward = counting  # type: ignore[method-assign]
            try:
                self.cache.replay(tape, self.run(self.x))
            finally:
                type(layer).forward = original  # type: ignore[method-assign]
        return len(seen)


def cached(model: nn.Module, group: str, shape: tuple[int, ...] = (4, 3, 8, 8)) -> Cached:
    return Cached(model, torch.randn(*shape, generator=torch.Generator().manual_seed(0)), group)


def cached_by_hand(model: nn.Module) -> Cached:
    """The cache for ``b``, read by ``c``, in a network that the tracer cannot follow."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    members = [
        {"path": "b", "axis": "out", "index": list(range(8))},
        {"path": "c", "axis": "in", "index": list(range(8))},
    ]
    data = {"groups": [{"name": "b", "size": 8, "members": members}]}
    return Cached(model, x, "b", ChannelGraph.from_dict(data, model.requires_grad_(False), x))


class Net(nn.Module):
    """Two convolutions before and two behind the gate (on ``b``); ``forward`` is the difficulty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 6, **CONV), nn.Conv2d(6, 8, **CONV)
        self.c, self.d = nn.Conv2d(8, 6, **CONV), nn.Conv2d(6, 6, **CONV)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.b(self.a(x).relu()).relu()
        return self.head(self.d(self.c(x).relu()).mean((2, 3)))


@pytest.mark.parametrize("name", NETWORKS)
def test_replay_equals_an_ordinary_run_bit_for_bit(name: str) -> None:
    model, x = build(name)
    graph = ChannelGraph.from_model(model, x)
    names = graph.prunable
    for group in {names[0], names[len(names) // 2], names[-1]}:
        network = Cached(model, x, group, graph)
        assert network.cache.active
        network.check()


def test_model_is_bit_identical_after() -> None:
    model, x = build("ResNet-18")
    model.layer1[0].conv1.weight.requires_grad_(False)
    before = copy.deepcopy(model).eval()
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    Cached(model, x, "layer2.0.conv1").check()
    for key, value in before.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert [m.__dict__.get("forward") for m in model.modules()] == forwards
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_calls_before_the_gate_are_not_run_again() -> None:
    network = cached(Net(), "b")
    assert [network.calls(path) for path in ("a", "b", "c", "d")] == [0, 0, 1, 1]


def test_everything_but_the_head_is_on_the_tape_for_the_last_group() -> None:
    network = cached(Net(), "d")
    assert [network.calls(path) for path in ("a", "b", "c", "d")] == [0, 0, 0, 0]


def test_only_results_that_are_read_are_stored() -> None:
    torch.manual_seed(0)
    body = [layer for _ in range(10) for layer in (nn.Conv2d(4, 4, **CONV), nn.BatchNorm2d(4), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 4, **CONV), *body, nn.Conv2d(4, 4, **CONV), nn.Flatten(), nn.Linear(256, 5))
    network = cached(model, "28")
    with torch.no_grad(), network.gates:
        tape = network.cache.record(network.run(network.x))
    image = 4 * 4 * 8 * 8 * 4  # samples, channels, pixels, bytes
    # the input of the gated layer, and four bytes for each of the other 30 calls
    assert tape_bytes(tape) <= image + 31 * 4
    network.check()


def test_residual_stream_is_stored_once() -> None:
    class Residual(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.d(self.c(self.b(x.relu()).relu()).relu() + x)
            return self.head((y + x).mean((2, 3)))

    network = cached(Residual(), "b").check()
    with torch.no_grad(), network.gates:
        size = tape_bytes(network.cache.record(network.run(network.x)))
    assert size == (6 + 8) * 4 * 8 * 8 * 4  # what ``a`` and ``b`` give


class Inplace(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        y = self.act(self.c(self.act(self.b(x))))
        y += x
        x = self.act(self.d(y))
        x *= 2
        return self.head(x.mean((2, 3)))


class WrittenLater(Net):
    """A result is read, then written to by glue behind the gate."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.c(self.b(x.relu()).relu())
        x += y
        x[:, 1] = 0
        return self.head(self.d(x).mean((2, 3)))


class ReadThenOverwritten(Inplace):
    """Glue reads a result that an in-place module overwrites before the gate."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        least = x.amin((2, 3))
        y = self.c(self.b(self.act(x)).relu())
        return self.head(self.d(y).mean((2, 3)) + least)


class OutArgument(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.c(self.b(x.relu()).relu())
        torch.add(x, y, out=x)
        return self.head(self.d(x).mean((2, 3)))


class Twice(Net):
    """One module runs twice before and once behind the gate."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.d(self.d(self.a(x)).relu())
        return self.head(self.d(self.c(self.b(x).relu())).mean((2, 3)))


class Shared(Net):
    """An activation with a parameter is shared by both sides of the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.b(self.act(self.a(x))))
        return self.head(self.act(self.d(self.act(self.c(x)))).mean((2, 3)))


class Structured(Net):
    """Modules that return tuples and dicts; so does the network."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, **CONV)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
            y = self.conv(x)
            return y.relu(), {"skip": y.tanh(), "unread": y * 2, "size": y.shape[-1]}

    def __init__(self) -> None:
        super().__init__()
        self.pair = self.Pair()

    def forward(self, x: Tensor) -> dict[str, Any]:
        x, more = self.pair(x)
        y = self.d(self.c(self.b(x).relu()) + more["skip"])
        return {"logits": self.head(y.mean((2, 3))), "aux": (more["skip"], y > 0), "size": more["size"]}


class Complex(Net):
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft2(x)

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = self.Spectrum()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.c(self.b(x.relu()).relu())
        return self.head(self.d(y).mean((2, 3)) + self.spectrum(x).abs().mean((2, 3)))


@pytest.mark.parametrize(
    "make",
    [Inplace, WrittenLater, ReadThenOverwritten, OutArgument, Twice, Shared, Structured, Complex],
    ids=lambda make: make.__name__,
)
def test_replay_follows_what_forward_does(make: type[Net]) -> None:
    network = cached_by_hand(make()).check()
    assert network.cache.active
    assert network.calls("a") == 0


def test_outputs_that_are_no_numbers_are_no_difference() -> None:
    class Padded(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(super().forward(x), (0, 1), value=torch.nan)

    network = cached(Padded(), "b")
    assert network.cache.active


def test_fused_transformer_layers_before_and_behind_the_gate() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Flatten(), nn.Linear(56, 3)
    )
    network = cached(model, "1.layers.1.linear1", (4, 7, 5)).check()
    assert network.calls("1.layers.0") == 0


def test_user_hooks_and_a_patched_forward_survive() -> None:
    model, fired = Net(), []
    handle = model.a.register_forward_hook(lambda m, i, o: fired.append("hook"))
    pre = model.d.register_forward_pre_hook(lambda m, i: fired.append("pre"))
    patched = lambda x: F.conv2d(x, model.a.weight * 2, model.a.bias, padding=1)  # noqa: E731
    model.a.forward = patched
    network = cached(model, "b").check()
    assert network.cache.active
    assert model.a.forward is patched
    assert (handle.id in model.a._forward_hooks, pre.id in model.d._forward_pre_hooks) == (True, True)
    fired.clear()
    model(network.x)
    assert fired == ["hook", "pre"]


def test_patched_forward_survives_an_exception() -> None:
    model = Net()
    patched = model.a.forward = lambda x: F.conv2d(x, model.a.weight, padding=1)
    network = cached(model, "b")

    def interrupted() -> None:
        model(network.x)
        raise KeyboardInterrupt

    with torch.no_grad(), network.gates, pytest.raises(KeyboardInterrupt):
        network.cache.record(interrupted)
    assert model.a.forward is patched
    assert "forward" not in model.b.__dict__


class Branching(Net):
    """Runs other layers when the gated values are large."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.c(self.b(x.relu()).relu())
        if y.mean() > self.c.bias.mean():
            y = y + self.d(x)
        return self.head(self.d(x * 2).mean((2, 3)) + self.d(y).mean((2, 3)))


class Early(Net):
    """Leaves early when every channel is closed: random gates never do that."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x.relu()).relu()
        y = self.c(y) - self.c.bias[:, None, None]
        if bool((y == 0).all()):
            self.d(x)
        return self.head(self.d(x + 1).mean((2, 3)) + y.mean((2, 3)))


@pytest.mark.parametrize("make", [Branching, Early], ids=lambda make: make.__name__)
def test_control_flow_on_gated_values_falls_back_to_full_runs(make: type[Net]) -> None:
    with pytest.warns(UserWarning, match=f"{make.__name__} decides by gated values .* run in full"):
        network = cached(make(), "b")
    assert not network.cache.active
    network.check()
    assert network.calls("a") == 1


class Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.detach() > 0).float()


class Threshold(Net):
    """``c`` has positive weights only, so its sign is the same for all gates in (0, 1), and another one for zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.c.weight.data.abs_()
        self.c.bias.data.zero_()
        self.sign = Sign()

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu() + 0.1
        return self.head(self.d(self.sign(self.c(x))).mean((2, 3)))


class Routed(Net):
    """The largest of six scores chooses a row of a table: a whole number, without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 6)
        self.c.weight.data[2] = 1.0
        self.c.bias.data.copy_(torch.arange(6.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu() + 0.5
        return self.head(self.table(self.c(x).mean((2, 3)).argmax(1)))


class Detached(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(self.a(x).relu()).relu())
        with torch.no_grad():
            y = self.d(y.detach())
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("make", [Threshold, Routed, Detached], ids=lambda make: make.__name__)
def test_dependence_without_gradient_is_followed(make: type[Net]) -> None:
    network = cached_by_hand(make()).check()
    assert network.cache.active
    assert network.calls("a") == 0


class Outside(Net):
    """The dependence leaves torch for a while."""

    class Round(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.detach().numpy().copy())

    def __init__(self) -> None:
        super().__init__()
        self.round = self.Round()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.d(self.round(self.c(self.b(self.a(x).relu()).relu()))).mean((2, 3)))


def test_dependence_through_numpy_is_found_by_comparing_values() -> None:
    network = cached_by_hand(Outside()).check()
    assert network.calls("a") == 0


class Box:
    def __init__(self, content: Tensor) -> None:
        self.content = content


class Boxed(Net):
    """A module behind the gate returns an object that pytree does not know."""

    class Wrap(nn.Module):
        def forward(self, x: Tensor) -> Box:
            return Box(x)

    def __init__(self) -> None:
        super().__init__()
        self.wrap = self.Wrap()

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(self.a(x).relu()).relu())
        return self.head(self.d(self.wrap(y).content).mean((2, 3)))


class Silent(Net):
    """A module behind the gate returns nothing and keeps its input."""

    class Keep(nn.Module):
        def forward(self, x: Tensor) -> None:
            self.kept = x

    def __init__(self) -> None:
        super().__init__()
        self.keep = self.Keep()

    def forward(self, x: Tensor) -> Tensor:
        self.keep(self.c(self.b(self.a(x).relu()).relu()))
        return self.head(self.d(self.keep.kept).mean((2, 3)))


@pytest.mark.parametrize("make", [Boxed, Silent], ids=lambda make: make.__name__)
def test_module_whose_result_tells_nothing_runs_every_time(make: type[Net]) -> None:
    network = cached(make(), "b").check()
    assert network.cache.active
    assert network.calls("a") == 0


class SideDoor(Net):
    """A block before the gate hands something on in an attribute: a tape of another batch must not mix with it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, **CONV)

        def forward(self, x: Tensor) -> Tensor:
            self.skip = self.conv(x)
            return self.skip.relu()

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(self.block(x)).relu())
        return self.head(self.d(y + self.block.skip).mean((2, 3)))


class HookedFeatures(Net):
    """A hook inside of a block collects features, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, **CONV), nn.ReLU())
        self.features: dict[str, Tensor] = {}
        self.stem[0].register_forward_hook(lambda m, i, o: self.features.update(stem=o))

    def forward(self, x: Tensor) -> Tensor:
        self.features.clear()
        y = self.c(self.b(self.stem(x)).relu())
        return self.head(self.d(y + self.features["stem"]).mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "how"),
    [(SideDoor, "does not give the same outputs"), (HookedFeatures, "fails")],
    ids=["attribute", "hook"],
)
def test_results_handed_on_past_the_return_value_fall_back_to_full_runs(make: type[Net], how: str) -> None:
    with pytest.warns(UserWarning, match=f"{make.__name__} {how}.* run in full"):
        network = cached(make(), "b")
    assert not network.cache.active
    network.check()


def test_group_that_no_call_comes_before_is_run_in_full_without_a_warning() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(4, 3, 4)
    graph = ChannelGraph.from_model(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Cached(model, x, "1", graph).check()
