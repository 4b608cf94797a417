"""What is minimised: a weighted sum of the outputs' losses (arXiv 2407.14320), and outputs that teach each other.

Shapes: ``B`` batch, ``C`` classes, ``E`` exits, ``K = E + 1`` outputs in the order of depth; the last one is the
backbone's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.arguments import check_choice, check_number

WeightSchedule = Callable[[int, int, Any], Any]
"""``(epoch in the phase from 1, epochs of the phase, costs of the K outputs) -> weights of the outputs``."""

Weights = Literal["equal", "increasing", "decreasing", "sdn"] | list[float] | WeightSchedule
NAMED_WEIGHTS = ("equal", "increasing", "decreasing", "sdn")

Distillation = Literal["last", "later", "next"]
DISTILLATIONS = ("last", "later", "next")


def loss_weights(
    weights: Weights,
    exits: int,
    *,
    final: bool = True,
    epoch: int = 1,
    epochs: int = 1,
    costs: Sequence[float] | None = None,
) -> list[float]:
    """Weights of the outputs' losses.

    Args:
        weights: ``"equal"`` 1/n; ``"increasing"`` proportional to the depth 1..n, ``"decreasing"`` the reverse, both
            adding up to 1; ``"sdn"`` 1 for the backbone's output and ``min(c_k, 0.01 + epoch * c_k / epochs)`` for exit
            k of cost ``c_k`` (Shallow-Deep Networks, arXiv 1810.07052); a list of ``K`` numbers, used as given; or a
            callable ``(epoch, epochs, costs) -> list``.
        exits: ``E``.
        final: whether the backbone's output has a loss too; otherwise lists may have ``E`` or ``K`` numbers, the first
            ``E`` of which are used.
        epoch: of the phase, from 1.
        epochs: of the phase.
        costs: of the ``K`` outputs, as fractions of the plain backbone; for ``"sdn"`` and callables.

    Returns:
        ``E + final`` numbers >= 0.

    Raises:
        ValueError: an unknown name, a wrong number of weights, negative or undefined ones, or none above 0.
    """
    n = exits + final
    if isinstance(weights, str):
        if weights not in NAMED_WEIGHTS:
            raise ValueError(f"weights must be one of {_listed(NAMED_WEIGHTS)}, a list or a callable, got {weights!r}")
        return _named(weights, exits, n, epoch, epochs, costs)
    given = list(weights(epoch, epochs, costs) if callable(weights) else weights)
    if len(given) not in {n, exits + 1}:
        raise ValueError(f"expected {n} loss weights, one an output, got {len(given)}: {given}")
    used = [float(weight) for weight in given[:n]]
    if not all(math.isfinite(weight) and weight >= 0 for weight in used):
        raise ValueError(f"expected loss weights that are finite and >= 0, got {used}")
    if not any(used):
        raise ValueError(f"expected at least one loss weight above 0, got {used}: nothing would be learnt")
    return used


def _named(name: str, exits: int, n: int, epoch: int, epochs: int, costs: Sequence[float] | None) -> list[float]:
    if name == "equal":
        return [1 / n] * n
    if name == "sdn":
        if costs is None:
            raise ValueError('weights="sdn" follow the costs of the exits: give costs')
        reached = [min(cost, 0.01 + epoch * cost / epochs) for cost in costs[:exits]]
        return [*reached, 1.0][:n]
    rising = [2 * rank / (n * (n + 1)) for rank in range(1, n + 1)]
    return rising if name == "increasing" else rising[::-1]


def distillation(logits: Sequence[Tensor], kind: Distillation, temperature: float | None = None) -> Tensor:
    """Loss of outputs that learn from later ones, which learn nothing from it.

    Args:
        logits: of the ``K`` outputs, ``[B, C]`` each.
        kind: ``"last"``: each exit from the last output; ``"next"``: from the one behind it; ``"later"``: from all
            behind it. The mean over these pairs.
        temperature: None takes the cross entropy between the distributions; a number t > 0 the Kullback-Leibler
            divergence of logits / t, times t^2 (arXiv 1908.06294).

    Returns:
        A scalar; 0 where there is no exit.
    """
    last = len(logits) - 1
    pairs = {
        "last": [(k, last) for k in range(last)],
        "next": [(k, k + 1) for k in range(last)],
        "later": [(k, j) for k in range(last) for j in range(k + 1, last + 1)],
    }[kind]
    if not pairs:
        return logits[0].new_zeros(())
    t = 1.0 if temperature is None else temperature
    softened = [_wide(z) / t for z in logits]
    learning = [F.log_softmax(z, dim=-1) for z in softened]
    teaching = [F.softmax(z.detach(), dim=-1) for z in softened]
    if temperature is None:
        each = [-(teaching[j] * learning[k]).sum(-1).mean() for k, j in pairs]
    else:
        each = [F.kl_div(learning[k], teaching[j], reduction="batchmean") * t**2 for k, j in pairs]
    return torch.stack(each).mean()


@dataclass(frozen=True)
class ExitLosses:
    """How the outputs of a network are judged in training.

    Attributes:
        weights: of the outputs, see :func:`loss_weights`; a phase may have its own.
        gradient_scaling: ``"equilibrium"`` averages the gradients of the outputs instead of adding them up
            (:mod:`lightning_eff.early_exit.training.equilibrium`).
        distill: which later outputs each exit also learns from, see :func:`distillation`; None for none.
        distill_weight: of that loss, >= 0. With a temperature it lies in [0, 1] and the exits' own losses are
            multiplied by the rest to 1. None is 1, and 0.9 with a temperature.
        distill_temperature: > 0, softens what is learnt from later outputs; None for plain cross entropy.
        label_smoothing: of the cross entropy, in [0, 1).
        criterion: ``(logits [B, C], target) -> scalar`` in place of the cross entropy.

    Raises:
        ValueError: a value outside its range.
    """

    weights: Weights = "equal"
    gradient_scaling: Literal["none", "equilibrium"] = "none"
    distill: Distillation | None = None
    distill_weight: float | None = None
    distill_temperature: float | None = None
    label_smoothing: float = 0.0
    criterion: nn.Module | None = None

    def __post_init__(self) -> None:
        """Check the ranges; lists of weights are checked when the number of exits is known."""
        if isinstance(self.weights, str) and self.weights not in NAMED_WEIGHTS:
            loss_weights(self.weights, 1)
        check_choice("gradient_scaling", self.gradient_scaling, ("none", "equilibrium"))
        check_choice("distill", self.distill, (*DISTILLATIONS, None))
        if self.distill_temperature is not None:
            check_number("distill_temperature", self.distill_temperature, above=0)
        if self.distill_weight is not None:
            most = None if self.distill_temperature is None else 1
            check_number("distill_weight", self.distill_weight, least=0, most=most)
        check_number("label_smoothing", self.label_smoothing, least=0, below=1)
        if self.criterion is not None and self.label_smoothing:
            raise ValueError("label_smoothing belongs to the cross entropy: give it to the criterion instead")

    def each(self, logits: Sequence[Tensor], target: Tensor) -> list[Tensor]:
        """Loss of every output, the mean over the batch.

        Args:
            logits: ``[B, C]`` each.
            target: ``[B]`` int64, or probabilities ``[B, C]``.
        """
        if self.criterion is not None:
            return [self.criterion(z, target) for z in logits]
        return [F.cross_entropy(_wide(z), target, label_smoothing=self.label_smoothing) for z in logits]

    def total(self, losses: Sequence[Tensor], weights: Sequence[float], logits: Sequence[Tensor]) -> Tensor:
        """What is minimised: the weighted sum, plus distillation.

        Args:
            losses: of the outputs that are trained, from the first exit on.
            weights: of these.
            logits: of all ``K`` outputs where there is distillation, else of those that are trained.
        """
        own = [1.0] * len(losses)
        gamma = self.distill_weight
        if self.distill is not None:
            if gamma is None:
                gamma = 1.0 if self.distill_temperature is None else 0.9
            if self.distill_temperature is not None:
                exits = len(logits) - 1
                own = [1 - gamma if k < exits else 1.0 for k in range(len(losses))]
        terms = [weight * part * loss for loss, weight, part in zip(losses, weights, own, strict=True) if weight]
        # no gradient, but a place in the graph: DistributedDataParallel waits for every parameter that is trained
        terms += [_wide(z)[:0].sum() for z, weight in zip(logits, weights, strict=False) if not weight]
        if self.distill is not None and gamma:
            terms.append(gamma * distillation(logits, self.distill, self.distill_temperature))
        return torch.stack(terms).sum()


def _wide(logits: Tensor) -> Tensor:
    """Float32 at least: losses of half precision logits lose too many digits."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
