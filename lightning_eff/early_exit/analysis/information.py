"""How much a layer still knows of the input, and an output of the label (arXiv 2407.14320 names it; estimators below).

``Z = F(X) + N(0, sigma^2 I)`` is the pooled feature of a layer with noise. ``I(X; Z)`` is bounded by pairwise distances
(Kolchinsky, Tracey, Estimating mixture entropy with pairwise distances, 2017): from above by Kullback-Leibler, from
below by Bhattacharyya divergences of the mixture's components. In nats. ``n`` samples, ``m`` features, ``K`` outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_eff.batch import SplitBatch
from lightning_eff.early_exit.analysis.outputs import batches_of, features_of, output_names, outputs_of
from lightning_eff.reporting import Column, Report, Table
from lightning_eff.surgery.state import quiet_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Noise = float | Literal["total"] | None
"""Standard deviation > 0; None: 0.1 times the root mean variance of a feature; ``"total"``: 0.1 times the root of the
summed variances, which grows with the width as distances do."""


class Information(NamedTuple):
    """Bounds of ``I(X; Z)`` in nats, ``0 <= lower <= upper <= ln n``, and the noise's standard deviation."""

    lower: float
    upper: float
    sigma: float


def mutual_information(features: Tensor, sigma: Noise = None, block: int = 256) -> Information:
    """Bound the information between samples and their features with noise, in float64.

    Args:
        features: ``[n, ...]``, flattened to ``[n, m]``.
        sigma: of the noise, see :data:`Noise`. With None the samples of a wide layer are all far apart: both bounds are
            near ``ln n``; compare layers and networks by ``"total"`` or one number.
        block: samples whose distances to all others are held at a time, >= 1; the result does not depend on it.

    Returns:
        Lower and upper bound and sigma.

    Raises:
        ValueError: an argument outside its range, no samples, or values that are not finite.
    """
    _check(sigma, block)
    if features.ndim < 1 or not features.numel():
        raise ValueError(f"expected features [n, ...] of at least one sample, got shape {list(features.shape)}")
    points = features.detach().flatten(1) if features.ndim > 1 else features.detach()[:, None]
    points = points.to("cpu" if points.device.type == "mps" else points.device, torch.float64)  # MPS has no float64
    if not bool(points.isfinite().all()):
        raise ValueError("expected finite features, got NaN or infinity among them")
    points = points - points[0]  # equal rows become exact zeros
    points = points - points.mean(0)
    if sigma is None or isinstance(sigma, str):
        total = points.square().sum(1).mean()
        sigma = 0.1 * math.sqrt(float(total) / (points.shape[1] if sigma is None else 1))
        if sigma == 0:
            return Information(0.0, 0.0, 0.0)
    points = points / sigma
    squares = points.square().sum(1)
    n = len(points)
    sums = torch.zeros(2, dtype=torch.float64, device=points.device)
    for start in range(0, n, block):
        rows = slice(start, start + block)
        distances = (squares[rows, None] + squares - 2 * points[rows] @ points.T).clamp(min=0)
        distances[torch.arange(len(distances)), torch.arange(start, start + len(distances))] = 0
        sums += torch.stack([torch.logsumexp(-distances / twice, 1).sum() for twice in (8, 2)])
    lower, upper = (min(max(0.0, math.log(n) - total / n), math.log(n)) for total in sums.tolist())
    return Information(lower, upper, sigma)


def prediction_information(predictions: Tensor, target: Tensor) -> float:
    """Plug-in estimate of ``I(prediction; label)`` in nats, from the confusion matrix.

    Args:
        predictions: classes ``[n]`` int.
        target: classes ``[n]`` int.

    Returns:
        Between 0 and the entropy of the labels.

    Raises:
        ValueError: other shapes or types, or no samples.
    """
    from sklearn.metrics import mutual_info_score

    for what, labels in (("predictions", predictions), ("target", target)):
        if labels.ndim != 1 or len(labels) == 0 or labels.is_floating_point() or labels.shape != target.shape:
            raise ValueError(
                f"expected predictions and target [n] of whole numbers, got {what} of shape {list(labels.shape)} and "
                f"type {labels.dtype} beside {len(target)} labels"
            )
    return max(0.0, float(mutual_info_score(target.cpu().numpy(), predictions.cpu().numpy())))


