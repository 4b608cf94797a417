"""Temperature scaling: one number per output that makes its probabilities honest (arXiv 1706.04599)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# outside, the data do not determine a temperature; answers all right, for one, ask for zero
LOWEST, HIGHEST = 0.05, 20.0


def fit_temperatures(logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
    """Fit the temperature of each output to validation data, by least negative log-likelihood.

    Fit before thresholds, ideally on other samples.

    Args:
        logits: ``[K, N, C]``, or K tensors ``[N, C]``; samples with logits that are not finite are left out.
        target: labels ``[N]``.

    Returns:
        ``[K]``, float32, on the CPU; 1 where the fit does not end in [0.05, 20].

    Raises:
        ValueError: shapes disagree, or there are no samples.
    """
    for output in logits:
        if output.ndim != 2 or target.shape != output.shape[:1] or not len(target):
            raise ValueError(
                f"expected logits [K, N, C] and labels [N], N >= 1, got {list(output.shape)} for an output and "
                f"{list(target.shape)}"
            )
    with torch.inference_mode(False), torch.enable_grad():
        return torch.tensor([_fit(output, target) for output in logits], dtype=torch.float32)


def _fit(logits: Tensor, target: Tensor) -> float:
    finite = logits.isfinite().all(-1)
    # indexing makes tensors of their own, also of those from inference mode
    logits, target = logits.detach()[finite].double(), target[finite].clone()
    if not len(target):
        return 1.0
    log_temperature = torch.zeros((), dtype=torch.float64, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_temperature], max_iter=100, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits * (-log_temperature).exp(), target)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    temperature = log_temperature.detach().exp().item()
    return temperature if LOWEST <= temperature <= HIGHEST else 1.0
