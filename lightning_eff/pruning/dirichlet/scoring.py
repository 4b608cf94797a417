"""Train importance switches of a frozen network, all layers in one pass over the data (arXiv 2011.05985).

The loss of a batch, minimised over the concentration ``phi_l`` of layer ``l`` alone, is
``loss(gates kappa * s_l on layer l) + (beta / N) * KL(Dir(phi_l) || Dir(alpha_0))``, with N samples in the data set.

Every process takes the sum of all processes' gradients, so all of them train the same switches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from lightning_eff.batch import LossFunction
from lightning_eff.documents import whole_state
from lightning_eff.pruning.borrowing import borrowed
from lightning_eff.pruning.dirichlet.data import Data, Likelihood, size_of
from lightning_eff.pruning.dirichlet.gradients import SwitchGradients
from lightning_eff.pruning.dirichlet.options import DirichletOptions
from lightning_eff.pruning.dirichlet.posterior import DirichletPosterior
from lightning_eff.pruning.dirichlet.switches import Switches
from lightning_eff.pruning.samples import length_of
from lightning_eff.reporting import Progress
from lightning_eff.reporting import progress as progress_bar
from lightning_eff.surgery import ChannelGraph
from lightning_eff.surgery.state import channels_last_weights

SETTLED = 0.99  # Spearman's correlation above which two rankings count as the same


def dirichlet_scores(
    model: nn.Module,
    graph: ChannelGraph,
    dataloader: Iterable[Any],
    loss_fn: LossFunction,
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
        loss_fn: ``(model, batch) -> loss``: negative log-likelihood, mean over the batch.
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
        keep: called about twenty times a pass with the state to go on from, should the run break off.

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
        keep: Callable[[dict[str, Any]], None] = lambda state: None,
    ) -> None:
        graph.refuse_nothing()
        self.limit = data.limit(options.max_batches)
        self.size = options.prior.dataset_size or data.size
        if self.size is None and options.prior.weight > 0:
            raise ValueError(
                "the loader's data set has no length, which weighs the divergence from the prior: give "
                "Prior(dataset_size=...), or Prior(weight=0)"
            )
        if options.prior.anneal_epochs > 0 and self.limit is None:
            raise ValueError("prior.anneal_epochs counts passes, but the loader has no length: give max_batches")
        self.steps = None if self.limit is None else self.limit * options.epochs
        self.history: list[tuple[int, str, float, float, float, float, float]] = []
        self._root = likelihood.root
        self._graph = graph
        self._data = data
        self._options = options
        self._seed = seed
        self._warn = warn
        self._keep = keep
        self._pass = 0  # over the data
        self._number = 0  # batches of this pass
        self._seen = 0  # batches of all passes
        self._looked = False
        sizes = {name: graph.groups[name].size for name in graph.prunable}
        self.switches = Switches(sizes, options, device=_device(likelihood.model), seed=seed)
        self._gradients = SwitchGradients(likelihood, graph, self.switches, options, warn)
        self._settling = _Settling()

    def run(self, bar: Progress | None = None) -> dict[str, DirichletPosterior]:
        """Train, and return the posterior of every group."""
        with borrowed(self._root), channels_last_weights(self._root):
            if self._options.gate.train_bn:
                for module in self._root.modules():
                    module.training |= isinstance(module, _BatchNorm)
            while self._pass < self._options.epochs and not self._settling.done:
                self._epoch(bar or Progress())
                self._pass, self._number = self._pass + 1, 0
                if not self._looked:
                    self._look_back()
        phis = {name: one.concentration for name, one in self.posterior().items()}
        alike = [name for name, phi in phis.items() if phi.max() < 1.01 * phi.min()]
        if alike:
            self._warn(
                f"{', '.join(alike)}: the switches of all channels are equal within 1 %, so they say nothing about "
                "which channel matters: raise lr or epochs, or lower prior.weight"
            )
        return self.posterior()

    def posterior(self) -> dict[str, DirichletPosterior]:
        """What is known now."""
        return self.switches.posterior()

    def state_dict(self) -> dict[str, Any]:
        """Where the training is: tensors and plain Python."""
        return {
            "switches": self.switches.state_dict(),
            "at": [self._pass, self._number, self._seen],
            "history": [list(row) for row in self.history],
            "dense": list(self._gradients.dense),
            "settling": self._settling.state_dict(),
        }

    @whole_state
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there: batches that were seen are drawn and passed over, so the loader should repeat its order."""
        self.switches.load_state_dict(state["switches"])
        self._pass, self._number, self._seen = state["at"]
        self.history = [tuple(row) for row in state["history"]]
        self._gradients.dense = list(state["dense"])
        self._settling.load_state_dict(state["settling"])

    def _epoch(self, bar: Progress) -> None:
        """Pass over the data once, or over what is left of it, until the rankings have settled."""
        torch.manual_seed(self._seed + 7919 * self._pass)  # a shuffled loader repeats its order when this goes on
        batches = islice(iter(self._data.batches()), self._number, None)
        often = 20 if self.limit is None else max(1, self.limit // 20)
        bar.advance(self._seen - bar.done)
        noted = True
        while self.limit is None or self._number < self.limit:
            total, count = self._summed(next(batches, None), self._number)
            if not count:  # on every process
                break
            losses = self._step(total / count, self._kl_weight(self._pass, self._number), self._number)
            self._number, self._seen = self._number + 1, self._seen + 1
            noted = self._number % often == 0 or self._number == self.limit
            if noted:
                self._note(losses)
                self._keep(self.state_dict())
                if self._options.early_stop and self._settling.settled(self.switches):
                    return
            bar.advance(1, self._told(losses))
        if self._number == 0:
            raise ValueError("the loader gave no batch: give a loader that does")
        if not noted:
            self._note(losses)

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
            losses, parts = self._gradients.of(batch, number)
            flat = torch.cat(
                [*(parts[name].double() for name in thetas), torch.stack(losses).double(), flat.new_ones(1)]
            )
            if self._gradients.looked and not self._looked:
                self._look_back()
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

    def _look_back(self) -> None:
        """Warn where the network was not trained, by the loss of the first batches without switches."""
        self._looked = True
        dense = self._gradients.dense
        outputs = [g.size for g in self._graph.groups.values() if "output" in g.protected and g.size > 1]
        mean = sum(dense) / max(1, len(dense))
        if outputs and dense and abs(mean - math.log(outputs[-1])) < 0.05 * math.log(outputs[-1]):
            self._warn(
                f"the loss {mean:.3f} is that of guessing among {outputs[-1]} classes: scores of an untrained network "
                "mean little"
            )

    def _told(self, losses: Tensor) -> str:
        return f"loss {losses.mean():.3f}" + (f", KL {self.history[-1][3]:.3g}" if self.history else "")

    def _note(self, losses: Tensor) -> None:
        units = self._gradients.units
        of = {name: loss for unit, loss in zip(units, losses.tolist(), strict=True) for name in unit}
        with torch.no_grad():
            for name, loss in of.items():
                phi = self.switches.concentration(name)
                numbers = map(float, (loss, self.switches.kl(name), phi.min(), phi.max(), phi.sum()))
                self.history.append((self._seen, name, *numbers))  # type: ignore[arg-type]


class _Settling:
    """Whether rankings still change: compares them with those it saw the last time, by Spearman's correlation."""

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}
        self._quiet = 0

    @property
    def done(self) -> bool:
        """Whether no layer's ranking has changed much, twice in a row."""
        return self._quiet >= 2

    def settled(self, switches: Switches) -> bool:
        """Look again, and say whether that is so."""
        places = {name: theta.detach().cpu().argsort(stable=True).argsort() for name, theta in switches.theta.items()}
        alike = [torch.stack([was, places[name]]).double().corrcoef()[0, 1] for name, was in self._before.items()]
        self._quiet = self._quiet + 1 if alike and min(alike) > SETTLED else 0
        self._before = places
        return self.done

    def state_dict(self) -> dict[str, Any]:
        return {"before": dict(self._before), "quiet": self._quiet}

    @whole_state
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._before, self._quiet = dict(state["before"]), state["quiet"]


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
