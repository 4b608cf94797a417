"""What one pass over validation or test data tells: every output alone, early exit as it is set, and the whole curve.

All outputs are computed once; thresholds are tried on recorded scores (arXiv 2407.14320). Shapes: ``B`` batch, ``C``
classes, ``E`` exits, ``K = E + 1`` outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_eff.early_exit.curve import CurveResult, EarlyExitCurve
from lightning_eff.early_exit.leaving import select_from_all
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


class ExitMetrics:
    """Collects one pass.

    Args:
        network: whose policy, thresholds, temperatures and costs count, as they are now.
        budgets: costs at which the best accuracy is told, as fractions of the plain backbone.
    """

    def __init__(self, network: MultiExitNetwork, budgets: Sequence[float]) -> None:
        self.rule, self.budgets = network.rule, budgets
        self.names = output_names(network.num_exits)
        self.curve: EarlyExitCurve | None = None
        self._fractions: Tensor | None = None
        try:
            costs = network.costs
        except ValueError:  # the network has warned that nothing could be counted
            return
        device = network.score_thresholds.device
        self.curve = EarlyExitCurve(costs.fractions(), policy=network.policy).to(device)
        enabled = [self.rule.enabled(k) for k in range(network.num_exits)]
        self._fractions = torch.tensor(costs.fractions(enabled), device=device)

    def update(self, logits: Sequence[Tensor], target: Tensor) -> dict[str, Tensor]:
        """Take in a batch and return the means over it.

        Args:
            logits: of the ``K`` outputs, ``[B, C]`` each.
            target: ``[B]``, int64.
        """
        answer = select_from_all(self.rule, list(logits))
        left = answer.exit_index
        values = {f"accuracy_{name}": _accuracy(z, target) for name, z in zip(self.names, logits, strict=True)}
        values["accuracy"] = _accuracy(answer.logits, target)
        for k, name in enumerate(self.names):
            values["exit_rate_final" if name == "final" else f"exit_rate{k}"] = (left == k).float().mean()
        if self.curve is not None and self._fractions is not None:
            values["cost"] = self._fractions[left].mean()
            self.curve.update([z.float() / t for z, t in zip(logits, self.rule.temperatures, strict=True)], target)
        return values

    def compute(self) -> tuple[CurveResult | None, dict[str, float]]:
        """Return the curve over thresholds and what it says at the budgets; every process must call this."""
        if self.curve is None:
            return None, {}
        result = self.curve.compute()
        values = {budget_name(budget): result.at_budget(budget) for budget in self.budgets}
        return result, {**values, "accuracy@max": result.at_budget(float("inf")), "auc": result.auc()}


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    return (logits.argmax(-1) == target).float().mean()
