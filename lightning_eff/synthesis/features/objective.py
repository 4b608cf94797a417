"""The squared mean discrepancy between a target and generated samples, and its gradient (arXiv 2303.01687).

For class c with target mean t_c = S_c / m_c and generated mean e_c it is ``||t_c||^2 - 2 <t_c, e_c> + ||e_c||^2``. All
three are sums over layers. The derivative by each layer's delta and input is known in closed form and worked out with
the value, so nothing of the size of a gradient enters the graph; the way from there to the samples is automatic
differentiation, one forward and one backward of the network.

``n`` samples, ``C`` classes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_eff.synthesis.embedding import MeanEmbedding
from lightning_eff.synthesis.features.recording import Recording
from lightning_eff.synthesis.features.sketch import SketchRecording
from lightning_eff.synthesis.features.uses import Backend, Part

Estimator = Literal["u", "v"]
SMALLEST_SQUARE = 1e-24
"""A squared norm below this counts as no gradient: the feature is then (nearly) zero, and never longer than one."""


class MMD2Terms(NamedTuple):
    """The squared mean discrepancy and the terms it is made of, each a scalar summed over classes with their weights.

    ``mmd2 = target - 2 * cross + spread``.
    """

    mmd2: Tensor
    """What ``NTKFeatures.mmd2`` returns; the only one that carries a gradient."""
    target: Tensor
    """Squared norm of the target means."""
    cross: Tensor
    """Inner product of target means and generated means."""
    spread: Tensor
    """Squared norm of the generated means, as estimated."""


def inverse_norms(square_norms: Tensor) -> Tensor:
    """Return the factors ``(n,)`` that make gradients features of norm one, or of norm zero where there is none."""
    return square_norms.clamp(min=SMALLEST_SQUARE).rsqrt()


def mmd2_terms(
    recording: Recording | SketchRecording,
    counts: Sequence[int],
    target: MeanEmbedding,
    weights: Sequence[float],
    estimator: Estimator,
    backend: Backend,
) -> MMD2Terms:
    """Return the discrepancy of recorded samples, sorted by class, from ``target``.

    Args:
        recording: Of the samples, in ascending order of their classes.
        counts: Samples of each class.
        target: Class sums on the samples' device, in their precision.
        weights: Weights of the classes.
        estimator: ``"u"`` leaves out each sample's product with itself, ``"v"`` does not.
        backend: See ``NTKFeatures.mmd2``.
    """
    parts, start, constant = [], 0, 0.0
    classes = zip(counts, weights, target.counts.tolist(), target.square_norms().tolist(), strict=True)
    for label, (count, weight, records, square_norm) in enumerate(classes):
        attract = repel = 0.0
        if weight:
            attract = -2 * weight / (records * count)
            repel = weight / (count * (count - 1 if estimator == "u" else count))
            constant += weight * square_norm / records**2
        if count:
            parts.append(Part(label, start, start + count, attract, repel))
        start += count
    terms = _Terms()
    moving = _Objective.apply(recording, parts, target.blocks, estimator, backend, terms, *recording.tensors)
    return MMD2Terms(moving + constant, moving.new_tensor(constant), terms.cross, terms.spread)


class _Terms:
    """What the objective tells besides its value."""

    cross: Tensor
    spread: Tensor


class _Objective(torch.autograd.Function):
    """The part of the discrepancy that depends on the samples."""

    @staticmethod
    def forward(
        ctx: Any,
        recording: Recording | SketchRecording,
        parts: list[Part],
        target: Mapping[str, Tensor],
        estimator: Estimator,
        backend: Backend,
        terms: _Terms,
        *tensors: Tensor,
    ) -> Tensor:
        derive = any(ctx.needs_input_grad)
        uses = recording.uses(tensors)
        square_norms = sum_of(use.square_norms() for use in uses)
        factors = inverse_norms(square_norms)
        pulls = [use.pull(factors, parts, target, backend, derive) for use in uses]
        attract = square_norms.new_tensor([part.attract for part in parts])
        repel = square_norms.new_tensor([part.repel for part in parts])
        cross = attract.dot(sum_of(pull.cross for pull in pulls))
        spread = repel.dot(sum_of(pull.square for pull in pulls))
        if estimator == "u":
            # a sample's product with itself is 1 and has no derivative, or 0 where there is no gradient
            sizes = torch.tensor([part.stop - part.start for part in parts], device=repel.device)
            spread = spread - (factors.square() * square_norms).dot(
                repel.repeat_interleave(sizes, output_size=len(factors))
            )
        terms.cross, terms.spread = cross / -2, spread
        if derive:
            by_factor = sum_of(pull.by_weight for pull in pulls if pull.by_weight is not None)
            by_square_norm = by_factor * factors.pow(3) * (-0.5 * (square_norms > SMALLEST_SQUARE))
            gradients = [gradient for use in uses for gradient in use.gradients(factors, by_square_norm)]
            ctx.save_for_backward(*(g.reshape(tensor.shape) for g, tensor in zip(gradients, tensors, strict=True)))
        return cross + spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_value: Tensor) -> Any:
        gradients = [by_value * gradient for gradient in ctx.saved_tensors]
        return None, None, None, None, None, None, *gradients


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """Add up tensors of one shape."""
    return functools.reduce(torch.add, tensors)
