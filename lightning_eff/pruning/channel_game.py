"""Channels of one group as players of a cooperative game; the pay-off is what the network is worth without the others.

Removing a channel is what a physical cut does: it vanishes at the input of every layer that reads it. Everything
before that is computed once per batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_eff.batch import batch_size, call_model, take
from lightning_eff.pruning.samples import Samples
from lightning_eff.pruning.settings import check_choices
from lightning_eff.pruning.values import Value, per_sample, value_function
from lightning_eff.surgery import ChannelGraph, Gates, PrefixCache
from lightning_eff.surgery.prefix import Tape, tape_bytes
from lightning_eff.surgery.state import quiet_model

MAX_HALVINGS = 5  # of the batches, when memory runs out


@dataclass(frozen=True)
class GameOptions:
    """How the network is evaluated without some of its channels.

    Attributes:
        removal: ``"remove"`` is what a cut does; ``"pre_norm"`` zeroes the layer's output before its norm, as older
            published code does; ``"mean"`` puts the calibration mean in the place of the channel.
        accelerate: ``"prefix"`` computes what the channels do not reach once per batch; ``"off"`` runs everything.
        groups: groups of samples that see coalitions of their own; None for 16 of at least 32 samples.
        max_memory_mb: stored results; above that they are computed anew for every call.
    """

    removal: Literal["remove", "pre_norm", "mean"] = "remove"
    accelerate: Literal["prefix", "off"] = "prefix"
    groups: int | None = None
    max_memory_mb: int = 512

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        check_choices(self)
        if self.groups is not None and self.groups < 1:
            raise ValueError(f"groups must be >= 1 or None, got {self.groups}")
        if self.max_memory_mb < 0:
            raise ValueError(f"max_memory_mb must be >= 0, got {self.max_memory_mb}")


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
        self._cache: PrefixCache | None = None
        self._tapes: dict[tuple[int, int], Tape] = {}
        self._stored = 0
        self._batches = [list(group) for group in samples.groups]
        self._halved = 0
        if self._options.removal == "mean":
            self._gates.fill.update(self._means())
        if self._options.accelerate == "prefix":
            with self._evaluating():
                self._cache = PrefixCache(
                    model,
                    lambda: call_model(model, samples.example),
                    self._gates,
                    self.group.name,
                    self.n_players,
                    device=device,
                    other=lambda: call_model(model, _backwards(samples.example)),
                )

    def __call__(self, coalitions: Tensor) -> Tensor:
        """Mean value over all samples with only the channels of each coalition: bool ``[M, n]`` -> float64 ``[M]``."""
        sums = [self._sums(g, coalitions) for g in range(self.n_groups)]
        return self.samples.reduce(torch.stack(sums).sum(0)) / self._counts.sum()

    def call_group(self, group: int, coalitions: Tensor) -> Tensor:
        """Mean value over the samples of one group: bool ``[M, n]`` -> float64 ``[M]``."""
        return self.samples.reduce(self._sums(group, coalitions)) / self._counts[group]

    def _sums(self, group: int, coalitions: Tensor) -> Tensor:
        """Sum of values over the samples of this process; out of memory, the batches are halved, five times at most."""
        while True:
            try:
                return self._evaluate(group, coalitions)
            except torch.OutOfMemoryError:
                if self._halved == MAX_HALVINGS:
                    raise
                self._halved += 1
                self._tapes.clear()
                self._stored = 0
                self._batches = [[half for batch in group for half in _halves(batch)] for group in self._batches]

    def _evaluate(self, group: int, coalitions: Tensor) -> Tensor:
        sums = torch.zeros(len(coalitions), dtype=torch.float64)
        gates = coalitions.to(torch.get_default_dtype())
        with self._evaluating():
            for number, (inputs, target) in enumerate(self._batches[group]):
                count = batch_size(inputs)
                if not count:
                    continue

                def run(inputs: Any = inputs) -> Any:
                    return call_model(self._model, inputs)

                tape = self._tape((group, number), run)
                for row, gate in enumerate(gates):
                    self._gates.set(self.group.name, gate)
                    outputs = run() if self._cache is None else self._cache.replay(tape, run)
                    sums[row] += per_sample(self._value, outputs, target, count).sum().cpu()
        return sums

    def _tape(self, key: tuple[int, int], run: Callable[[], Any]) -> Tape:
        if self._cache is None:
            return {}
        if key not in self._tapes:
            tape = self._cache.record(run)
            size = tape_bytes(tape)
            if self._stored + size > self._options.max_memory_mb * 2**20:
                return tape
            self._stored += size
            self._tapes[key] = tape
        return self._tapes[key]

    def _evaluating(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(quiet_model(self._model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(self._autocast())
        stack.enter_context(self._gates)
        return stack

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


def _backwards(inputs: Any) -> Any:
    return take(inputs, list(range(batch_size(inputs)))[::-1])


def _halves(batch: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    count = batch_size(batch[0])
    if count < 2:
        return [batch]
    first: tuple[Any, Any] = take(batch, slice(0, count // 2))
    second: tuple[Any, Any] = take(batch, slice(count // 2, count))
    return [first, second]
