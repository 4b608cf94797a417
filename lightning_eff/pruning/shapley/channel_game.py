"""Channels of one group as players of a cooperative game; the pay-off is what the network is worth without the others.

Removing a channel is what a physical cut does: it vanishes at the input of every layer that reads it. Everything
before that is computed once per batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_eff.arguments import check_number, check_whole
from lightning_eff.batch import batch_size, call_model, take
from lightning_eff.pruning.memory import fingerprint
from lightning_eff.pruning.samples import Samples
from lightning_eff.pruning.settings import check_choices
from lightning_eff.pruning.shapley.evaluation import (
    Evaluation,
    GatedBatch,
    MaskedNetwork,
    NoSamples,
    UnfaithfulError,
    WrongOutputsError,
    quick_pools,
)
from lightning_eff.pruning.shapley.linear_reader import DeltaBatch, LinearReader
from lightning_eff.pruning.shapley.linear_tail import TailTables, affine_logits, table_bytes
from lightning_eff.pruning.values import Value, value_function
from lightning_eff.shapley.games import Start
from lightning_eff.surgery import ChannelGraph, Gates, PrefixCache
from lightning_eff.surgery.state import quiet_model

MAX_HALVINGS = 5  # of the batches, when memory runs out


@dataclass(frozen=True)
class GameOptions:
    """How the network is evaluated without some of its channels.

    Attributes:
        removal: ``"remove"`` is what a cut does; ``"pre_norm"`` zeroes the layer's output before its norm, as older
            published code does; ``"mean"`` puts the calibration mean in the place of the channel.
        accelerate: ``"prefix"`` computes what the channels do not reach once per batch; ``"auto"`` also replaces the
            layer that reads the channels, and what is linear behind it, by sums where that is possible; ``"delta"``
            does the same and warns where it is not; ``"off"`` runs everything.
        groups: groups of samples that see coalitions of their own; None for 16 of at least 32 samples.
        max_memory_mb: stored results; above that they are computed anew for every call.
    """

    removal: Literal["remove", "pre_norm", "mean"] = "remove"
    accelerate: Literal["auto", "delta", "prefix", "off"] = "auto"
    groups: int | None = None
    max_memory_mb: int = 512

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        check_choices(self)
        if self.groups is not None:
            check_whole("groups", self.groups)
        check_number("max_memory_mb", self.max_memory_mb, least=0)


class ChannelGame:
    """A :class:`~lightning_eff.shapley.GroupedGame` on the channels of one group.

    Args:
        model: the network; evaluated in evaluation mode and left as it was.
        graph: its channel graph.
        name: the group, or any of its producers.
        samples: calibration samples, on the model's device.
        value: ``"accuracy"``, ``"neg_loss"`` or a callable ``(outputs, target) -> [B]``, higher is better.
        options: how the network is evaluated.
        autocast: opens the precision context to evaluate in.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        name: str,
        samples: Samples,
        *,
        value: Value = "accuracy",
        options: GameOptions | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.group = graph.resolve(name)
        self.n_players = self.group.size
        self.samples = samples
        self._counts = samples.counts
        self.n_groups = len(samples.groups)
        self.group_weights = self._counts / self._counts.sum()
        self._model = model
        self._options = options or GameOptions()
        self._value = value_function(value)
        self._autocast = autocast
        if self._options.removal != "remove" and not any(m.axis == "in" for m in self.group.members):
            raise ValueError(f"{self.group.name} has no reader whose input could be masked")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        site: Literal["consumer", "producer"] = "producer" if self._options.removal == "pre_norm" else "consumer"
        everything = torch.ones(self.n_players, device=device)
        self._gates = Gates(graph.groups, model, {self.group.name: everything}, site=site)
        self._known: dict[tuple[int, int], Evaluation] = {}
        self._stored = 0
        self._room = self._options.max_memory_mb * 2**20
        self._batches = [list(group) for group in samples.groups]
        self._halved = 0
        if self._options.removal == "mean":
            self._gates.fill.update(self._means())
        self._reader: LinearReader | None = None
        self._kind: type[GatedBatch] | type[DeltaBatch] | type[TailTables] = GatedBatch
        with self._evaluating():
            self._network = MaskedNetwork(model, self._gates, self.group.name, self._value, self._prefix(device))
            if self._options.accelerate in ("auto", "delta"):
                self._speed_up()

    def __call__(self, coalitions: Tensor) -> Tensor:
        """Mean value over all samples with only the channels of each coalition: bool ``[M, n]`` -> float64 ``[M]``."""
        return self._mean(lambda evaluation: evaluation.sums(coalitions))

    def call_group(self, group: int, coalitions: Tensor) -> Tensor:
        """Mean value over the samples of one group: bool ``[M, n]`` -> float64 ``[M]``."""
        return self._mean(lambda evaluation: evaluation.sums(coalitions), group)

    def walk(self, orders: Tensor, *, start: Start = "full") -> Tensor:
        """As :meth:`WalkableGame.walk <lightning_eff.shapley.WalkableGame.walk>`."""
        return self._walk(orders, start, None)

    def walk_group(self, group: int, orders: Tensor, *, start: Start = "full") -> Tensor:
        """As :meth:`walk`, over the samples of one group."""
        return self._walk(orders, start, group)

    @property
    def tour(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Values along a path: ``(start bool [n], flips int64 [K]) -> [K + 1]``; see :func:`evaluate_tour`.

        Raises:
            AttributeError: other coalitions cost no more than neighbours, so there is nothing to gain.
        """
        if self._kind is not DeltaBatch:
            raise AttributeError(f"a tour of {self.group.name} is no faster than its coalitions one by one")
        return lambda start, flips: self._along(start, flips[None], None)[0]

    @property
    def fingerprint(self) -> str:
        """Hash of what the values depend on: weights, group, value, removal, sample count and first batch.

        For :class:`~lightning_eff.shapley.CachedGame`, which then refuses values of another game. Functions are known
        by name alone.
        """
        value = self._value
        known_by = getattr(value, "__qualname__", type(value).__qualname__)
        plain = {k: v for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, str | int | float | None)}
        settings = (self.group.name, value.__module__, known_by, plain, self._options.removal, self._counts.tolist())
        return fingerprint(self._model, Samples([self.samples.groups[0][:1]]), settings)

    def _prefix(self, device: torch.device) -> PrefixCache | None:
        if self._options.accelerate == "off":
            return None
        run, backwards = (partial(call_model, self._model, x) for x in _both_ways(self.samples.example))
        with self._gates:
            return PrefixCache(
                self._model, run, self._gates, self.group.name, self.n_players, device=device, other=backwards
            )

    def _speed_up(self) -> None:
        """Choose by structure and memory alone, so that values do not depend on how fast the machine is today."""
        try:
            if self._options.removal == "pre_norm":
                raise UnfaithfulError("they are removed where they are produced")
            if self._network.cache is not None and not self._network.cache.active:
                raise UnfaithfulError("nothing can be answered from memory")
            self._reader = LinearReader(self._model, self.group, self._gates.fill)
            self._kind = self._linear(self._reader)
        except WrongOutputsError as reason:
            self._fall_back(str(reason))
        except UnfaithfulError as reason:
            if self._options.accelerate == "delta":
                _warn(f"the channels of {self.group.name} cannot be summed up: {reason}; this is slower")

    def _linear(self, reader: LinearReader) -> type[DeltaBatch] | type[TailTables]:
        """Which sums fit in memory; where only those of fewer samples do, the batches are split."""
        example = DeltaBatch(self._network, reader, self.samples.example, None)
        example.check()
        count = batch_size(self.samples.example)
        per_sample = example.nbytes / count
        samples = sum(batch_size(inputs) for group in self._batches for inputs, _ in group)
        logits = affine_logits(example)
        if logits is not None and table_bytes(self.n_players, logits) * samples / count <= self._room:
            return TailTables
        if per_sample * samples > self._room:
            self._room //= 2  # one half for what is stored, one for what is computed anew
            most = int(self._room / per_sample)
            if not most:
                raise UnfaithfulError(f"max_memory_mb={self._options.max_memory_mb} does not hold a single sample")
            self._batches = [[part for batch in group for part in _pieces(batch, most)] for group in self._batches]
        return DeltaBatch

    def _fall_back(self, reason: str) -> None:
        _warn(f"the channels of {self.group.name} are not summed up: {reason}; this is slower")
        self._kind = GatedBatch
        self._forget()

    def _forget(self) -> None:
        self._known.clear()
        self._stored = 0

    def _walk(self, orders: Tensor, start: Start, group: int | None) -> Tensor:
        return self._along(torch.full((self.n_players,), start == "full"), orders, group)

    def _along(self, start: Tensor, flips: Tensor, group: int | None) -> Tensor:
        """Values along paths from ``start`` (bool ``[n]``), ``flips`` int64 ``[P, K]``: float64 ``[P, K + 1]``."""

        def visit(evaluation: Evaluation) -> Tensor:
            return torch.cat([evaluation.sums(start[None]), evaluation.paths(start, flips).flatten()])

        values = self._mean(visit, group)
        return torch.cat([values[:1].expand(len(flips), 1), values[1:].view(flips.shape)], dim=1)

    def _mean(self, visit: Callable[[Evaluation], Tensor], group: int | None = None) -> Tensor:
        """Mean over all samples of what ``visit`` sums up, of all processes; of one group if given."""
        if group is not None:
            return self.samples.reduce(self._sums(group, visit)) / self._counts[group]
        sums = [self._sums(g, visit) for g in range(self.n_groups)]
        return self.samples.reduce(torch.stack(sums).sum(0)) / self._counts.sum()

    def _sums(self, group: int, visit: Callable[[Evaluation], Tensor]) -> Tensor:
        """Sum of values over the samples of this process.

        Out of memory, the batches are halved, five times at most; where a fast way does not hold, the masked network
        itself is run from then on.
        """
        while True:
            try:
                batches = {(group, i): b for i, b in enumerate(self._batches[group]) if batch_size(b[0])}
                known = [self._known.get(key) for key in batches]
                idle = all(evaluation is not None and not evaluation.needs_model for evaluation in known)
                with torch.no_grad() if idle else self._evaluating():
                    parts = [visit(self._evaluation(key, batch)) for key, batch in batches.items()]
                return torch.stack(parts).sum(0) if parts else visit(NoSamples())
            except torch.OutOfMemoryError:
                if self._halved == MAX_HALVINGS:
                    raise
                self._halved += 1
                self._forget()
                self._batches = [[half for batch in group for half in _halves(batch)] for group in self._batches]
            except UnfaithfulError as error:
                self._fall_back(str(error))

    def _evaluation(self, key: tuple[int, int], batch: tuple[Any, Any]) -> Evaluation:
        if key in self._known:
            return self._known[key]
        made: Evaluation
        if issubclass(self._kind, GatedBatch):
            made = self._kind(self._network, *batch)
        else:
            assert self._reader is not None
            made = self._kind(self._network, self._reader, *batch)
        if self._stored + made.nbytes <= self._room:
            self._stored += made.nbytes
            self._known[key] = made
        return made

    def _evaluating(self) -> ExitStack:
        with ExitStack() as stack:
            stack.enter_context(quiet_model(self._model))
            if self._options.accelerate != "off":
                stack.enter_context(quick_pools(self._model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._autocast())
            return stack.pop_all()

    def _means(self) -> dict[str, Tensor]:
        """Mean of every input channel of the readers over all calibration samples."""
        sums: dict[str, Tensor] = {}
        modules = dict(self._model.named_modules(remove_duplicate=False))

        def watch(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = (args[0] if args else kwargs["input"]).detach().double()
                x = x.transpose(0, 1).flatten(1) if isinstance(module, _ConvNd) else x.flatten(0, -2).T
                total = torch.cat([x.sum(1), x.new_tensor([x.shape[1]])])
                sums[path] = sums.get(path, torch.zeros_like(total)) + total

            return hook

        handles = [
            modules[m.path].register_forward_pre_hook(watch(m.path), with_kwargs=True) for m in self.group.consumers
        ]
        try:
            with quiet_model(self._model), torch.no_grad(), self._autocast():
                for group in self.samples.groups:
                    for inputs, _ in group:
                        call_model(self._model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        totals = {path: self.samples.reduce(total) for path, total in sums.items()}
        return {path: total[:-1] / total[-1] for path, total in totals.items()}


def _both_ways(inputs: Any) -> tuple[Any, Any]:
    return inputs, take(inputs, list(range(batch_size(inputs)))[::-1])


def _pieces(batch: tuple[Any, Any], most: int) -> list[tuple[Any, Any]]:
    """The batch in pieces of about equal size, of at most ``most`` samples."""
    count = batch_size(batch[0])
    pieces = max(1, -(-count // most))
    bounds = [round(i * count / pieces) for i in range(pieces + 1)]
    return [take(batch, slice(a, b)) for a, b in pairwise(bounds)]


def _halves(batch: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    return _pieces(batch, max(1, -(-batch_size(batch[0]) // 2)))


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
