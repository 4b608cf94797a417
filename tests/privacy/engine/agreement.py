"""Compare the engine with per-sample gradients that were made in another way."""

from collections.abc import Mapping
from typing import Any

import torch
from per_sample_reference import example_losses
from torch import Tensor, nn

from lightning_eff.batch import call_model
from lightning_eff.privacy.engine import PerSampleEngine
from lightning_eff.privacy.selection.selected import Selection

GRANULARITIES = ("all", "mask", "rows", "columns", "rows and columns", "everything")


def draw_selections(model: nn.Module, granularity: str, drop_rate: float = 0.5, seed: int = 0) -> dict[str, Selection]:
    """Select a random share of each parameter; tensors without that side are wholly active."""
    generator = torch.Generator().manual_seed(seed)

    def some(size: int) -> Tensor:
        kept = max(1, round((1 - drop_rate) * size))
        return torch.randperm(size, generator=generator)[:kept].sort().values

    selections = {}
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        everything = granularity == "everything"
        rows = some(shape[0]) if shape and ("rows" in granularity or everything) else None
        columns = some(shape[1]) if len(shape) > 1 and ("columns" in granularity or everything) else None
        mask = torch.rand(shape, generator=generator) >= drop_rate if granularity == "mask" or everything else None
        selections[name] = Selection(shape, rows, columns, mask)
    return selections


def run(
    engine: PerSampleEngine, inputs: Any, n: int, max_norm: float = 1.0, clipping: Any = "flat"
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step: norms and clipped sum."""
    with engine.record(n):
        loss = example_losses(call_model(engine.module, inputs)).mean()
    engine.backward(loss)
    return engine.norms(), engine.clipped_sum(max_norm, clipping)


def assert_agrees(
    model: nn.Module,
    inputs: Any,
    gradients: Mapping[str, Tensor],
    selections: Mapping[str, Selection] | None = None,
    rtol: float = 1e-9,
) -> None:
    """Norms and clipped sums are those of the gradients ``name -> [n, *shape]``; the module is left as it was."""
    n = len(next(iter(gradients.values())))
    engine = PerSampleEngine(model, tune=False)
    engine.select(selections)
    chosen = {name: Selection.all(g.shape[1:]) for name, g in gradients.items()} | dict(selections or {})
    blocks = {name: torch.stack([chosen[name].compact(one) for one in g]) for name, g in gradients.items()}
    norms = torch.stack([b.reshape(n, -1).square().sum(1) for b in blocks.values()]).sum(0).sqrt()
    max_norm = float(norms.median()) or 1.0  # some samples are clipped, others are not
    found, sums = run(engine, inputs, n, max_norm)
    torch.testing.assert_close(found, norms, rtol=rtol, atol=1e-12, check_dtype=False)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1)
    for name, b in blocks.items():
        expected = torch.einsum("n,n...->...", factors, b)
        # rounding is relative to what was added, and terms may cancel
        scale = float(torch.einsum("n,n...->...", factors, b.abs()).amax()) if b.numel() else 0.0
        torch.testing.assert_close(sums[name], expected, rtol=rtol, atol=rtol * max(scale, 1e-3), check_dtype=False)
    assert all(parameter.grad is None for parameter in model.parameters())
