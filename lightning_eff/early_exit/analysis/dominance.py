"""Gradient dominance: which output pulls a part of the backbone. arXiv 2407.14320 names it, the formula is ours.

With ``g_k`` the gradient of the weighted loss ``w_k L_k`` of output ``k`` with respect to the parameters of a group and
``g`` their sum, the share of an output is ``<g_k, g> / |g|^2``. Shares of a group add up to one; a negative one pulls
against the rest. Shapes: ``B`` batch, ``C`` classes, ``G`` groups, ``K`` outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.arguments import check_choice
from lightning_eff.early_exit.analysis.outputs import Criterion, output_names, outputs_of, own_buffers
from lightning_eff.reporting import Column, Report, Table
from lightning_eff.surgery.state import parameters_require_grad, untouched_generators

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measure = Literal["share", "cosine", "norm"]
Groups = Sequence[str] | Mapping[str, Iterable[nn.Parameter]]

WHOLE = "backbone"


@dataclass(frozen=True, eq=False)
class Dominance(Report):
    """How strongly each output pulls each group of parameters: table ``dominance``.

    Attributes:
        values: ``[G, K]`` float64 on the CPU.
        groups: names of the G groups.
        outputs: names of the K outputs, the backbone's own last.
        measure: ``"share"``, ``"cosine"`` or ``"norm"``.
    """

    values: Tensor
    groups: tuple[str, ...]
    outputs: tuple[str, ...]
    measure: str

    def tables(self) -> dict[str, Table]:
        """One row a group, one column an output."""
        columns = [Column("gradient of", align="left"), *(Column(name, ".3f") for name in self.outputs)]
        rows = [[name, *row] for name, row in zip(self.groups, self.values.tolist(), strict=True)]
        return {"dominance": Table(f"Gradient dominance: {self.measure}", columns, rows)}


@dataclass(frozen=True, eq=False)
class DominanceHistory(Report):
    """Gradient dominance over a training: table and figure ``gradient_dominance``.

    Attributes:
        history: a dict each time, of plain Python: epoch, step, phase (its number, from 0), train (what it trains),
            groups, outputs and values ``[G][K]``.
        measure: ``"share"``, ``"cosine"`` or ``"norm"``.
    """

    history: Sequence[Mapping[str, Any]]
    measure: str

    @property
    def results(self) -> dict[int, Dominance]:
        """What was measured, by epoch; the last where there were two in one."""
        return {
            one["epoch"]: Dominance(
                torch.tensor(one["values"], dtype=torch.float64),
                tuple(one["groups"]),
                tuple(one["outputs"]),
                self.measure,
            )
            for one in self.history
        }

    @property
    def switches(self) -> list[int]:
        """Epochs at which another phase was first seen."""
        pairs = zip(self.history, self.history[1:], strict=False)
        return [later["epoch"] for earlier, later in pairs if earlier["phase"] != later["phase"]]

    def tables(self) -> dict[str, Table]:
        """One row a time and group, one column an output."""
        outputs = self.history[0]["outputs"] if self.history else []
        rows = [
            [one["epoch"], one["step"], one["phase"], one["train"], group, *values]
            for one in self.history
            for group, values in zip(one["groups"], one["values"], strict=True)
        ]
        columns: list[str | Column] = ["epoch", "step", "phase", "phase trains", "gradient of"]
        columns += [Column(f"by {name}", ".3f") for name in outputs]
        return {"gradient_dominance": Table(f"Gradient dominance: {self.measure}", columns, rows)}

    def figures(self) -> dict[str, Figure]:
        """Heat map of epoch and output for every group; none where nothing was measured."""
        from lightning_eff.early_exit.analysis.figures import dominance_figure

        return {"gradient_dominance": dominance_figure(self.results, switches=self.switches)} if self.history else {}


def gradient_dominance(
    network: nn.Module,
    inputs: Any,
    target: Any,
    *,
    weights: Sequence[float] | None = None,
    groups: Groups | None = None,
    measure: Measure = "share",
    criterion: Criterion = F.cross_entropy,
) -> Dominance:
    """Measure on one batch which output's gradient dominates each part of the backbone.

    One forward in the modes the network is in and K backward passes; K gradients of all groups are held at a time.
    ``.grad``, modes, buffers and random generators stay as they are. Frozen parameters are looked at as if they were
    free.

    Args:
        network: its forward gives K logits ``[B, C]``; its ``backbone``, or else all of it, is what is pulled.
        inputs: of one batch, as :func:`lightning_eff.batch.call_model` takes them.
        target: of one batch, as ``criterion`` takes it; class numbers ``[B]`` int64 by default.
        weights: ``w_k >= 0`` of the K losses, used as given; None gives all the same.
        groups: names of submodules of the backbone, or named lists of parameters. By default the stages of the backbone
            (its children that have parameters; where a single child holds all of them, the children of that one) and
            ``"backbone"``, all of it.
        measure: ``"share"``: ``<g_k, g> / |g|^2``; ``"cosine"``: of the angle between ``g_k`` and ``g``; ``"norm"``:
            ``|g_k| / sum_j |g_j|``.
        criterion: ``(logits, target) -> mean loss``.

    Returns:
        Values ``[G, K]``. NaN where the gradients of a group are all zero or, for share and cosine, cancel each other;
        0 for outputs that do not reach a group.

    Raises:
        ValueError: an unknown measure or group, weights of another number, negative, not finite or all zero.
    """
    check_choice("measure", measure, get_args(Measure))
    backbone = getattr(network, "backbone", network)
    named = _parameters(backbone, groups)
    unique = list(dict.fromkeys(parameter for members in named.values() for parameter in members))
    with (
        untouched_generators(),
        torch.compiler.set_stance("force_eager"),
        torch.inference_mode(False),
        torch.enable_grad(),
        parameters_require_grad(network, True),
        own_buffers(network),
    ):
        outputs = outputs_of(network, inputs)
        factors = check_weights(weights, len(outputs))
        losses = [factor * criterion(output, target) for factor, output in zip(factors, outputs, strict=True)]
        gradients = [_gradient(loss, unique, keep=k < len(losses) - 1) for k, loss in enumerate(losses)]
    products = {parameter: _products([gradient[i] for gradient in gradients]) for i, parameter in enumerate(unique)}
    values = []
    for members in named.values():
        whole = torch.stack([products[parameter] for parameter in dict.fromkeys(members)]).sum(0)
        values.append(_measured(whole, measure))
    return Dominance(torch.stack(values), tuple(named), output_names(network, len(outputs)), measure)


def stages(backbone: nn.Module) -> list[str]:
    """Names of the backbone's children that have parameters; where one child holds all of them, of its children.

    Returns:
        Dotted names; empty where the backbone has no such children.
    """
    names: list[str] = []
    module, prefix = backbone, ""
    while len(names) <= 1:
        found = [(name, child) for name, child in module.named_children() if next(child.parameters(), None) is not None]
        if not found:
            break
        names = [prefix + name for name, _ in found]
        module, prefix = found[0][1], f"{names[0]}."
    return names


def _parameters(backbone: nn.Module, groups: Groups | None) -> dict[str, list[nn.Parameter]]:
    if isinstance(groups, Mapping):
        named = {name: list(members) for name, members in groups.items()}
    else:
        found = dict(backbone.named_modules())
        unknown = [name for name in groups or () if name not in found]
        if unknown:
            raise ValueError(
                f"the backbone has no submodules {unknown}: expected names as [name for name, _ in "
                f"backbone.named_modules()] gives them, such as {stages(backbone)}"
            )
        named = {name: list(found[name].parameters()) for name in (stages(backbone) if groups is None else groups)}
        if groups is None:
            named[WHOLE] = list(backbone.parameters())
    empty = [name for name, members in named.items() if not members]
    if empty or not named:
        raise ValueError(f"expected groups that have parameters, got none in {empty or 'an empty list of groups'}")
    return named


def check_weights(weights: Sequence[float] | None, outputs: int) -> list[float]:
    """The weights as a list, equal ones for None; ValueError unless there is one an output, finite and >= 0."""
    given = [1 / outputs] * outputs if weights is None else [float(weight) for weight in weights]
    fine = len(given) == outputs and all(math.isfinite(weight) and weight >= 0 for weight in given) and any(given)
    if not fine:
        raise ValueError(f"expected {outputs} finite weights >= 0, one an output, not all of them zero, got {given}")
    return given


def _gradient(loss: Tensor, parameters: Sequence[nn.Parameter], keep: bool) -> list[Tensor | None]:
    if not loss.requires_grad:  # an output that does not depend on any parameter
        return [None] * len(parameters)
    return list(torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True))


def _products(gradients: Sequence[Tensor | None]) -> Tensor:
    """Inner products ``[K, K]`` of the gradients of one parameter."""
    reached = [k for k, gradient in enumerate(gradients) if gradient is not None]
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    if reached:
        rows = torch.stack([gradient.flatten() for gradient in gradients if gradient is not None])
        # MPS has no float64
        rows = rows.to("cpu" if rows.device.type == "mps" else rows.device, torch.float64)
        products[torch.tensor(reached)[:, None], torch.tensor(reached)] = (rows @ rows.T).cpu()
    return products


def _measured(products: Tensor, measure: Measure) -> Tensor:
    """Turn ``<g_j, g_k>`` [K, K] into the measure [K]."""
    norms = products.diagonal().sqrt()
    with_sum, whole = products.sum(1), products.sum()
    if measure == "norm":
        return norms / norms.sum()
    # a sum smaller than the rounding of its float32 terms says nothing
    if whole.clamp(min=0).sqrt() <= torch.finfo(torch.float32).eps * norms.sum():
        return torch.full_like(norms, torch.nan)
    if measure == "share":
        return with_sum / whole
    return torch.where(norms > 0, with_sum / (norms * whole.sqrt()).where(norms > 0, 1.0), with_sum)
