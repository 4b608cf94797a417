"""Second moments of what layers read in the whole network, taken once, and weights for any plan from them.

``G = E[x x^T]`` over calibration inputs and sampled output positions serves every candidate, criterion and budget: a
plan that keeps the inputs ``S`` is answered by ``W' = W G[:, S] (G[S, S] + ridge d I)^-1`` with ``d`` the mean diagonal
of ``G`` (of all inputs, so that factors can be shared). Where all plans keep the best inputs of one ranking, ordering
the inputs by it makes ``G[S, S]`` a leading block, whose Cholesky factor is the leading block of one factor.

Shape letters: as in :mod:`lightning_eff.pruning.repair.layout`; ``S`` kept columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_eff.batch import SplitBatch, call_model
from lightning_eff.pruning.repair.calibration import Seen, calibration_inputs, exact_products, watched
from lightning_eff.pruning.repair.consumers import (
    computes_plainly,
    layouts_of,
    readers,
    warn_of_few_rows,
    warn_of_skipped,
)
from lightning_eff.pruning.repair.layout import Layout, Mode
from lightning_eff.pruning.repair.least_squares import (
    Penalty,
    about_zero,
    checked,
    ridge_fit,
    solve_type,
    substituted_back,
    summed_type,
    unexplained,
)
from lightning_eff.pruning.repair.scatter import Scatter
from lightning_eff.surgery import ChannelGraph
from lightning_eff.surgery.errors import unknown_name
from lightning_eff.surgery.state import quiet_model


class Solution(NamedTuple):
    """Corrected tensors of a layer in the shape they have after the cut.

    ``bias`` is None where it stays as it is; ``relative_error`` is the part of the layer's output (of its variance,
    where the bias is fitted) that the kept inputs do not explain, on the calibration samples.
    """

    weight: Tensor
    bias: Tensor | None
    relative_error: float


class Moments:
    """Second moments of the inputs of every layer that reads a prunable group.

    Attributes:
        graph: the channel graph they were collected for.
        mode: ``"kernel"`` or ``"channel"``, as collected.
        layers: moments by path.
        skipped: layers that are not corrected, and why.
    """

    def __init__(
        self, graph: ChannelGraph, mode: Mode, layers: Mapping[str, LayerMoments], skipped: Mapping[str, str]
    ) -> None:
        self.graph = graph
        self.mode = mode
        self.layers = dict(layers)
        self.skipped = dict(skipped)

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        graph: ChannelGraph,
        batches: Sequence[Any],
        *,
        split_batch: SplitBatch | None = None,
        samples: int | None = None,
        positions: int = 32,
        mode: Mode = "kernel",
        max_memory_mb: float = 2048,
        seed: int = 0,
    ) -> Moments:
        """Run ``model`` over calibration batches in evaluation mode.

        Args:
            model: the whole network; left as it was. Its weights now are those that solutions are made of.
            graph: its channel graph.
            batches: raw batches on the model's device.
            split_batch: ``batch -> (inputs, target)``, for batches of another form.
            samples: samples used at most; None for all.
            positions: output positions of a convolution used per sample.
            mode: ``"kernel"``, or ``"channel"`` for the cheaper moments of whole channels.
            max_memory_mb: limit beyond which the largest layers are taken in mode ``"channel"``.
            seed: of the positions.

        Raises:
            ValueError: there is not a single sample.
        """
        paths = readers(graph, graph.prunable)
        layouts, skipped = layouts_of(model, graph, paths, mode, max_memory_mb)
        sums: dict[str, _Sums] = {}

        def receive(path: str, seen: Seen) -> None:
            if path in skipped:
                return
            if path not in sums:
                if not computes_plainly(seen):
                    skipped[path] = "its output is not what its weight gives (a forward of its own)"
                    return
                sums[path] = _Sums(seen)
            for rows in seen.rows():
                sums[path].scatter.add(rows, rows)

        with quiet_model(model), torch.no_grad(), exact_products():  # noqa: SIM117
            with watched(model, layouts, receive, positions=positions, seed=seed):
                for inputs in calibration_inputs(batches, split_batch, samples):
                    call_model(model, inputs)
        for path in layouts:
            if path not in sums and path not in skipped:
                skipped[path] = "it was not called"
        warn_of_skipped(skipped)
        layers = {path: LayerMoments.of(path, sums.pop(path)) for path in layouts if path in sums}
        warn_of_few_rows([path for path, layer in layers.items() if layer.count < layer.layout.columns])
        return cls(graph, mode, layers, skipped)

    def solve(
        self,
        path: str,
        keep_in: Tensor,
        keep_out: Tensor | None = None,
        ridge: float = 1e-3,
        *,
        fit_bias: bool = True,
    ) -> Solution:
        """Fit a layer's weights on kept inputs to its output in the whole network.

        Args:
            path: of the layer.
            keep_in: kept positions of its input axis, bool ``[in]``.
            keep_out: kept positions of its output axis, bool ``[out]``; None for all.
            ridge: penalty as a fraction of the inputs' mean second moment.
            fit_bias: fit the bias too, where the layer has one.

        Raises:
            KeyError: the layer has no moments.
            RepairError: its inputs were not finite, or the moments are singular beyond any ridge.
        """
        if path not in self.layers:
            raise unknown_name("layer with moments", path, self.layers)
        problem = _Problem(self.layers[path], keep_in, keep_out, fit_bias)
        penalty = self.layers[path].penalty(ridge, problem.centre)
        fit = ridge_fit(problem.gram(), problem.cross, problem.energy, penalty, path)
        return problem.solution(*fit)

    def nested(self, rankings: Mapping[str, Tensor]) -> NestedMoments:
        """Prepare for plans that all keep the best channels of the same rankings.

        Args:
            rankings: for each group its channels, best first, int64 ``[C]``.
        """
        return NestedMoments(self, rankings)


class NestedMoments:
    """Moments whose inputs are ordered by rankings, so that one factor a layer serves every plan.

    Kept sets that are not the best channels of one ranking are solved on their own. Factors take as much memory again
    as the moments.
    """

    def __init__(self, moments: Moments, rankings: Mapping[str, Tensor]) -> None:
        self.moments = moments
        self.mode = moments.mode
        self.skipped = moments.skipped
        self._ranks = {moments.graph.resolve(name).name: _inverse(order) for name, order in rankings.items()}
        self._orders: dict[str, Tensor | None] = {}
        self._factors: dict[tuple[str, float, bool], _Factor] = {}

    def solve(
        self,
        path: str,
        keep_in: Tensor,
        keep_out: Tensor | None = None,
        ridge: float = 1e-3,
        *,
        fit_bias: bool = True,
    ) -> Solution:
        """Give the same as :meth:`Moments.solve`."""
        order = self._order(path)
        if order is None:
            return self.moments.solve(path, keep_in, keep_out, ridge, fit_bias=fit_bias)
        layer = self.moments.layers[path]
        kept = layer.layout.kept_columns(keep_in)[order]
        count = int(kept.sum())
        if not kept[:count].all():
            return self.moments.solve(path, keep_in, keep_out, ridge, fit_bias=fit_bias)
        if (path, ridge, fit_bias) not in self._factors:
            self._factors[path, ridge, fit_bias] = _Factor.of(layer, order, ridge, fit_bias)
        factor = self._factors[path, ridge, fit_bias]
        problem = _Problem(layer, keep_in, keep_out, fit_bias)
        with exact_products():
            ordered = substituted_back(factor.lower[:, :count, :count], factor.reduced[:, :count, problem.rows])
        natural = order[:count].argsort()
        weights = checked(ordered[:, natural.to(ordered.device)].transpose(1, 2), path)
        return problem.solution(weights, unexplained(weights, problem.cross, problem.energy, factor.added))

    def _order(self, path: str) -> Tensor | None:
        """Columns of a layer, those of no ranked group first, then best first; None where several groups are ranked."""
        if path not in self._orders:
            self._orders[path] = self._make_order(path)
        return self._orders[path]

    def _make_order(self, path: str) -> Tensor | None:
        if path not in self.moments.layers:
            return None  # the moments say so
        layout = self.moments.layers[path].layout
        rank = torch.full((layout.inputs,), -1)
        members = [(name, m) for name in self._ranks for m in self.moments.graph.groups[name].consumers]
        members = [(name, m) for name, m in members if m.path == path]
        if len({name for name, _ in members}) != 1:
            return None
        for name, m in members:
            rank[m.index] = self._ranks[name][m.root]
        return layout.kept_columns(rank).argsort(stable=True)


Solver: TypeAlias = Moments | NestedMoments


@dataclass(eq=False)
class LayerMoments:
    """What is known of one layer.

    Attributes:
        path: of the layer.
        layout: its layout.
        weight: of the layer in the whole network.
        bias: likewise; None where it has none.
        covariance: of the inputs ``[J, K, K]``.
        mean: of the inputs ``[J, K]``.
        count: rows.
    """

    path: str
    layout: Layout
    weight: Tensor
    bias: Tensor | None
    covariance: Tensor
    mean: Tensor
    count: float

    @classmethod
    def of(cls, path: str, sums: _Sums) -> LayerMoments:
        """Average sums."""
        scatter = sums.scatter
        return cls(path, sums.layout, sums.weight, sums.bias, scatter.covariance(), scatter.means[0], scatter.count)

    @cached_property
    def matrix(self) -> Tensor:
        """Weights ``[J, R, K]`` in the type of the moments."""
        return self.layout.matrix(self.weight).to(self.covariance.dtype)

    @cached_property
    def cross(self) -> Tensor:
        """Covariance between outputs and inputs ``[J, R, K]``."""
        with exact_products():
            return self.matrix @ self.covariance

    @cached_property
    def energy(self) -> Tensor:
        """Variances of the outputs ``[J, R]``."""
        return (self.cross * self.matrix).sum(2).double()

    @cached_property
    def output_mean(self) -> Tensor:
        """Means of the outputs without bias ``[J, R]``."""
        return (self.matrix.double() @ self.mean.unsqueeze(2)).squeeze(2)

    def penalty(self, ridge: float, centre: bool) -> Penalty:
        """The ridge on all inputs, or on what they vary."""
        diagonal = self.covariance.diagonal(dim1=-2, dim2=-1).double()
        scale = float((diagonal if centre else diagonal + self.mean.square()).mean())
        return Penalty(ridge, max(0.0, scale), summed_type(self.weight))


class _Sums:
    """Sums over the inputs of one layer, and the weights it has now."""

    def __init__(self, seen: Seen) -> None:
        self.layout, bias = seen.layout, seen.module._parameters.get("bias")
        self.weight = seen.module.get_parameter("weight").detach().clone()
        self.bias = None if bias is None else bias.detach().clone()
        self.scatter = Scatter(solve_type(seen.layout.columns, summed_type(self.weight)))


class _Problem:
    """What is solved for one layer, one set of kept inputs and one of kept outputs."""

    def __init__(self, layer: LayerMoments, keep_in: Tensor, keep_out: Tensor | None, fit_bias: bool) -> None:
        layout, device = layer.layout, layer.covariance.device
        keep_out = torch.ones(layout.outputs, dtype=torch.bool) if keep_out is None else keep_out.cpu()
        keep_in = keep_in.cpu()
        for mask, length, axis in ((keep_in, layout.inputs, "in"), (keep_out, layout.outputs, "out")):
            if mask.shape != (length,) or not mask.any():
                raise ValueError(f"{layer.path}: expected keep_{axis} to be bool [{length}] that keeps at least one")
        self.layer, self.keep_out = layer, keep_out.nonzero().flatten().to(device)
        self.smaller = layout.cut(keep_in, keep_out)
        self.centre = fits_bias(layout, layer.bias, fit_bias)
        self.columns = layout.kept_columns(keep_in).nonzero().flatten().to(device)
        self.rows = layout.kept_rows(keep_out).nonzero().flatten().to(device)
        self.mean, self.output_mean = layer.mean[:, self.columns], layer.output_mean[:, self.rows]
        cross = layer.cross[:, self.rows[:, None], self.columns]
        self.cross = cross if self.centre else about_zero(cross, self.output_mean, self.mean)
        energy = layer.energy[:, self.rows]
        self.energy = float((energy if self.centre else energy + self.output_mean.square()).sum())

    def gram(self) -> Tensor:
        """Second moments of the kept inputs, about their means where the bias is fitted."""
        gram = self.layer.covariance[:, self.columns[:, None], self.columns]
        return gram if self.centre else about_zero(gram, self.mean, self.mean)

    def solution(self, weights: Tensor, relative_error: float) -> Solution:
        """Give fitted weights ``[J, R, S]`` the layer's shape, and find the bias that goes with them."""
        bias = None if self.layer.bias is None else self.layer.bias[self.keep_out]
        means = (self.mean, self.output_mean) if self.centre else None
        return solution(self.smaller, weights, self.layer.weight, bias, means, relative_error)


