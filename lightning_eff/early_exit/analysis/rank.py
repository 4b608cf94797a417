"""Numerical rank of a layer's features, arXiv 2407.14320: how many directions a layer really uses.

With eigenvalues ``l_1 >= l_2 >= ...`` of the features' covariance the rank is the number of ``l_j > rtol * l_1``, as in
the literature on the tunnel effect (arXiv 2305.19753). Shapes: ``n`` samples, ``m`` features.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_eff.arguments import check_choice, check_number, check_whole
from lightning_eff.batch import SplitBatch
from lightning_eff.early_exit.analysis.outputs import batches_of, features_of, output_names
from lightning_eff.surgery.state import quiet_model

Kind = Literal["numerical", "stable", "effective"]

N_MAX = 4000
MAX_COLUMNS = 8000


def numerical_rank(
    features: Tensor,
    rtol: float = 1e-3,
    kind: Kind = "numerical",
    *,
    n_max: int = N_MAX,
    max_columns: int = MAX_COLUMNS,
    seed: int = 0,
) -> float:
    """Count the directions in which features vary, in float64.

    Columns are centred for every kind. No rank exceeds ``min(n - 1, m)``.

    Args:
        features: ``[n, ...]``, n >= 2; flattened to ``[n, m]``.
        rtol: of ``"numerical"``: eigenvalues up to this fraction of the largest do not count, in (0, 1).
        kind: ``"numerical"``: number of covariance eigenvalues above ``rtol`` times the largest; ``"stable"``:
            ``|A|_F^2 / |A|_2^2``; ``"effective"``: ``exp`` of the entropy of the singular values over their sum.
        n_max: most samples looked at, >= 2; from more as many are drawn.
        max_columns: most features looked at, >= 1; from more as many are drawn.
        seed: of the draws.

    Returns:
        A whole number for ``"numerical"``, else a real one >= 1; 0 where nothing varies.

    Raises:
        ValueError: an argument outside its range, fewer than two samples, or values that are not finite.
    """
    _check(rtol, kind, n_max, max_columns)
    if features.ndim < 1 or len(features) < 2 or not features.numel():
        raise ValueError(f"expected features [n, ...] of at least two samples, got shape {list(features.shape)}")
    generator = torch.Generator().manual_seed(seed)
    matrix = features.detach().flatten(1) if features.ndim > 1 else features.detach()[:, None]
    matrix = matrix[_drawn(len(matrix), n_max, generator).to(matrix.device)]
    matrix = matrix[:, _drawn(matrix.shape[1], max_columns, generator).to(matrix.device)]
    matrix = matrix.to("cpu" if matrix.device.type == "mps" else matrix.device, torch.float64)  # MPS has no float64
    if not bool(matrix.isfinite().all()):
        raise ValueError("expected finite features, got NaN or infinity among them")
    matrix = matrix - matrix[0]  # equal rows become exact zeros
    matrix = matrix - matrix.mean(0)
    largest = matrix.abs().max()
    if largest == 0:
        return 0
    matrix = matrix / largest
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0)
    resolved = eigenvalues > torch.finfo(torch.float64).eps * len(gram) * eigenvalues[0]
    eigenvalues = eigenvalues[resolved] / eigenvalues[0]
    if kind == "numerical":
        return int((eigenvalues > rtol).sum())
    if kind == "stable":
        return float(eigenvalues.sum())
    singular = eigenvalues.sqrt()
    return float(torch.special.entr(singular / singular.sum()).sum().exp())


def layer_ranks(
    network: nn.Module,
    loader: Iterable[Any],
    rtol: float = 1e-3,
    kind: Kind = "numerical",
    *,
    n_max: int = N_MAX,
    max_columns: int = MAX_COLUMNS,
    seed: int = 0,
    split_batch: SplitBatch | None = None,
) -> dict[str, float]:
    """Rank of the features of every exit and of the backbone's output, in evaluation mode.

    Args:
        network: has ``features(*inputs) -> list`` of K tensors, batch first.
        loader: of batches; the first ``n_max`` samples are taken.
        rtol: see :func:`numerical_rank`.
        kind: see :func:`numerical_rank`.
        n_max: most samples looked at, >= 2.
        max_columns: most features of a layer looked at, >= 1; wider layers keep no more than that in memory.
        seed: of the draw of features.
        split_batch: ``batch -> (inputs, target)``; by default batches are pairs.

    Returns:
        Rank by layer, in the order of execution, ``"final"`` last.

    Raises:
        ValueError: as :func:`numerical_rank`, or a network or loader that gives nothing to look at.
    """
    _check(rtol, kind, n_max, max_columns)
    kept: list[list[Tensor]] = []
    columns: list[Tensor] = []
    seen = 0
    with quiet_model(network), torch.no_grad():
        for inputs, _ in batches_of(loader, network, split_batch):
            features = [feature.flatten(1)[: n_max - seen] for feature in features_of(network, inputs)]
            if not kept:
                kept = [[] for _ in features]
                columns = [
                    _drawn(feature.shape[1], max_columns, torch.Generator().manual_seed(seed)).to(feature.device)
                    for feature in features
                ]
            for rows, feature, chosen in zip(kept, features, columns, strict=True):
                rows.append(feature[:, chosen].cpu())
            seen += len(features[0])
            if seen >= n_max:
                break
    names = output_names(network, len(kept))
    return {
        name: numerical_rank(torch.cat(rows), rtol, kind, n_max=n_max, max_columns=max_columns)
        for name, rows in zip(names, kept, strict=True)
    }


def _check(rtol: float, kind: str, n_max: int, max_columns: int) -> None:
    check_choice("kind", kind, get_args(Kind))
    check_number("rtol", rtol, above=0, below=1)
    check_whole("n_max", n_max, 2)
    check_whole("max_columns", max_columns)


def _drawn(n: int, most: int, generator: torch.Generator) -> Tensor:
    """Indices of ``most`` of ``n`` drawn without repetition, in order; all of them where there are no more."""
    return torch.arange(n) if n <= most else torch.randperm(n, generator=generator)[:most].sort().values
