"""What pruning did: a table of layers, the course of the run, and pictures of the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_eff.documents import parsed
from lightning_eff.pruning.allocation import Dense
from lightning_eff.reporting import KEPT, REMOVED, Column, Report, Table, human, new_figure
from lightning_eff.surgery import ChannelGraph

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Scores:
    """Scores of one group's channels, higher is better.

    Attributes:
        values: ``[C]``.
        stderr: standard errors ``[C]``; None where the criterion has none.
        ties: breaks ties between equal values ``[C]``, higher is better; None for the channel's number.
        curve: value of the network without its ``r`` worst channels, ``[C]`` for r = 0..C-1; None when not measured.
    """

    values: Tensor
    stderr: Tensor | None = None
    ties: Tensor | None = None
    curve: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists for JSON and checkpoints."""
        return {name: None if tensor is None else tensor.tolist() for name, tensor in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scores:
        """Read what :meth:`to_dict` wrote; ValueError for anything else."""
        plain = parsed(dict[str, list[float] | None], data, "the scores")
        if plain.get("values") is None or len({len(column) for column in plain.values() if column is not None}) > 1:
            raise ValueError("expected scores with values, and columns of one length")
        return cls(**{name: column and torch.tensor(column, dtype=torch.float64) for name, column in plain.items()})


@dataclass(frozen=True)
class Stage:
    """The network at one moment of the run.

    Attributes:
        name: ``"dense"``, ``"pruned, step 1"`` ..., ``"fine-tuned"``.
        epoch: epochs trained.
        value: mean value on the evaluation data.
        macs: multiply-adds per sample.
        params: parameters.
        latency_ms: one sample, one thread.
    """

    name: str
    epoch: int
    value: float
    macs: int
    params: int
    latency_ms: float


@dataclass
class PruneReport(Report):
    """Everything to show of one run: tables ``layers`` and ``course``, and the figure ``scores`` where there are any.

    Attributes:
        value_name: what ``Stage.value`` is.
        data: what it was measured on, in words.
        dense: the network before the first cut.
        graph: the channel graph as it is now.
        stages: the course of the run.
        scores: the last scores of each group, with the channels (as scored) that stayed.
        removed_value: sum of the scores of the channels removed, over all steps.
        notes: what a reader must know.
    """

    value_name: str
    data: str
    dense: Dense
    graph: ChannelGraph
    stages: Sequence[Stage]
    scores: Mapping[str, tuple[Scores, Sequence[int]]] = field(default_factory=dict)
    removed_value: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def tables(self) -> dict[str, Table]:
        """Channel groups before and after, and the stages of the run."""
        return {"layers": self._layers(), "course": self._course()}

    def figures(self) -> dict[str, Figure]:
        """Scores of the channels kept and removed."""
        return {"scores": scores_figure(self.scores)} if self.scores else {}

    def _layers(self) -> Table:
        """One row per channel group that could be pruned, and the total."""
        rows: list[tuple[Any, ...]] = []
        before, now = (
            self.graph.costs.by_path(torch.tensor([list(sizes.values())], dtype=torch.float64))
            for sizes in (self.dense.sizes, self.graph.sizes)
        )
        for name, group in self.graph.groups.items():
            if group.protected and group.size == self.dense.sizes[name]:
                continue
            paths = {m.path for m in group.members if m.axis == "out"}
            rows.append(
                (
                    name if len(group.producers) == 1 else f"{name} (+{len(group.producers) - 1})",
                    self.dense.sizes[name] * group.block,
                    group.size * group.block,
                    self.removed_value.get(name),
                    *(sum(costs.get(path, (0, 0))[i] for path in paths) for i in (1, 0) for costs in (before, now)),
                )
            )
        first, last = self.stages[0], self.stages[-1]
        rows.append(
            (
                "whole network",
                sum(row[1] for row in rows),
                sum(row[2] for row in rows),
                None,
                first.params,
                last.params,
                first.macs,
                last.macs,
            )
        )
        columns: list[str | Column] = [
            "layer",
            Column("channels", format=","),
            Column("kept", format=","),
            Column("value removed", format=".4f"),
            Column("parameters", format=","),
            Column("now", format=","),
            Column("MACs", format=","),
            Column("MACs now", format=","),
        ]
        caption = (
            f"value removed: sum of the scores of the removed channels. {human(first.macs, 'MACs')} -> "
            f"{human(last.macs, 'MACs')} per sample ({last.macs / max(first.macs, 1):.0%}). "
            f"Widths {'-'.join(str(row[1]) for row in rows[:-1])} -> {'-'.join(str(row[2]) for row in rows[:-1])}."
        )
        return Table("Channels", columns, rows, caption=caption)

    def _course(self) -> Table:
        """One row per stage: value, size and speed of the network."""
        columns: list[str | Column] = [
            "stage",
            Column("epoch", format="d"),
            Column(self.value_name, format=".4f"),
            Column("parameters", format=","),
            Column("MACs", format=","),
            Column("latency ms", format=".3f"),
        ]
        rows = [(s.name, s.epoch, s.value, s.params, s.macs, s.latency_ms) for s in self.stages]
        caption = " ".join((f"{self.value_name} on {self.data}; latency of one sample on one thread.", *self.notes))
        return Table("Course", columns, rows, caption=caption)


def scores_figure(scores: Mapping[str, tuple[Scores, Sequence[int]]], groups: int = 12) -> Figure:
    """Scores of each group from best to worst with 95 % intervals, removed channels in another colour.

    Args:
        scores: of each group, with the channels (as scored) that stay.
        groups: most groups shown.
    """
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    names = list(scores)[:groups]
    columns = min(3, max(1, len(names)))
    lines = max(1, -(-len(names) // columns))
    figure, axes = new_figure(lines, columns, width=3.6 * columns, height=2.6 * lines + 0.3)
    for axis, name in zip(axes.flat, names, strict=False):
        of_group, kept = scores[name]
        order = of_group.values.sort(descending=True, stable=True).indices
        stays = torch.zeros(len(order), dtype=torch.bool)
        stays[list(kept)] = True
        colours = [KEPT if stay else REMOVED for stay in stays[order].tolist()]
        values = of_group.values[order].tolist()
        axis.bar(range(len(order)), values, width=0.8 if len(order) <= FEW else 1.0, color=colours)
        if of_group.stderr is not None:
            _draw_intervals(axis, values, (1.96 * of_group.stderr[order]).nan_to_num(posinf=0).tolist())
        axis.set_title(f"{short_name(name)}: {int(stays.sum())} of {len(order)} kept")
        axis.set_xlabel("channel, best first")
        axis.set_ylabel("score")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.legend(
        handles=[Patch(color=KEPT, label="kept"), Patch(color=REMOVED, label="removed")],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure


FEW = 40  # channels; more are drawn without gaps, their intervals as a band


def short_name(layer: str) -> str:
    """The end of a layer's path, short enough for the title of a small picture."""
    return layer if len(layer) <= 20 else f"\N{HORIZONTAL ELLIPSIS}{layer[-19:]}"


def _draw_intervals(axis: Any, values: Sequence[float], halves: Sequence[float]) -> None:
    x = range(len(values))
    if len(values) <= FEW:
        axis.errorbar(x, values, yerr=halves, fmt="none", ecolor="black", elinewidth=0.8)
        return
    low, high = ([v + sign * h for v, h in zip(values, halves, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, step="mid", color="black", alpha=0.3, linewidth=0)
