"""How evenly the experts of all layers are used, summed over batches and processes.

Letters: L layers, n experts of a layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_eff.arguments import check_whole
from lightning_eff.moe.layer import FineGrainedMoE


class ExpertLoad(Metric):
    """Tokens of each expert of each layer, and what they say about balance.

    ``compute()`` gives scalars, means over layers:

    - ``max_over_mean``: load of the busiest expert over the mean load, from 1 (all alike) to n;
    - ``cv``: standard deviation of the loads over their mean, 0 if all are alike;
    - ``entropy``: entropy of the loads over that of equal ones, from 0 (one expert has all) to 1;
    - ``dead_fraction``: share of experts that nobody chose;
    - ``dropped_fraction``: share of choices that a capacity left without computation.

    All of them are NaN before a token has come.

    Args:
        n_layers: L, mixtures of a model, >= 1.
        n_experts: n, of each of them, >= 1.
        **kwargs: As of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: A count is out of range, or loads of another shape come.

    Example:
        >>> metric = ExpertLoad(n_layers=1, n_experts=4)
        >>> metric.update(torch.tensor([[4, 2, 2, 0]]))
        >>> metric.compute()["max_over_mean"], metric.compute()["dead_fraction"]
        (tensor(2.), tensor(0.2500))
    """

    is_differentiable = False
    full_state_update = False

    load: Tensor
    computed: Tensor

    def __init__(self, n_layers: int, n_experts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_whole("n_layers", n_layers)
        check_whole("n_experts", n_experts)
        for name in ("load", "computed"):
            zeros = torch.zeros(n_layers, n_experts, dtype=torch.int64)
            self.add_state(name, default=zeros, dist_reduce_fx="sum")

    def update(self, load: Tensor | nn.Module, computed: Tensor | None = None) -> None:
        """Add the loads of a forward pass.

        Args:
            load: Tokens that chose each expert [L, n], integers; or a model, of whose mixtures the last pass counts.
            computed: Tokens that each expert computed [L, n]; None where nothing was dropped.
        """
        if isinstance(load, nn.Module):
            load, computed = expert_loads(load)
        computed = load if computed is None else computed
        for name, given in (("load", load), ("computed", computed)):
            if given.shape != self.load.shape:
                raise ValueError(f"expected {name} of shape {list(self.load.shape)}, got {list(given.shape)}")
        self.load += load.to(self.load.device)
        self.computed += computed.to(self.load.device)

    def compute(self) -> dict[str, Tensor]:
        """Return the measures by name."""
        return {name: values.mean() for name, values in load_measures(self.load, self.computed).items()}


def load_measures(load: Tensor, computed: Tensor) -> dict[str, Tensor]:
    """Return the measures of :class:`ExpertLoad` for each layer [...], from loads and computed loads [..., n]."""
    total, n = load.sum(-1), load.shape[-1]
    shares = load.float() / total[..., None]
    entropy = torch.special.entr(shares).sum(-1)
    return {
        "max_over_mean": shares.amax(-1) * n,
        "cv": (shares * n - 1).square().mean(-1).sqrt(),
        "entropy": entropy / math.log(n) if n > 1 else torch.ones_like(entropy).where(total > 0, math.nan),
        "dead_fraction": (load == 0).float().mean(-1).where(total > 0, math.nan),
        "dropped_fraction": 1 - computed.sum(-1) / total,
    }


def expert_loads(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return how many tokens chose and how many were computed by each expert of the last forward pass.

    Args:
        model: Anything with :class:`FineGrainedMoE` layers in it, all of the same number of experts.

    Returns:
        Two of [L, n], int64, in the order of ``model.modules()``.

    Raises:
        ValueError: There is no such layer, one has not run, or numbers of experts differ.
    """
    layers = [module for module in model.modules() if isinstance(module, FineGrainedMoE)]
    loads = [layer.last_load for layer in layers if layer.last_load is not None]
    counts = [layer.last_counts for layer in layers if layer.last_counts is not None]
    if not layers or len(loads) < len(layers):
        raise ValueError(
            f"expected a model whose mixtures of experts have run, got {len(layers)}, of which {len(loads)} have"
        )
    if len(sizes := {load.numel() for load in loads}) > 1:
        raise ValueError(
            f"expected the same number of experts in all layers, got {sorted(sizes)}; use a metric for each"
        )
    return torch.stack([load.to(loads[0].device) for load in loads]), torch.stack(
        [c.to(loads[0].device) for c in counts]
    )
