"""The loss between two networks and around one, for every output (arXiv 2407.14320; filter norms: arXiv 1712.09913).

A barrier on the straight line between two checkpoints says that training took them to different basins. Parameters
are never written to: the network looks at other tensors while a point is measured. ``S`` steps, ``P`` points, ``K``
outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_eff.arguments import check_choice
from lightning_eff.batch import SplitBatch, batch_size
from lightning_eff.early_exit.analysis.outputs import Criterion, batches_of, output_names, outputs_of, own_buffers
from lightning_eff.reporting import Column, Report, Table
from lightning_eff.reporting import progress as progress_bar
from lightning_eff.surgery.state import quiet_model, untouched_generators

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Normalise = Literal["filter", "layer", "none"]


@dataclass(frozen=True, eq=False)
class LinearPath(Report):
    """Loss and accuracy along ``(1 - a) * A + a * B``.

    Attributes:
        positions: ``a``, ``[P]`` from 0 to 1.
        loss: ``[P, K]`` float64, mean over the samples.
        accuracy: ``[P, K]`` float64; NaN where the target is not classes.
        outputs: names of the K outputs.
    """

    positions: Tensor
    loss: Tensor
    accuracy: Tensor
    outputs: tuple[str, ...]

    @property
    def barrier(self) -> Tensor:
        """``max_a L(a) - ((1 - a) L(0) + a L(1))`` of every output, ``[K]``, >= 0."""
        return (
            (self.loss - self.loss[0] - self.positions[:, None] * (self.loss[-1] - self.loss[0])).amax(0).clamp(min=0)
        )

    def figures(self) -> dict[str, Figure]:
        """Loss and accuracy of every output along the path."""
        from lightning_eff.early_exit.analysis.figures import path_figure

        return {"path": path_figure(self)}

    def tables(self) -> dict[str, Table]:
        """One row an output: both ends, the worst between, the barrier."""
        loss, accuracy = self.loss, self.accuracy
        columns = {
            "loss A": loss[0],
            "loss B": loss[-1],
            "highest loss": loss.amax(0),
            "barrier": self.barrier,
            "accuracy A": accuracy[0],
            "accuracy B": accuracy[-1],
            "lowest accuracy": accuracy.amin(0),
        }
        headings = [Column(name, ".2%" if "accuracy" in name else ".4f") for name in columns]
        rows = zip(self.outputs, *(values.tolist() for values in columns.values()), strict=True)
        return {"path": Table("Loss on the straight line from A to B", ["output", *headings], rows)}


@dataclass(frozen=True, eq=False)
class LossPlane(Report):
    """Loss and accuracy at ``theta + a * u + b * v`` for two random directions ``u`` and ``v``.

    Attributes:
        positions: of ``a`` and of ``b``, ``[S]`` from -radius to radius.
        loss: ``[S, S, K]`` float64, ``a`` along the first axis.
        accuracy: ``[S, S, K]`` float64; NaN where the target is not classes.
        outputs: names of the K outputs.
    """

    data_tables = frozenset({"points"})

    positions: Tensor
    loss: Tensor
    accuracy: Tensor
    outputs: tuple[str, ...]

    def tables(self) -> dict[str, Table]:
        """One row an output: the lowest and highest loss, and the range of accuracy; the losses of every point."""
        loss, accuracy = self.loss.flatten(0, 1), self.accuracy.flatten(0, 1)
        ends = [ends.tolist() for ends in (*loss.aminmax(dim=0), *accuracy.aminmax(dim=0))]
        losses = [Column(name, ".4f") for name in ("lowest loss", "highest loss")]
        columns = [*losses, Column("lowest accuracy", ".2%"), Column("highest accuracy", ".2%")]
        outputs = Table("Loss around the network", ["output", *columns], zip(self.outputs, *ends, strict=True))
        places = product(self.positions.tolist(), self.positions.tolist())
        points = [(*place, *row) for place, row in zip(places, loss.tolist(), strict=True)]
        names = ["first direction", "second direction", *(f"loss of {name}" for name in self.outputs)]
        return {"plane": outputs, "points": Table("Losses of points", names, points)}

    def figures(self) -> dict[str, Figure]:
        """Contours of the loss of every output."""
        from lightning_eff.early_exit.analysis.figures import plane_figure

        return {"plane": plane_figure(self)}


def linear_path(
    network: nn.Module,
    other: nn.Module | Mapping[str, Any],
    loader: Iterable[Any],
    points: int = 11,
    recompute_bn: bool = True,
    *,
    criterion: Criterion = F.cross_entropy,
    split_batch: SplitBatch | None = None,
    progress: bool = True,
) -> LinearPath:
    """Loss and accuracy of every output on the straight line between two checkpoints of one architecture.

    Networks are run in evaluation mode. Parameters, buffers, modes and random generators stay bit for bit as they are.

    Args:
        network: A, gives a list of K logits ``[B, C]``.
        other: B, a network or its ``state_dict()``.
        loader: gone through at every point, twice where statistics are re-estimated; a list of batches is fine.
        points: of the grid from 0 to 1, >= 2.
        recompute_bn: re-estimate the running statistics of batch norms at every point, as the mean over the batches;
            else they are interpolated like parameters. Those of A and B do not fit the networks between them.
        criterion: ``(logits, target) -> mean loss``.
        split_batch: ``batch -> (inputs, target)``; by default batches are pairs.
        progress: show a bar.

    Raises:
        ValueError: ``points`` < 2, a loader that can be gone through but once, or parameters that differ in name or
            shape.
    """
    if points < 2:
        raise ValueError(f"expected points >= 2, the two ends, got {points}")
    _check_loader(loader)
    ends = _matching(network, other)
    positions = torch.linspace(0, 1, points, dtype=torch.float64)
    data = _Data(network, loader, split_batch, criterion, recompute_bn)
    measured = []
    with _studied(network), progress_bar("linear path", points, enabled=progress, unit="points") as bar:
        starts = {name: tensor.detach().clone() for name, tensor in _named_tensors(network)}
        # whole numbers have nothing between them, and equal values may be infinite: thresholds of exits that are off
        moving = [name for name, end in ends.items() if end.is_floating_point() and not torch.equal(starts[name], end)]
        for position in positions.tolist():
            _place(network, {name: torch.lerp(starts[name], ends[name], position) for name in moving})
            measured.append(data.measure())
            bar.advance()
    loss, accuracy = (torch.stack(rows) for rows in zip(*measured, strict=True))
    return LinearPath(positions, loss, accuracy, output_names(network, loss.shape[-1]))


def loss_plane(
    network: nn.Module,
    loader: Iterable[Any],
    steps: int = 21,
    radius: float = 1.0,
    seed: int = 0,
    normalise: Normalise = "filter",
    *,
    vectors: bool = False,
    recompute_bn: bool = False,
    criterion: Criterion = F.cross_entropy,
    split_batch: SplitBatch | None = None,
    progress: bool = True,
) -> LossPlane:
    """Loss and accuracy of every output on a plane around a network, spanned by two random directions.

    The network is run in evaluation mode. Parameters, buffers, modes and random generators stay bit for bit as they
    are.

    Args:
        network: gives a list of K logits ``[B, C]``.
        loader: gone through ``steps * steps`` times; a list of a few batches is fine.
        steps: points along each axis, >= 2; an odd number has the network itself in the middle.
        radius: largest step along a direction, > 0; with ``normalise="filter"`` in units of the weights' own norm.
        seed: of the directions.
        normalise: see :func:`random_direction`.
        vectors: see :func:`random_direction`.
        recompute_bn: re-estimate the running statistics of batch norms at every point.
        criterion: ``(logits, target) -> mean loss``.
        split_batch: ``batch -> (inputs, target)``; by default batches are pairs.
        progress: show a bar.

    Raises:
        ValueError: an argument outside its range, or a loader that can be gone through but once.
    """
    if steps < 2 or not 0 < radius < float("inf"):
        raise ValueError(f"expected steps >= 2 and radius > 0, got {steps} and {radius}")
    _check_loader(loader)
    generator = torch.Generator().manual_seed(seed)
    first, second = (random_direction(network, generator, normalise, vectors=vectors) for _ in range(2))
    # not linspace, whose middle is a rounding away from zero for some radii
    positions = torch.arange(1 - steps, steps, 2, dtype=torch.float64) / (steps - 1) * radius
    data = _Data(network, loader, split_batch, criterion, recompute_bn)
    measured = []
    with _studied(network), progress_bar("loss plane", steps * steps, enabled=progress, unit="points") as bar:
        centre = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        for a, b in product(positions.tolist(), repeat=2):
            _place(network, {name: centre[name] + a * first[name] + b * second[name] for name in first})
            measured.append(data.measure())
            bar.advance()
    loss, accuracy = (torch.stack(rows).reshape(steps, steps, -1) for rows in zip(*measured, strict=True))
    return LossPlane(positions, loss, accuracy, output_names(network, loss.shape[-1]))


def random_direction(
    network: nn.Module, generator: torch.Generator, normalise: Normalise = "filter", *, vectors: bool = False
) -> dict[str, Tensor]:
    """Draw a Gaussian direction in the space of the parameters.

    Args:
        network: whose parameters it is for.
        generator: on the CPU, so that every device gets the same direction.
        normalise: ``"filter"``: each filter (row) gets the norm of the weights in its place; ``"layer"``: each tensor
            does; ``"none"``: nothing is scaled.
        vectors: whether tensors of at most one dimension (biases, batch norms) move too; a whole one is their filter.

    Returns:
        Tensors like the parameters, by name; zeros for those that do not move.

    Raises:
        ValueError: an unknown ``normalise``.
    """
    check_choice("normalise", normalise, get_args(Normalise))
    direction = {}
    for name, parameter in network.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        drawn = drawn.to(parameter.device, parameter.dtype)
        if parameter.ndim < 2 and not vectors:
            drawn = torch.zeros_like(drawn)
        elif normalise != "none":
            by_filter = normalise == "filter" and parameter.ndim > 1
            shape = (len(parameter), -1) if by_filter else (1, -1)
            wanted, has = (tensor.detach().reshape(shape).norm(dim=1, keepdim=True) for tensor in (parameter, drawn))
            drawn = (drawn.reshape(shape) * (wanted / has)).reshape(parameter.shape)
        direction[name] = drawn
    return direction


@dataclass(frozen=True)
class _Data:
    """How a point is measured."""

    network: nn.Module
    loader: Iterable[Any]
    split_batch: SplitBatch | None
    criterion: Criterion
    recompute_bn: bool

    def measure(self) -> tuple[Tensor, Tensor]:
        """Loss and accuracy ``[K]`` of the network as it is placed."""
        with untouched_generators():  # a loader that shuffles gives the same order at every point
            if self.recompute_bn:
                self._estimate_statistics()
            loss = right = torch.zeros(())
            seen = 0
            for inputs, target in self._batches():
                outputs, count = outputs_of(self.network, inputs), batch_size(target)
                loss = loss + count * torch.stack([self.criterion(output, target).double().cpu() for output in outputs])
                right = right + torch.stack([_right(output, target) for output in outputs])
                seen += count
        return loss / seen, right / seen

    def _estimate_statistics(self) -> None:
        # torch.optim.swa_utils.update_bn would switch dropout on as well and knows only batches that are tensors
        norms = [m for m in self.network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if not norms:
            return
        momenta = [norm.momentum for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.training = True
            usable = False
            for inputs, target in self._batches():
                if batch_size(target) > 1:  # one sample has no variance
                    outputs_of(self.network, inputs)
                    usable = True
            if not usable:
                raise ValueError(
                    "statistics of batch norms cannot be estimated from batches of one sample: give larger batches or "
                    "recompute_bn=False"
                )
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                norm.training = False

    def _batches(self) -> Iterator[tuple[Any, Any]]:
        return batches_of(self.loader, self.network, self.split_batch)


def _right(output: Tensor, target: Any) -> Tensor:
    """How many samples are classified correctly; NaN where ``target`` is not classes."""
    classes = isinstance(target, Tensor) and not target.is_floating_point() and target.shape == output.shape[:1]
    right = (output.argmax(1) == target).sum() if classes else torch.tensor(torch.nan)
    return right.double().cpu()


@contextmanager
def _studied(network: nn.Module) -> Iterator[None]:
    """Let parameters and buffers be other tensors; on leaving all are back, their memory never written to."""
    parameters = [(parameter, parameter.data) for parameter in network.parameters()]
    with quiet_model(network), torch.no_grad(), own_buffers(network):
        try:
            yield
        finally:
            for parameter, data in parameters:
                parameter.data = data


def _place(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in _named_tensors(network):
        if name not in tensors:
            continue
        if isinstance(tensor, nn.Parameter):
            # .data and not the attribute: recurrent layers keep references of their own to their parameters
            tensor.data = tensors[name]
        else:
            tensor.copy_(tensors[name])


def _named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


def _matching(network: nn.Module, other: nn.Module | Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of ``other`` under the names of the network's parameters and buffers, on its device."""
    state = other.state_dict() if isinstance(other, nn.Module) else other
    theirs = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    ours = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    problems = [f"{name} is missing" for name in ours.keys() - theirs.keys()]
    problems += [f"{name} is not in the network" for name in theirs.keys() - ours.keys()]
    problems += [
        f"{name} has shape {list(theirs[name].shape)} instead of {list(ours[name].shape)}"
        for name in ours.keys() & theirs.keys()
        if theirs[name].shape != ours[name].shape
    ]
    if problems:
        few = ", ".join(sorted(problems)[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(
            f"expected two checkpoints of one architecture, but in the other one {few}: give a network built alike or "
            "its state_dict()"
        )
    return {
        name: theirs[name].detach().to(tensor.device, tensor.dtype, copy=True)
        for name, tensor in _named_tensors(network)
        if name in theirs
    }


def _check_loader(loader: Any) -> None:
    if isinstance(loader, Iterator):
        raise ValueError(
            "expected a loader that can be gone through again at every point, got an iterator: give a DataLoader or "
            "list(...) of the batches"
        )
