"""Train importance switches of a frozen network, all layers in one pass over the data (arXiv 2011.05985).

The loss of a batch, minimised over the concentration ``phi_l`` of layer ``l`` alone, is
``loss(gates kappa * s_l on layer l) + (beta / N) * KL(Dir(phi_l) || Dir(alpha_0))``, with N samples in the data set.

Layers do not see each other's switches, so one dense forward pass per batch serves all of them: what lies before a
layer is answered from its tape, and only what follows is computed and differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lightning_eff.batch import batch_size, take
from lightning_eff.pruning.borrowing import borrowed
from lightning_eff.pruning.dirichlet.data import Data, Likelihood, length_of, size_of
from lightning_eff.pruning.dirichlet.options import DirichletOptions
from lightning_eff.pruning.dirichlet.posterior import DirichletPosterior
from lightning_eff.pruning.dirichlet.switches import Switches
from lightning_eff.reporting import Progress
from lightning_eff.reporting import progress as progress_bar
from lightning_eff.surgery import ChannelGraph, Gates, PrefixCache, record_together

_LOOK = 5  # batches whose loss tells whether the network is trained


def dirichlet_scores(
    model: nn.Module,
    graph: ChannelGraph,
    dataloader: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    options: DirichletOptions = DirichletOptions(),  # noqa: B008 (frozen)
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, DirichletPosterior]:
    """Learn how much every channel of every prunable layer matters; no Trainer needed.

    Args:
        model: a trained network. Nothing about it changes, nor do the global random generators.
        graph: its channel graph.
        dataloader: batches, trees of tensors whose first dimension is the batch; run through ``options.epochs`` times.
        loss_fn: ``(model, batch) -> scalar``: negative log-likelihood, mean over the batch.
        options: how switches are trained.
        device: where batches are moved to; None for where the model is.
        seed: of the draws and of shuffling.
        progress: show a progress bar.

    Returns:
        The posterior of each group of ``graph.prunable``.

    Raises:
        ValueError: there is no batch, nothing to prune, or the size of the data set is unknown.
        FloatingPointError: the loss of a layer is not finite.
    """
    at = torch.device(device) if device is not None else _device(model)

    def move(leaf: Any) -> Any:
        return leaf.to(at) if isinstance(leaf, Tensor) else leaf

    data = Data(
        lambda: (pytree.tree_map(move, batch) for batch in dataloader), length_of(dataloader), size_of(dataloader)
    )
    likelihood = Likelihood(model, lambda batch, index: loss_fn(model, batch), model)
    training = SwitchTraining(likelihood, graph, data, options, seed=seed)
    with progress_bar("importance switches", training.steps or 0, enabled=progress, unit="batches") as bar:
        return training.run(bar)


class SwitchTraining:
    """Train the switches of every prunable group.

    Args:
        likelihood: the loss.
        graph: channel graph of ``likelihood.model``.
        data: batches.
        options: how.
        seed: of everything random.

    ``history`` then has a row ``(batches seen, group, loss, KL, least phi, largest phi, sum of phi)`` for each group,
    at about twenty moments of every pass; ``posterior`` may be asked for at any time.
    """

    def __init__(
        self, likelihood: Likelihood, graph: ChannelGraph, data: Data, options: DirichletOptions, *, seed: int = 0
    ) -> None:
        if not graph.prunable:
            reasons = "; ".join(f"{name}: {g.protected or 'one channel'}" for name, g in graph.groups.items())
            raise ValueError(f"there is nothing to prune: {reasons or 'no layers found'}")
        self.limit = data.limit(options.max_batches)
        self.size = options.dataset_size or data.size
        if self.size is None and options.kl_weight > 0:
            raise ValueError(
                "the loader's data set has no length, which weighs the divergence from the prior: give "
                "DirichletOptions(dataset_size=...), or kl_weight=0"
            )
        self.steps = None if self.limit is None else self.limit * options.epochs
        self.history: list[tuple[int, str, float, float, float, float, float]] = []
        self._likelihood = likelihood
        self._graph = graph
        self._data = data
        self._options = options
        self._seed = seed
        self._names = graph.prunable
        self._device = _device(likelihood.model)
        sizes = {name: graph.groups[name].size for name in self._names}
        self.switches = Switches(sizes, options, device=self._device, seed=seed)
        self._units = [(name,) for name in self._names] if options.layers == "layerwise" else [self._names]
        self._gates = [self._gate(unit) for unit in self._units]
        self._caches: dict[int, PrefixCache] = {}  # by number of the unit
        self._dense: list[float] = []
        self._states: Any = None

    def run(self, bar: Progress | None = None) -> dict[str, DirichletPosterior]:
        """Train, and return the posterior of every group."""
        bar = bar or Progress()
        with borrowed(self._likelihood.root):
            torch.manual_seed(self._seed)
            if self._options.train_bn:
                for module in self._likelihood.root.modules():
                    module.training |= isinstance(module, _BatchNorm)
            for epoch in range(self._options.epochs):
                self._epoch(epoch, bar)
        for name, posterior in self.posterior().items():
            phi = posterior.concentration
            if phi.max() / phi.min() < 1.01:
                rank_zero_warn(
                    f"{name}: the switches of all channels are equal within 1 %, so they say nothing about which "
                    "channel matters: raise lr or epochs, or lower kl_weight"
                )
        return self.posterior()

    def posterior(self) -> dict[str, DirichletPosterior]:
        """What is known now."""
        return self.switches.posterior()

    def _epoch(self, epoch: int, bar: Progress) -> None:
        batches = iter(self._data.batches())
        number = 0
        while self.limit is None or number < self.limit:
            batch = next(batches, None)
            total, count = self._gradients(batch, number)
            if not count:  # on every process
                break
            kl_weight = self._kl_weight(epoch, number)
            losses = self._step(total / count, kl_weight, number)
            often = max(1, (self.limit or 20) // 20)
            if number % often == 0 or number + 1 == self.limit:
                self._note(epoch * (self.limit or 0) + number + 1, losses)
            bar.advance(1, f"loss {losses.mean():.3f}")
            number += 1
        if number == 0:
            raise ValueError("the loader gave no batch: give a loader that does")

    def _kl_weight(self, epoch: int, number: int) -> float:
        """``beta / N``, growing over the first passes where annealing is asked for."""
        weight = self._options.kl_weight / self.size if self.size else 0.0
        anneal = self._options.kl_anneal_epochs
        if anneal > 0:
            weight *= min(1.0, (epoch + number / (self.limit or math.inf)) / anneal)
        return weight

    def _gradients(self, batch: Any, number: int) -> tuple[Tensor, float]:
        """Sum over processes of (gradient of every layer, loss of every unit), and how many have a batch."""
        sizes = [len(theta) for theta in self.switches.theta.values()]
        flat = torch.zeros(sum(sizes) + len(self._units) + 1, dtype=torch.float64, device=self._device)
        if batch is not None:
            parts: dict[str, Tensor] = {}
            losses = []
            tapes = self._look(batch, number)
            for i, unit in enumerate(self._units):
                loss, gradients = self._unit(i, batch, number, tapes.get(i))
                losses.append(loss)
                parts.update(zip(unit, gradients, strict=True))
            flat = torch.cat(
                [*(parts[name].double() for name in self._names), torch.stack(losses).double(), flat.new_ones(1)]
            )
        total = self._data.reduce(flat)
        return total[:-1], float(total[-1])

    def _step(self, mean: Tensor, kl_weight: float, number: int) -> Tensor:
        sizes = [len(theta) for theta in self.switches.theta.values()]
        *parts, losses = torch.split(mean, [*sizes, len(self._units)])
        gradients = dict(zip(self._names, parts, strict=True))
        for unit, loss in zip(self._units, losses.tolist(), strict=True):
            if not math.isfinite(loss) or not all(bool(gradients[name].isfinite().all()) for name in unit):
                where = unit[0] if len(unit) == 1 else "the gated layers"
                raise FloatingPointError(
                    f"the loss with importance switches on {where} is {loss}, or its gradient is not finite, in batch "
                    f"{number}: nothing was pruned. Look at that batch, or score in higher precision"
                )
        self.switches.step(gradients, kl_weight)
        return losses

    def _look(self, batch: Any, number: int) -> dict[int, Any]:
        """Run the network once without switches: tapes of what lies before every layer, and is it trained?"""
        self._states = _collect_rng_states()
        if not self._caches and self._options.layers == "layerwise" and not self._averages_outputs:
            self._caches = {i: self._cache(i, batch, number) for i in range(len(self._units))}
        active = [i for i, cache in self._caches.items() if cache.active]
        look = len(self._dense) < _LOOK
        if not active and not look:
            return {}
        losses: list[Tensor] = []
        with torch.no_grad():
            tapes = record_together([self._caches[i] for i in active], lambda: losses.append(self._loss(batch, number)))
        if look:
            self._dense.append(float(losses[0]))
            if len(self._dense) == _LOOK:
                self._warn_if_untrained()
        return dict(zip(active, tapes, strict=True))

    def _unit(self, i: int, batch: Any, number: int, tape: Any) -> tuple[Tensor, Sequence[Tensor]]:
        """Loss with the switches of one unit, and its gradients."""
        unit, gates = self._units[i], self._gates[i]
        thetas = [self.switches.theta[name] for name in unit]
        total = torch.zeros((), device=self._device)
        gradients = [torch.zeros_like(theta) for theta in thetas]

        def draw() -> None:
            for name in unit:
                gates.set(name, self.switches.gate(name, examples))

        def run() -> Tensor:
            return self._loss(batch, number)

        examples = batch_size(batch)
        passes = 1 if self._averages_outputs else self.switches.passes
        for _ in range(passes):
            if self._averages_outputs:
                with gates, _averaged(self._likelihood.model, self.switches.passes, draw):
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
        for gate in unit:
            gates.set(gate, self.switches.theta[gate].detach())  # let go of the graph
        return total, gradients

    @property
    def _averages_outputs(self) -> bool:
        return self._options.average == "logits" and self.switches.passes > 1

    def _gate(self, unit: Sequence[str]) -> Gates:
        values = {name: self.switches.theta[name].detach() for name in unit}
        return Gates(self._graph.groups, self._likelihood.model, values, site=self._options.gate_site)

    def _cache(self, i: int, batch: Any, number: int) -> PrefixCache:
        (name,), gates = self._units[i], self._gates[i]
        likelihood = self._likelihood

        def forward(run: Callable[[], Any] | None, samples: list[int]) -> Callable[[], Any]:
            def passed() -> Any:
                if run is None:
                    return self._loss(take(batch, samples), number)
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
            rank_zero_warn(
                f"the loss differs when calls before {name} are answered from memory; the network is run in full, "
                "which is slower"
            )
            cache.active = False

    def _loss(self, batch: Any, number: int) -> Tensor:
        """Run the likelihood; everything random in it is the same in all runs of one batch."""
        if self._states is not None:
            _set_rng_states(self._states)
        try:
            with self._likelihood.autocast():
                loss = self._likelihood.loss(batch, number)
        except ValueError as error:
            if "gates per sample" in str(error):
                raise ValueError(
                    f"{error}: the batch is not the first dimension there, so examples cannot have draws of their "
                    'own; use sample_scope="batch"'
                ) from error
            raise
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"expected the loss of a batch, one number, got {loss!r}: give loss_fn")
        return loss.reshape(())

    def _warn_if_untrained(self) -> None:
        outputs = [g.size for g in self._graph.groups.values() if "output" in g.protected and g.size > 1]
        mean = sum(self._dense) / len(self._dense)
        if outputs and abs(mean - math.log(outputs[-1])) < 0.05 * math.log(outputs[-1]):
            rank_zero_warn(
                f"the loss {mean:.3f} is that of guessing among {outputs[-1]} classes: scores of an untrained network "
                "mean little"
            )

    def _note(self, seen: int, losses: Tensor) -> None:
        of = {name: loss for unit, loss in zip(self._units, losses.tolist(), strict=True) for name in unit}
        with torch.no_grad():
            for name in self._names:
                phi = self.switches.concentration(name)
                numbers = (of[name], self.switches.kl(name), phi.min(), phi.max(), phi.sum())
                self.history.append((seen, name, *map(float, numbers)))  # type: ignore[arg-type]


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


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
