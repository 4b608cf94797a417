"""Loss and gradients of importance switches on one batch, for all layers (arXiv 2011.05985).

Layers do not see each other's switches, so one dense forward pass per batch serves all of them: what lies before a
layer is answered from its tape, and only what follows is computed and differentiated. Where all layers are gated at
once (``layers="joint"``) there is one unit of all layers instead of one of each, and no tape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_eff.batch import batch_size, take
from lightning_eff.pruning.dirichlet.data import Likelihood
from lightning_eff.pruning.dirichlet.options import DirichletOptions
from lightning_eff.pruning.dirichlet.switches import Switches
from lightning_eff.surgery import ChannelGraph, Gates, PrefixCache, record_together
from lightning_eff.surgery.state import Generators


class SwitchGradients:
    """Differentiate the likelihood of a batch by the switches of every unit.

    Args:
        likelihood: the loss.
        graph: channel graph of ``likelihood.model``.
        switches: of all prunable groups.
        options: how they are trained.
        warn: called with what the user should know.

    ``units`` are the groups that are gated together. ``dense`` holds the loss without switches of the first batches,
    as many as are wanted or come for free.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        graph: ChannelGraph,
        switches: Switches,
        options: DirichletOptions,
        warn: Callable[[str], None],
    ) -> None:
        layerwise = options.layers == "layerwise"
        self.units = [(name,) for name in graph.prunable] if layerwise else [graph.prunable]
        self.dense: list[float] = []
        self._looks = 5 if layerwise else 1  # a look is free where the dense pass is needed anyway
        self._likelihood = likelihood
        self._graph = graph
        self._switches = switches
        self._warn = warn
        self._device = next(iter(switches.theta.values())).device
        self._averages_outputs = options.draws.average == "logits" and switches.passes > 1
        self._shares_prefix = layerwise and not self._averages_outputs
        self._gates = [self._gate(unit, options.gate.site) for unit in self.units]
        self._caches: dict[int, PrefixCache] = {}  # by number of the unit
        self._generators: Generators | None = None

    @property
    def looked(self) -> bool:
        """Whether ``dense`` has all the losses it will get."""
        return len(self.dense) == self._looks

    def of(self, batch: Any, number: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Loss of every unit, and the gradient of every group's free parameters ``[C]``.

        Args:
            batch: the batch.
            number: its place in the pass over the data.
        """
        self._generators = Generators()  # everything random is the same in all runs of a batch
        losses: list[Tensor] = []
        gradients: dict[str, Tensor] = {}
        tapes = self._look(batch, number)
        for i, unit in enumerate(self.units):
            loss, parts = self._unit(i, batch, number, tapes.get(i))
            losses.append(loss)
            gradients.update(zip(unit, parts, strict=True))
        return losses, gradients

    def _look(self, batch: Any, number: int) -> dict[int, Any]:
        """Run the network once without switches: tapes of what lies before every layer."""
        if not self._caches and self._shares_prefix:
            self._caches = {i: self._cache(i, batch, number) for i in range(len(self.units))}
        active = [i for i, cache in self._caches.items() if cache.active]
        if not active and self.looked:
            return {}
        losses: list[Tensor] = []
        with torch.no_grad():
            tapes = record_together([self._caches[i] for i in active], lambda: losses.append(self._loss(batch, number)))
        if not self.looked:
            self.dense.append(float(losses[0]))
        return dict(zip(active, tapes, strict=True))

    def _unit(self, i: int, batch: Any, number: int, tape: Any) -> tuple[Tensor, Sequence[Tensor]]:
        unit, gates = self.units[i], self._gates[i]
        thetas = [self._switches.theta[name] for name in unit]
        total = torch.zeros((), device=self._device)
        gradients = [torch.zeros_like(theta) for theta in thetas]
        examples = batch_size(batch)

        def draw() -> None:
            for name in unit:
                gates.set(name, self._switches.gate(name, examples))

        def run() -> Tensor:
            return self._loss(batch, number)

        passes = 1 if self._averages_outputs else self._switches.passes
        for _ in range(passes):
            if self._averages_outputs:
                with gates, _averaged(self._likelihood.model, self._switches.passes, draw):
                    loss = run()
            else:
                draw()
                with gates:
                    loss = run() if tape is None else self._caches[i].replay(tape, run)
            if not loss.requires_grad:
                raise ValueError(
                    f"the loss does not depend on the channels of {', '.join(unit)}, or is detached: give loss_fn, a "
                    "function (model, batch) -> loss"
                )
            for sum_, part in zip(gradients, torch.autograd.grad(loss, thetas, allow_unused=True), strict=True):
                if part is not None:
                    sum_ += part / passes
            total += loss.detach() / passes
        for name in unit:
            gates.set(name, self._switches.theta[name].detach())  # let go of the graph
        return total, gradients

    def _gate(self, unit: Sequence[str], site: Any) -> Gates:
        values = {name: self._switches.theta[name].detach() for name in unit}
        return Gates(self._graph.groups, self._likelihood.model, values, site=site)

    def _cache(self, i: int, batch: Any, number: int) -> PrefixCache:
        (name,), gates = self.units[i], self._gates[i]
        likelihood = self._likelihood
        sliceable = all(isinstance(leaf, Tensor) and leaf.ndim for leaf in pytree.tree_leaves(batch))

        def forward(run: Callable[[], Any] | None, samples: list[int]) -> Callable[[], Any]:
            def passed() -> Any:
                if run is None:
                    return self._loss(take(batch, samples) if sliceable else batch, number)
                with likelihood.autocast():
                    return run()

            return passed

        last = batch_size(batch) - 1
        with gates:
            cache = PrefixCache(
                likelihood.root,
                forward(likelihood.forward, [0, last]),
                gates,
                name,
                self._graph.groups[name].size,
                device=self._device,
                other=forward(likelihood.other, [last, 0]),
            )
        if cache.active and likelihood.forward is not None:
            self._check(cache, gates, name, batch, number)
        return cache

    def _check(self, cache: PrefixCache, gates: Gates, name: str, batch: Any, number: int) -> None:
        """Compare the loss from memory with that of a whole run: a training step may do more than call the model."""

        def run() -> Tensor:
            return self._loss(batch, number)

        with torch.no_grad():
            tape = cache.record(run)
            gates.set(name, torch.rand(self._graph.groups[name].size, device=self._device))
            with gates:
                whole, short = run(), cache.replay(tape, run)
        if not torch.allclose(whole, short, rtol=1e-4, atol=1e-6, equal_nan=True):
            self._warn(
                f"the loss differs when calls before {name} are answered from memory; the network is run in full, "
                "which is slower"
            )
            cache.active = False

    def _loss(self, batch: Any, number: int) -> Tensor:
        if self._generators is not None:
            self._generators.restore()
        try:
            with self._likelihood.autocast():
                loss = self._likelihood.loss(batch, number)
        except ValueError as error:
            if "gates per sample" in str(error):
                raise ValueError(
                    f"{error}: the batch is not the first dimension there, so samples cannot have draws of their "
                    'own; use Draws(scope="batch")'
                ) from error
            raise
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"expected the loss of a batch, one number, got {loss!r}: give loss_fn")
        return loss.reshape(())


@contextmanager
def _averaged(model: nn.Module, passes: int, draw: Callable[[], None]) -> Iterator[None]:
    """Let ``model`` return the mean outputs of several passes, each with new gates: what published code does."""
    forward, before = model.forward, model.__dict__.get("forward")
    called = False

    def several(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called = True
        outputs = []
        for _ in range(passes):
            draw()
            outputs.append(forward(*args, **kwargs))
        return pytree.tree_map(
            lambda *leaves: torch.stack(leaves).mean(0) if isinstance(leaves[0], Tensor) else leaves[0], *outputs
        )

    model.__dict__["forward"] = several
    try:
        yield
    finally:
        if before is None:
            model.__dict__.pop("forward", None)
        else:
            model.__dict__["forward"] = before
    if not called:
        raise ValueError('average="logits" needs a loss that calls the model itself, model(inputs)')
