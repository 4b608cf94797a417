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
from lightning_eff.synthesis.features.uses import Backend, DoubleUse, LayerUse, Part, RowUse

Estimator = Literal["u", "v"]
SMALLEST_SQUARE = 1e-24
"""A squared norm up to this counts as no gradient: the feature is then zero."""
ROUNDING = 1e-10
"""What a squared norm in float64 can be wrong by, relative to what it were without cancellation; far on the safe side.

A sum over T x T positions of products of sums over inputs and over outputs: at most (T^2 + I + O) * 2.2e-16, where
T^2 < I * O. What has cancelled to less than this is noise of the network's own float32, and its feature fades to zero.
"""
CANCELLED = 800.0
"""Cancellation of squared norms beyond which float32 is not enough: there it is wrong by 1e-4 at worst."""


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


class Lengths(NamedTuple):
    """How long gradients are."""

    square_norms: Tensor
    """``(n,)``"""
    factors: Tensor
    """``(n,)`` what makes them features: of norm one, or zero where there is no gradient, and never longer than one."""
    cancelled: Tensor | None
    """``(n,)`` whether positions cancel so far that float32 is not enough; ``None`` where none are summed up."""


def lengths(uses: Sequence[LayerUse], *, written_out: bool = False) -> Lengths:
    """Measure the gradients of all layers together.

    Args:
        uses: Of every layer.
        written_out: Take squared norms where positions can cancel from the gradients, written out.
    """
    aligned = [use.aligned_square_norms() for use in uses]
    square_norms = sum_of(
        use.per_sample().square().sum(1) if written_out and most is not None else use.square_norms()
        for use, most in zip(uses, aligned, strict=True)
    )
    slack = [most for most in aligned if most is not None]
    if not slack:
        return Lengths(square_norms, _inverse_roots(square_norms), None)
    most = sum_of(slack)
    # its derivative is left out: it matters only where the gradient itself is rounding
    factors = _inverse_roots(square_norms.clamp(min=0) + ROUNDING * most)
    return Lengths(square_norms, factors, most > CANCELLED * square_norms)


def _inverse_roots(squares: Tensor) -> Tensor:
    alive = ~(squares <= SMALLEST_SQUARE)  # NaN is: it is to be seen
    return squares.where(alive, 1.0).rsqrt() * alive


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
        square_norms, factors, cancelled = lengths(uses)
        if cancelled is not None and square_norms.dtype != torch.float64 and bool(cancelled.any()):
            uses = [DoubleUse(use) if isinstance(use, RowUse) and use.positions > 1 else use for use in uses]
            square_norms, factors, _ = lengths(uses)
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
            by_square_norm = -0.5 * by_factor * factors.pow(3)
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