@dataclass(frozen=True)
class LayerInformation(Report):
    """Information of every exit's feature and of the backbone's output: table and figure ``information``.

    Attributes:
        layers: names of the K outputs, ``"final"`` last.
        features: bounds of ``I(X; Z)`` at each.
        predictions: ``I(prediction; label)`` of each, in nats.
        samples: how many were looked at; no bound exceeds its logarithm.
    """

    layers: tuple[str, ...]
    features: tuple[Information, ...]
    predictions: tuple[float, ...]
    samples: int

    def figures(self) -> dict[str, Figure]:
        """Bounds of what each layer knows of the input, and what each output knows of the label."""
        from lightning_eff.early_exit.analysis.figures import information_figure

        return {"information": information_figure({"network": self})}

    def tables(self) -> dict[str, Table]:
        """One row a layer."""
        rows = [
            [name, *feature, prediction]
            for name, feature, prediction in zip(self.layers, self.features, self.predictions, strict=True)
        ]
        columns = [Column(name, ".3f") for name in ("lower", "upper")]
        table = Table(
            "Information in nats",
            ["layer", *columns, Column("sigma", ".3g"), Column("prediction", ".3f")],
            rows,
            f"{self.samples} samples: ln n = {math.log(self.samples):.3f}",
        )
        return {"information": table}


def layer_information(
    network: nn.Module,
    loader: Iterable[Any],
    sigma: Noise = "total",
    *,
    n_max: int = 4000,
    block: int = 256,
    pool: Callable[[Tensor], Tensor] | None = None,
    split_batch: SplitBatch | None = None,
) -> LayerInformation:
    """Information along the outputs of a network, in evaluation mode.

    Args:
        network: gives a list of K logits ``[B, C]``, and K tensors, batch first, by ``features(*inputs)``.
        loader: of batches whose target is classes ``[B]``; the first ``n_max`` samples are taken.
        sigma: of the noise, see :data:`Noise`; chosen for each layer unless it is a number.
        n_max: most samples looked at, >= 1; time grows with its square.
        block: see :func:`mutual_information`.
        pool: ``feature [B, ...] -> [B, m]``; by default the mean over positions: of tokens ``[B, L, D]``, and of
            ``[B, C, ...]``, or ``[B, ..., C]`` where the network knows that channels are last.
        split_batch: ``batch -> (inputs, target)``; by default batches are pairs.

    Raises:
        ValueError: an argument outside its range, or a network or loader that gives nothing to look at.
    """
    _check(sigma, block)
    if n_max < 1:
        raise ValueError(f"expected n_max >= 1, got {n_max}")
    kept: list[list[Tensor]] = []
    predicted: list[list[Tensor]] = []
    labels: list[Tensor] = []
    seen = 0
    with quiet_model(network), torch.no_grad():
        for inputs, target in batches_of(loader, network, split_batch):
            features, outputs = features_of(network, inputs), outputs_of(network, inputs)
            if not kept:
                kept, predicted = [[] for _ in features], [[] for _ in outputs]
            left = n_max - seen
            for k, (rows, feature) in enumerate(zip(kept, features, strict=True)):
                vectors = pool(feature) if pool else _pooled(feature, _channels_last(network, k))
                rows.append(vectors[:left].cpu())
            for classes, output in zip(predicted, outputs, strict=True):
                classes.append(output.argmax(1)[:left].cpu())
            labels.append(target[:left].cpu())
            seen += len(labels[-1])
            if seen >= n_max:
                break
    return LayerInformation(
        output_names(network, len(kept)),
        tuple(mutual_information(torch.cat(rows), sigma, block) for rows in kept),
        tuple(prediction_information(torch.cat(classes), torch.cat(labels)) for classes in predicted),
        seen,
    )


def _pooled(feature: Tensor, channels_last: bool) -> Tensor:
    if feature.ndim <= 2:
        return feature.flatten(1)
    if feature.ndim == 3 or channels_last:
        return feature.flatten(1, -2).mean(1)
    return feature.flatten(2).mean(2)


def _channels_last(network: nn.Module, exit_index: int) -> bool:
    """What a MultiExitNetwork found out about the layer of an exit."""
    structure = getattr(network, "structure", None)
    exits = structure()["exits"] if callable(structure) else []
    return exit_index < len(exits) and exits[exit_index]["channels"] == "last"


def _check(sigma: Noise, block: int) -> None:
    known = sigma in (None, "total") if not isinstance(sigma, int | float) else 0 < sigma < math.inf
    if block < 1 or not known:
        raise ValueError(f"expected block >= 1 and sigma > 0, 'total' or None, got {block} and {sigma!r}")
