"""Features of the empirical neural tangent kernel of an untrained network (DP-NTK, arXiv 2303.01687).

``B`` samples, ``C`` classes, ``P`` stored coordinates, ``K`` outputs of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_eff.arguments import check_choice
from lightning_eff.synthesis.embedding import MeanEmbedding
from lightning_eff.synthesis.features.objective import (
    Estimator,
    MMD2Terms,
    lengths,
    mmd2_terms,
    sum_of,
)
from lightning_eff.synthesis.features.precision import full_single_precision
from lightning_eff.synthesis.features.recording import Recording, record
from lightning_eff.synthesis.features.sketch import Sketch, SketchRecording
from lightning_eff.synthesis.features.structure import examine, find_input_shape, frozen_copy
from lightning_eff.synthesis.features.sums import ClassSums, sorted_by_class
from lightning_eff.synthesis.features.uses import Backend, LayerUse, Part

CHUNK_FLOATS = 4_000_000
"""Numbers beyond those of dense layers that one pass may need; more samples are taken in several passes."""


class NTKFeatures(nn.Module):
    """Unit-norm gradients of an untrained network, as features of its inputs.

    The feature of x is the gradient of ``network(x).sum()`` with respect to all parameters, divided by its norm. It is
    written out only by :meth:`dense`; class sums, kernel and discrepancy come from the layers' inputs and output
    derivatives, for ``nn.Linear`` and convolutions. Other layers with parameters, shared ones and parameters used
    outside of layers are worked out by ``torch.func`` for each sample, which a warning tells. Both ways are checked
    against automatic differentiation when this is made.

    Args:
        network: Any module from ``(B, *input_shape)`` to ``(B, ...)``, whose output for a sample depends on that sample
            alone. A copy of it is used: frozen, always in evaluation mode, in float64 where all its weights are, else
            in float32 (half precision has no unit vectors), whatever it is cast to later. Data must not have formed
            its weights if they are to be public.
        input_shape: Shape of one sample; by default ``network.input_shape``, or the inputs of a network that begins
            with a dense layer.
        collapse_last: Keep the K equal rows of the gradient of a last dense layer as one, times sqrt(K). Norms, kernel
            and sensitivity stay the same, in C (K - 1) (width + 1) fewer coordinates.
        drop_final_bias: Leave out the bias of the last dense layer, the same in all gradients.
        sketch_dim: Keep a tensor sketch with so many coordinates, scaled to norm one again, instead of the gradient:
            much less memory, a slower pass over data.
        sketch_seed: Draws the sketch, which is public.

    Raises:
        ValueError: no shape of a sample is known, nothing has a gradient, a layer mixes samples, or the network changes
            its buffers when it is called.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        input_shape: Sequence[int] | None = None,
        collapse_last: bool = True,
        drop_final_bias: bool = False,
        sketch_dim: int | None = None,
        sketch_seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = frozen_copy(network)
        self.input_shape = find_input_shape(network) if input_shape is None else tuple(input_shape)
        self._structure = examine(self.network, self.input_shape, collapse_last, drop_final_bias)
        gradient = self._structure.layout
        self.sketch = Sketch(sketch_dim, gradient, sketch_seed) if sketch_dim is not None else None
        self.layout: dict[str, tuple[int, ...]] = {"sketch": (self.sketch.dim,)} if self.sketch else dict(gradient)
        """Stored shape of each block of a feature: by parameter name, or of the one block ``"sketch"``."""

    def train(self, mode: bool = True) -> NTKFeatures:
        """Stay in evaluation mode: with batch statistics a sample has no gradient of its own."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NTKFeatures:
        """Move to another device, but keep the precision: a module around it may be cast, features are not."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def feature_dim(self) -> int:
        """Stored coordinates P of one feature."""
        return sum(math.prod(shape) for shape in self.layout.values())

    def dense(self, x: Tensor) -> Tensor:
        """Return the features themselves, ``(B, P)`` in the order of :attr:`layout`; for reference and debugging.

        Differentiable in ``x``. Takes B times P numbers of memory.
        """
        uses = self._record(x).uses()
        pieces = {name: piece for use in uses for name, piece in self._pieces(use).items()}
        factors = lengths(uses, written_out=True).factors
        return torch.cat([pieces[name] for name in self.layout], 1) * factors[:, None]

    def kernel(self, x: Tensor, x2: Tensor | None = None) -> Tensor:
        """Return the inner products of features, ``(B, B2)``, with those of ``x2``, by default of ``x`` itself.

        Entries lie in [-1, 1], the diagonal of ``kernel(x)`` is 1. Differentiable in ``x`` and ``x2``.
        """
        ours = self._record(x).uses()
        theirs = ours if x2 is None else self._record(x2).uses()
        left, right = (lengths(uses, written_out=True).factors for uses in (ours, theirs))
        products = sum_of(use.gram(other) for use, other in zip(ours, theirs, strict=True))
        return products * left[:, None] * right

    def class_sums(self, x: Tensor, y: Tensor, num_classes: int) -> MeanEmbedding:
        """Return sums of features by class, and counts, in the network's precision.

        Args:
            x: ``(B, *input_shape)``, or the same numbers in another shape.
            y: ``(B,)`` classes, integers in [0, C).
            num_classes: Classes C.
        """
        sums = self.sums(num_classes, dtype=self._weight.dtype)
        sums.add(x, y)
        return sums.embedding()

    def sums(self, num_classes: int, *, dtype: torch.dtype = torch.float64) -> ClassSums:
        """Return empty class sums on the network's device, to add batches to; totals are kept as ``dtype``.

        Raises:
            ValueError: they would not fit into memory.
        """
        return ClassSums(self._add_parts, self.layout, num_classes, dtype, self._weight)

    def mmd2(
        self,
        target: MeanEmbedding,
        x: Tensor,
        y: Tensor,
        *,
        weights: Tensor | None = None,
        estimator: Estimator = "u",
        backend: Backend = "auto",
    ) -> Tensor:
        """Return the squared mean discrepancy between samples and ``target``, differentiable in ``x``.

        It is the sum over classes of ``weights[c] * ||S_c / m_c - e_c||^2``, with e_c the samples' mean feature.

        Args:
            target: Class sums S_c and counts m_c of features of this network, on the network's device; best in its
                precision, or they are converted each time.
            x: ``(B, *input_shape)``, or the same numbers in another shape.
            y: ``(B,)`` classes, integers in [0, C). Sorted samples spare a copy.
            weights: ``(C,)`` weights of the classes, >= 0; by default 1/C each. A class of weight zero is left out.
            estimator: ``"u"`` is unbiased: it leaves the product of each sample with itself out of ``||e_c||^2``, can
                be slightly negative, and needs two samples of each class. ``"v"`` keeps it, as published.
            backend: ``"kernel"`` works on inner products of samples, ``"dense"`` on one class sum at a time,
                ``"auto"`` takes for each layer and class what is less work. The value is the same.

        Raises:
            ValueError: labels, weights or target do not fit; a class of positive weight has too few samples or no
                count > 0.
        """
        terms: MMD2Terms = self.mmd2_terms(target, x, y, weights=weights, estimator=estimator, backend=backend)
        return terms.mmd2

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def mmd2_terms(
        self,
        target: MeanEmbedding,
        x: Tensor,
        y: Tensor,
        *,
        weights: Tensor | None = None,
        estimator: Estimator = "u",
        backend: Backend = "auto",
    ) -> MMD2Terms:
        """Return :meth:`mmd2` together with the terms it is made of; arguments are the same."""
        target.require_layout(self.layout)
        check_choice("estimator", estimator, ("u", "v"))
        check_choice("backend", backend, ("auto", "kernel", "dense"))
        dtype, device = self._weight.dtype, self._weight.device
        if any(block.device != device for block in target.blocks.values()):
            raise ValueError(f"expected a target on {device}: use target.to({str(device)!r})")
        if any(block.dtype != dtype for block in target.blocks.values()):
            target = target.to(dtype=dtype)
        x, counts = sorted_by_class(x, y, target.num_classes)
        omega = _class_weights(weights, counts, target, estimator)
        recording = self._record(x)
        return mmd2_terms(recording, counts, target, omega, estimator, backend)

    @property
    def _weight(self) -> Tensor:
        return next(self.network.parameters())

    def _record(self, x: Tensor, *, differentiable: bool | None = None) -> Recording | SketchRecording:
        if x[:1].numel() != math.prod(self.input_shape):
            raise ValueError(
                f"expected samples of shape {self.input_shape}, that is {math.prod(self.input_shape)} numbers each, "
                f"got a batch of shape {tuple(x.shape)}"
            )
        if differentiable is None:
            differentiable = x.requires_grad and torch.is_grad_enabled()
        x = x.reshape(len(x), *self.input_shape).to(self._weight)
        recording = record(
            self.network, self._structure.layers, self._structure.others, x, differentiable=differentiable
        )
        return recording if self.sketch is None else SketchRecording(self.sketch, recording, differentiable)

    def _pieces(self, use: LayerUse) -> dict[str, Tensor]:
        sizes = [math.prod(self.layout[name]) for name in use.names]
        return dict(zip(use.names, torch.split(use.per_sample(), sizes, 1), strict=True))

    def _add_parts(self, x: Tensor, parts: Sequence[Part], sums: Mapping[str, Tensor]) -> Tensor:
        """Add features of ``x``, sorted by class, to ``sums``; return the squared norms of the gradients ``(B,)``.

        They are 0 where the feature is zero.
        """
        found = []
        with torch.no_grad(), full_single_precision():
            for rows, inside in self._chunks(len(x), parts):
                # float64 from here on: the norm is that of the very vector that is added, and adding does not round
                uses = [use.double() for use in self._record(x[rows], differentiable=False).uses()]
                square_norms, factors, _ = lengths(uses)
                for use in uses:
                    use.add_sums(factors, inside, sums)
                found.append(square_norms.masked_fill(factors == 0, 0))
        return torch.cat(found)

    def _chunks(self, n: int, parts: Sequence[Part]) -> Iterator[tuple[slice, list[Part]]]:
        floats = max(self._structure.sample_floats, self.sketch.dim if self.sketch else 0)
        step = max(1, CHUNK_FLOATS // floats) if floats else n
        for start in range(0, n, step):
            stop = min(start + step, n)
            inside = [
                Part(part.label, max(part.start, start) - start, min(part.stop, stop) - start)
                for part in parts
                if part.start < stop and part.stop > start
            ]
            yield slice(start, stop), inside


def _class_weights(
    weights: Tensor | None, counts: Sequence[int], target: MeanEmbedding, estimator: Estimator
) -> list[float]:
    """Return the weights of the classes, once they are known to fit."""
    classes = target.num_classes
    omega: list[float] = [1 / classes] * classes if weights is None else weights.detach().double().tolist()
    if len(omega) != classes or not all(0 <= weight < math.inf for weight in omega):
        raise ValueError(f"expected {classes} finite weights >= 0, one for each class, got {weights}")
    needed = 2 if estimator == "u" else 1
    for label, (weight, count, records) in enumerate(zip(omega, counts, target.counts.tolist(), strict=True)):
        if weight and count < needed:
            raise ValueError(
                f"expected at least {needed} samples of class {label} (estimator {estimator!r}), got {count}: draw "
                "more of each class, or give the class weight 0"
            )
        if weight and not records > 0:
            raise ValueError(f"class {label} has a count of {records}: give it weight 0, it has no mean")
    return omega
