"""What one pass over validation or test data tells: every output alone, early exit as it is set, and the whole curve.

All outputs are computed once; thresholds are tried on recorded scores (arXiv 2407.14320). Shapes: ``B`` batch, ``C``
classes, ``E`` exits, ``K = E + 1`` outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_eff.early_exit.evaluation.curve import CurveResult, EarlyExitCurve
from lightning_eff.early_exit.inference.leaving import select_from_all
from lightning_eff.early_exit.network import MultiExitNetwork


def output_names(exits: int) -> list[str]:
    """Names of the ``K`` outputs: ``exit0``, ``exit1``, ..., ``final``."""
    return [*(f"exit{k}" for k in range(exits)), "final"]


def budget_name(budget: float) -> str:
    """Name of the accuracy at a budget, a fraction of the plain backbone's cost: ``accuracy@50`` for 0.5."""
    return f"accuracy@{100 * budget:g}"


def only_with_heads(exits: int, budgets: Sequence[float]) -> set[str]:
    """Names, without the stage in front, of what is logged only where heads are computed."""
    names = output_names(exits)
    return {
        "accuracy",
        "cost",
        "auc",
        "accuracy@max",
        *(f"accuracy_{name}" for name in names[:-1]),
        *(f"exit_rate{k}" for k in range(exits)),
        "exit_rate_final",
        *map(budget_name, budgets),
    }


class BatchMeans(Metric):
    """Means over all samples of all processes of what is known as means over batches.

    Args:
        names: of the quantities.
    """

    total: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.add_state("total", torch.zeros(len(self.names)), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values: Mapping[str, Tensor], size: int) -> None:
        """Take in the means over a batch of ``size`` samples."""
        self.total += size * torch.stack([values[name].detach().to(self.total) for name in self.names])
        self.count += size

    def compute(self) -> dict[str, Tensor]:
        """Return the means by name."""
        return dict(zip(self.names, self.total / self.count, strict=True))


class ExitMetrics:
    """Collects one pass.

    Args:
        network: whose policy, thresholds, temperatures and costs count, as they are now.
        budgets: costs at which the best accuracy is told, as fractions of the plain backbone.
        alone: the backbone's own output is all there is.
    """

    def __init__(self, network: MultiExitNetwork, budgets: Sequence[float], alone: bool = False) -> None:
        self.rule, self.budgets, self.alone = network.rule, budgets, alone
        self.curve: EarlyExitCurve | None = None
        self._fractions: Tensor | None = None
        device = network.score_thresholds.device
        self._outputs = ["final"] if alone else output_names(network.num_exits)
        names = ["loss", *(f"accuracy_{name}" for name in self._outputs)]
        if not alone:
            names += ["accuracy", *(f"exit_rate{k}" for k in range(network.num_exits)), "exit_rate_final"]
            costs = None
            with suppress(ValueError):  # the network has warned that nothing could be counted
                costs = network.costs
            if costs is not None:
                self.curve = EarlyExitCurve(costs.fractions(), policy=network.policy).to(device)
                enabled = [self.rule.enabled(k) for k in range(network.num_exits)]
                self._fractions = torch.tensor(costs.fractions(enabled), device=device)
                names.append("cost")
        self._means = BatchMeans(names).to(device)

    def update(self, logits: Sequence[Tensor], target: Tensor, loss: Tensor) -> None:
        """Take in a batch.

        Args:
            logits: of the ``K`` outputs, or of the last alone, ``[B, C]`` each.
            target: ``[B]``, int64.
            loss: mean over the batch.
        """
        values = {f"accuracy_{name}": _accuracy(z, target) for name, z in zip(self._outputs, logits, strict=True)}
        values["loss"] = loss
        if not self.alone:
            answer = select_from_all(self.rule, list(logits))
            left = answer.exit_index
            values["accuracy"] = _accuracy(answer.logits, target)
            for k, name in enumerate(self._outputs):
                values["exit_rate_final" if name == "final" else f"exit_rate{k}"] = (left == k).float().mean()
            if self.curve is not None and self._fractions is not None:
                values["cost"] = self._fractions[left].mean()
                self.curve.update([z.float() / t for z, t in zip(logits, self.rule.temperatures, strict=True)], target)
        self._means.update(values, len(target))

    def compute(self) -> tuple[CurveResult | None, dict[str, Any]]:
        """Return the curve over thresholds, and all values by name; every process must call this."""
        values: dict[str, Any] = dict(self._means.compute())
        if self.curve is None:
            return None, values
        result = self.curve.compute()
        values |= {budget_name(budget): result.at_budget(budget) for budget in self.budgets}
        return result, {**values, "accuracy@max": result.at_budget(math.inf), "auc": result.auc()}


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    return (logits.argmax(-1) == target).float().mean()
