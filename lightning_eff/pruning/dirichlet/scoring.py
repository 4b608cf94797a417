"""Train importance switches of a frozen network, all layers in one pass over the data (arXiv 2011.05985).

The loss of a batch, minimised over the concentration ``phi_l`` of layer ``l`` alone, is
``loss(gates kappa * s_l on layer l) + (beta / N) * KL(Dir(phi_l) || Dir(alpha_0))``, with N samples in the data set.

Every process takes the sum of all processes' gradients, so all of them train the same switches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lightning_eff.pruning.borrowing import borrowed
from lightning_eff.pruning.dirichlet.data import Data, Likelihood, length_of, size_of
from lightning_eff.pruning.dirichlet.gradients import SwitchGradients
from lightning_eff.pruning.dirichlet.options import DirichletOptions
from lightning_eff.pruning.dirichlet.posterior import DirichletPosterior
from lightning_eff.pruning.dirichlet.switches import Switches
from lightning_eff.reporting import Progress
from lightning_eff.reporting import progress as progress_bar
from lightning_eff.surgery import ChannelGraph
from lightning_eff.surgery.state import channels_last_weights

SETTLED = 0.99  # Spearman's correlation above which two rankings count as the same


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
        warn: called with what the user should know.

    ``history`` then has a row ``(batches seen, group, loss, KL, least phi, largest phi, sum of phi)`` for each group,
    at about twenty moments of every pass; ``posterior`` may be asked for at any time.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        graph: ChannelGraph,
        data: Data,
        options: DirichletOptions,
        *,
        seed: int = 0,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        if not graph.prunable:
            reasons = "; ".join(f"{name}: {g.protected or 'one channel'}" for name, g in graph.groups.items())
            raise ValueError(f"there is nothing to prune: {reasons or 'no layers found'}")
        self.limit = data.limit(options.max_batches)
        self.size = options.prior.dataset_size or data.size
        if self.size is None and options.prior.weight > 0:
            raise ValueError(
                "the loader's data set has no length, which weighs the divergence from the prior: give "
                "Prior(dataset_size=...), or Prior(weight=0)"
            )
        self.steps = None if self.limit is None else self.limit * options.epochs
        self.history: list[tuple[int, str, float, float, float, float, float]] = []
        self._root = likelihood.root
        self._graph = graph
        self._data = data
        self._options = options
        self._seed = seed
        self._warn = warn
        sizes = {name: graph.groups[name].size for name in graph.prunable}
        self.switches = Switches(sizes, options, device=_device(likelihood.model), seed=seed)
        self._gradients = SwitchGradients(likelihood, graph, self.switches, options, warn)
        self._settling = _Settling()

    def run(self, bar: Progress | None = None) -> dict[str, DirichletPosterior]:
        """Train, and return the posterior of every group."""
        with borrowed(self._root), channels_last_weights(self._root):
            torch.manual_seed(self._seed)
            if self._options.gate.train_bn:
                for module in self._root.modules():
                    module.training |= isinstance(module, _BatchNorm)
            for epoch in range(self._options.epochs):
                if not self._epoch(epoch, bar or Progress()):
                    break
        for name, posterior in self.posterior().items():
            phi = posterior.concentration
            if phi.max() / phi.min() < 1.01:
                self._warn(
                    f"{name}: the switches of all channels are equal within 1 %, so they say nothing about which "
                    "channel matters: raise lr or epochs, or lower prior.weight"
                )
        return self.posterior()

    def posterior(self) -> dict[str, DirichletPosterior]:
        """What is known now."""
        return self.switches.posterior()

    def _epoch(self, epoch: int, bar: Progress) -> bool:
        """Pass over the data once; False where the rankings have settled and more would be a waste."""
        batches = iter(self._data.batches())
        number = 0
        often = 20 if self.limit is None else max(1, self.limit // 20)
        while self.limit is None or number < self.limit:
            batch = next(batches, None)
            total, count = self._summed(batch, number)
            if not count:  # on every process
                break
            losses = self._step(total / count, self._kl_weight(epoch, number), number)
            number += 1
            bar.advance(1, f"loss {losses.mean():.3f}")
            if number % often == 0 or number == self.limit:
                self._note(epoch * (self.limit or 0) + number, losses)
                if self._options.early_stop and self._settling.settled(self.switches):
                    return False
        if number == 0:
            raise ValueError("the loader gave no batch: give a loader that does")
        return True

    def _kl_weight(self, epoch: int, number: int) -> float:
        """``beta / N``, growing over the first passes where annealing is asked for."""
        prior = self._options.prior
        weight = prior.weight / self.size if self.size else 0.0
        if prior.anneal_epochs > 0:
            weight *= min(1.0, (epoch + number / (self.limit or math.inf)) / prior.anneal_epochs)
        return weight

    def _summed(self, batch: Any, number: int) -> tuple[Tensor, float]:
        """Sum over processes of (gradient of every layer, loss of every unit), and how many have a batch."""
        thetas = self.switches.theta
        units = len(self._gradients.units)
        first = next(iter(thetas.values()))
        flat = first.new_zeros(sum(map(len, thetas.values())) + units + 1, dtype=torch.float64, requires_grad=False)
        if batch is not None:
            looked = self._gradients.looked
            losses, parts = self._gradients.of(batch, number)
            flat = torch.cat(
                [*(parts[name].double() for name in thetas), torch.stack(losses).double(), flat.new_ones(1)]
            )
            if self._gradients.looked and not looked:
                self._warn_if_untrained()
        total = self._data.reduce(flat)
        return total[:-1], float(total[-1])

    def _step(self, mean: Tensor, kl_weight: float, number: int) -> Tensor:
        units = self._gradients.units
        *parts, losses = torch.split(mean, [*map(len, self.switches.theta.values()), len(units)])
        gradients = dict(zip(self.switches.theta, parts, strict=True))
        for unit, loss in zip(units, losses.tolist(), strict=True):
            if not math.isfinite(loss) or not all(bool(gradients[name].isfinite().all()) for name in unit):
                where = unit[0] if len(unit) == 1 else "the gated layers"
                raise FloatingPointError(
                    f"the loss with importance switches on {where} is {loss}, or its gradient is not finite, in batch "
                    f"{number}: nothing was pruned. Look at that batch, or score in higher precision"
                )
        self.switches.step(gradients, kl_weight)
        return losses

    def _warn_if_untrained(self) -> None:
        dense = self._gradients.dense
        outputs = [g.size for g in self._graph.groups.values() if "output" in g.protected and g.size > 1]
        mean = sum(dense) / len(dense)
        if outputs and abs(mean - math.log(outputs[-1])) < 0.05 * math.log(outputs[-1]):
            self._warn(
                f"the loss {mean:.3f} is that of guessing among {outputs[-1]} classes: scores of an untrained network "
                "mean little"
            )

    def _note(self, seen: int, losses: Tensor) -> None:
        units = self._gradients.units
        of = {name: loss for unit, loss in zip(units, losses.tolist(), strict=True) for name in unit}
        with torch.no_grad():
            for name, loss in of.items():
                phi = self.switches.concentration(name)
                numbers = map(float, (loss, self.switches.kl(name), phi.min(), phi.max(), phi.sum()))
                self.history.append((seen, name, *numbers))  # type: ignore[arg-type]


class _Settling:
    """Whether rankings still change: compares them with those it saw the last time, by Spearman's correlation."""

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}
        self._quiet = 0

    def settled(self, switches: Switches) -> bool:
        """True the second time in a row that no layer's ranking has changed much."""
        now = {name: theta.detach().argsort(stable=True).argsort().double() for name, theta in switches.theta.items()}
        alike = [torch.stack([before, now[name]]).corrcoef()[0, 1] for name, before in self._before.items()]
        self._quiet = self._quiet + 1 if alike and min(alike) > SETTLED else 0
        self._before = now
        return self._quiet >= 2


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
