"""Who was busy when: loads of the experts of all layers in windows of training steps, as table and heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_eff.reporting import KEPT, REFERENCE, REMOVED, SERIES, Column, Report, Table, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_WINDOWS = 200  # more cannot be told apart in the figure, and checkpoints stay small
_MOST_LINES = 8  # layers with a line of their own


class LoadHistory(Report):
    """Loads in windows of steps; when there are too many windows, neighbours become one.

    Tables: ``expert_layers``, ``expert_loads`` with a row a window and expert. Figure: ``expert_loads``.

    Args:
        sizes: Number of experts of each layer, by the layer's name.

    Attributes:
        steps: Last step of each window.
        chosen: Tokens that chose each expert [windows, experts of all layers], int64.
        computed: Tokens that each expert computed, as ``chosen``.
    """

    data_tables = frozenset({"expert_loads"})

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self.steps: list[int] = []
        self.chosen = self.computed = torch.zeros(0, sum(self.sizes.values()), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, chosen: Tensor, computed: Tensor) -> None:
        """Add the window that ends with ``step``: tokens of the experts of all layers [experts], layer after layer."""
        self.steps.append(step)
        self.chosen = torch.cat([self.chosen, chosen.cpu()[None]])
        self.computed = torch.cat([self.computed, computed.cpu()[None]])
        if len(self.steps) > _MOST_WINDOWS:
            self._merge()

    def layers(self, loads: Tensor) -> dict[str, Tensor]:
        """Split loads of all experts [..., experts] by layer."""
        return dict(zip(self.sizes, torch.split(loads, list(self.sizes.values()), dim=-1), strict=True))

    def tables(self) -> dict[str, Table]:
        """A row for each layer, over all windows; a row for each window, layer and expert."""
        return {"expert_layers": self._by_layer(), "expert_loads": self._by_window()}

    def figures(self) -> dict[str, Figure]:
        """Loads of every expert over time; none of an empty history."""
        return {"expert_loads": loads_figure(self)} if len(self) else {}

    def _by_layer(self) -> Table:
        loads = zip(*(self.layers(counts.sum(0)).items() for counts in (self.chosen, self.computed)), strict=True)
        rows = []
        for (name, chosen), (_, computed) in loads:
            relative, tokens = relative_load(chosen), int(chosen.sum())
            lost = 1 - int(computed.sum()) / tokens if tokens else None
            rows.append((name, len(chosen), tokens, relative.max(), relative.min(), int((chosen == 0).sum()), lost))
        shares = [Column("busiest over mean", ".2f"), Column("idlest over mean", ".2f")]
        columns: list[str | Column] = [
            "layer",
            "experts",
            Column("tokens chosen", ","),
            *shares,
            "never chosen",
            Column("dropped", ".1%"),
        ]
        steps = f" of steps up to {self.steps[-1]:,}" if self.steps else ""
        return Table("Loads of experts by layer", columns, rows, f"Training batches{steps}.")

    def _by_window(self) -> Table:
        rows = []
        chosen, computed = self.layers(self.chosen), self.layers(self.computed)
        for window, step in enumerate(self.steps):
            for name in self.sizes:
                load = chosen[name][window]
                relative = relative_load(load)
                for expert, tokens in enumerate(load.tolist()):
                    row = (step, name, expert, tokens, computed[name][window, expert], relative[expert])
                    rows.append(row)
        columns: list[str | Column] = ["step", "layer", "expert", "chosen", "computed", Column("over_mean", ".3f")]
        return Table("Loads of experts", columns, rows, "Tokens of the window that ends with the step.")

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values and tensors."""
        return {"sizes": self.sizes, "steps": list(self.steps), "chosen": self.chosen, "computed": self.computed}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> LoadHistory:
        """Make the history that :meth:`state_dict` told of."""
        history = cls(state["sizes"])
        history.steps, history.chosen, history.computed = list(state["steps"]), state["chosen"], state["computed"]
        return history

    def _merge(self) -> None:
        """Make one window of two; the last stays alone where their number is odd."""
        pairs = torch.arange(len(self.steps)) // 2
        self.steps = self.steps[1::2] + self.steps[-1:] * (len(self.steps) % 2)
        empty = torch.zeros(len(self.steps), self.chosen.shape[1], dtype=torch.int64)
        self.chosen, self.computed = empty.index_add(0, pairs, self.chosen), empty.index_add(0, pairs, self.computed)