class _Factor(NamedTuple):
    """Cholesky factor ``[J, K, K]`` of ordered moments, and ``reduced = factor^-1 cross^T`` ``[J, K, R]``."""

    lower: Tensor
    reduced: Tensor
    added: float

    @classmethod
    def of(cls, layer: LayerMoments, order: Tensor, ridge: float, fit_bias: bool) -> _Factor:
        centre = fits_bias(layer.layout, layer.bias, fit_bias)
        order = order.to(layer.covariance.device)
        gram, cross = layer.covariance[:, order[:, None], order], layer.cross[:, :, order]
        if not centre:
            mean = layer.mean[:, order]
            gram, cross = about_zero(gram, mean, mean), about_zero(cross, layer.output_mean, mean)
        lower, added = layer.penalty(ridge, centre).factor(gram, layer.path)
        return cls(lower, torch.linalg.solve_triangular(lower, cross.transpose(1, 2), upper=False), added)


def fits_bias(layout: Layout, bias: Tensor | None, wanted: bool) -> bool:
    """Whether the bias is fitted: a constant does not pass a transposed convolution as one number per output."""
    return wanted and bias is not None and not layout.transposed


def solution(
    layout: Layout,
    weights: Tensor,
    dense: Tensor,
    bias: Tensor | None,
    means: tuple[Tensor, Tensor] | None,
    relative_error: float,
) -> Solution:
    """Give fitted weights the shape of a layer.

    Args:
        layout: of the smaller layer.
        weights: ``[J, R, K]``.
        dense: its weight before the cut.
        bias: of the outputs that stay.
        means: of the kept inputs ``[J, K]`` and of the wanted outputs without bias ``[J, R]``, to fit the bias.
        relative_error: handed on.
    """
    if means is not None and bias is not None:
        moved = means[1] - (weights.double() @ means[0].double().unsqueeze(2)).squeeze(2)
        bias = (bias + layout.fold(moved)).to(bias.dtype)
    weight = layout.weight(weights, dense.shape[2:]).to(dense.dtype)
    return Solution(weight, None if means is None else bias, relative_error)


def _inverse(order: Tensor) -> Tensor:
    """Rank of each channel: int64 ``[C]``."""
    order = order.cpu()
    if order.sort().values.tolist() != list(range(len(order))):
        raise ValueError(f"expected a ranking to hold every channel once, got {order.tolist()}")
    return order.argsort()