def relative_load(load: Tensor) -> Tensor:
    """Loads over their mean [..., n] in float64, so that 1 is an equal share; NaN where nobody had a token.

    Args:
        load: Tokens that chose each expert [..., n].
    """
    load = load.double()
    return load / load.mean(-1, keepdim=True)


def loads_figure(history: LoadHistory, title: str = "") -> Figure:
    """Draw the loads of every expert of every layer over time, and above them the busiest expert of each layer.

    Args:
        history: At least one window.
        title: Of the figure.

    Raises:
        ValueError: The history is empty.
    """
    from matplotlib.colors import LinearSegmentedColormap

    if not len(history):
        raise ValueError("the history is empty: no step has been recorded")
    # loads over their mean, as powers of two; what nobody chose has none
    relative = torch.cat([relative_load(load) for load in history.layers(history.chosen).values()], dim=1)
    image = relative.log2().masked_fill(relative == 0, torch.nan).t().numpy()
    edges = _edges(history.steps)
    names, sizes = list(history.sizes), list(history.sizes.values())
    figure, axes = new_figure(2, 1, width=7.2, height=min(10.0, 3.4 + 0.45 * len(names)))
    lines, heat = axes[:, 0]
    lines.get_gridspec().set_height_ratios([1, 2 + 0.15 * len(names)])

    colours = LinearSegmentedColormap.from_list("loads", [REMOVED, "white", KEPT]).with_extremes(bad="black")
    rows = range(sum(sizes) + 1)
    mesh = heat.pcolormesh(edges, rows, image, cmap=colours, vmin=-2, vmax=2, rasterized=True)
    bar = figure.colorbar(mesh, ax=heat, ticks=range(-2, 3), extend="both", pad=0.01)
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.set_label("load over mean; black: none")
    starts = [sum(sizes[:layer]) for layer in range(len(sizes))]
    for start in starts[1:]:
        heat.axhline(start, color="black", linewidth=1.2)
    heat.set_yticks([start + size / 2 for start, size in zip(starts, sizes, strict=True)], names)
    heat.invert_yaxis()
    heat.grid(visible=False)
    heat.set(xlabel="step", ylabel="experts by layer")

    worst = torch.stack([relative_load(load).amax(-1) for load in history.layers(history.chosen).values()])
    marker = "o" if len(history.steps) == 1 else ""  # a line through one point shows nothing
    if len(names) <= _MOST_LINES:
        for number, (name, line) in enumerate(zip(names, worst, strict=True)):
            lines.plot(history.steps, line.numpy(), color=SERIES[number], label=name, linewidth=1.4, marker=marker)
    else:
        lines.fill_between(history.steps, worst.amin(0).numpy(), worst.amax(0).numpy(), color=REFERENCE, alpha=0.3)
        mean = worst.mean(0).numpy()
        lines.plot(history.steps, mean, color=KEPT, label=f"mean of {len(names)} layers", marker=marker)
    lines.axhline(1, color="black", linewidth=0.8, linestyle="--")
    lines.set(ylabel="busiest expert\nover mean", xlim=(edges[0], edges[-1]))
    lines.legend(frameon=False, fontsize=7, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    lines.set_title(title or "Loads of experts", loc="left")
    return figure


def _edges(steps: Sequence[int]) -> list[int]:
    """Where windows begin and end; the first is as wide as the second, but begins no earlier than step 0."""
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else steps[0])
    return [max(0, first), *steps]
