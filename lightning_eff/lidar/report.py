"""What a selection of lidar lines is, and how it leaves the package: tables, files, and what a reader must know.

Values are in the unit of the metric played for: mm, mm^2 for `"mse"`, 1/km for the inverse metrics.

Shapes: `L` lines of the sensor, `n` candidates, `F` frames.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_eff.documents import parsed, reading, write_text
from lightning_eff.lidar.records import FrameId
from lightning_eff.reporting import Column, Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERSION = 1
UNITS = {"rmse": "mm", "mae": "mm", "mse": "mm^2", "irmse": "1/km", "imae": "1/km"}

_RANKED = ("none", "region")  # rules by which two values alone tell which line stays
_BY_SIZE = ("selected", "rules", "scores")


@dataclass(frozen=True)
class Round:
    """How sure the values were after a round of coalitions.

    Attributes:
        forwards: of the network until then, over all frames.
        max_se: largest standard error of a line's value.
        stability: overlap (intersection over union) of the selected lines with those of the round before, the smallest
            over all k; None after the first round.
    """

    forwards: int
    max_se: float
    stability: float | None = None


@dataclass(eq=False)
class LineSelection(Report):
    """Values of lidar lines and the lines selected by them; lines are numbers of the sensor, 0 = highest elevation.

    Tables: `selection`, `values`. Figures: `values`, `elevation` (where elevations are known), `frames` and
    `convergence` (of more than one). `save` and `load` are for the selection itself.

    Attributes:
        num_lines: `L`.
        lines: the candidates, in increasing order.
        values: Shapley values of the candidates, float64 `[n]`.
        se: their standard errors, float64 `[n]`; 0 where nothing was sampled, infinite where it cannot be told.
        selected: for every k the lines to keep, in increasing order.
        rules: for every k the rule they were selected by; for `"auto"` the one that won.
        scores: for every k what the rules tried out gained on the calibration frames; empty unless they were.
        per_frame: values of every frame, `[n]` each, 0 for a line that the frame does not show.
        pixels: pixels with depth of every line of the sensor, over all frames, int64 `[L]`.
        error_empty: mean error without any line.
        error_full: mean error with all candidates.
        settings: what the values depend on: metric, estimator, seed, model and the like; plain Python.
        forwards: of the network, over all frames.
        skipped: frames without valid ground truth.
        baselines: what it is compared with: by name, for every k the lines that would be kept.
        baseline_forwards: of the network, that a baseline took; absent for 0.
        elevations: of every line of the sensor in degrees, falling; None where they are not known.
        rounds: how the values came to be known.
        partial: whether the run was ended before all coalitions were evaluated.
        notes: what a reader must know.
    """

    data_tables = frozenset({"values"})

    num_lines: int
    lines: list[int]
    values: Tensor
    se: Tensor
    selected: dict[int, list[int]]
    rules: dict[int, str] = field(default_factory=dict)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    per_frame: dict[FrameId, Tensor] = field(default_factory=dict)
    pixels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    error_empty: float = math.nan
    error_full: float = math.nan
    settings: dict[str, Any] = field(default_factory=dict)
    forwards: int = 0
    skipped: int = 0
    baselines: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    baseline_forwards: dict[str, int] = field(default_factory=dict)
    elevations: list[float] | None = None
    rounds: list[Round] = field(default_factory=list)
    partial: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """Of the values; empty for a metric of the user's own."""
        return UNITS.get(str(self.settings.get("metric", "rmse")), "")

    @property
    def null_lines(self) -> list[int]:
        """Lines of the sensor that no calibration frame shows."""
        return (self.pixels == 0).nonzero().flatten().tolist()

    def tables(self) -> dict[str, Table]:
        """One row per k: how many lines, by what rule, which; one row per candidate, from top to bottom."""
        return {"selection": self._selection(), "values": self._values()}

    def figures(self) -> dict[str, Figure]:
        """Values, where the lines look, values by frame, and how sure they became."""
        from lightning_eff.lidar import figures

        drawn = {"values": figures.values_figure(self)}
        if self.elevations:
            drawn["elevation"] = figures.elevation_figure(self)
        if len(self.per_frame) > 1:
            drawn["frames"] = figures.frames_figure(self)
        if len(self.rounds) > 1:
            drawn["convergence"] = figures.convergence_figure(self)
        return drawn

    def _values(self) -> Table:
        sizes = sorted(self.selected, reverse=True)
        sets = {k: set(self.selected[k]) for k in sizes}
        columns: list[str | Column] = [
            "line",
            *([Column("elevation [deg]", ".3f")] if self.elevations else []),
            *([Column("pixels", ",")] if len(self.pixels) else []),
            Column(f"value [{self.unit}]" if self.unit else "value", ".1f"),
            Column("SE", ".1f"),
            *(Column(f"k = {k}", align="center") for k in sizes),
        ]
        rows = [
            (
                line,
                *([self.elevations[line]] if self.elevations else []),
                *([int(self.pixels[line])] if len(self.pixels) else []),
                float(self.values[place]),
                float(self.se[place]),
                *("kept" if line in sets[k] else "" for k in sizes),
            )
            for place, line in enumerate(self.lines)
        ]
        return Table("Lidar lines", columns, rows, self.caption())

    def _selection(self) -> Table:
        rows = [
            (k, len(lines), self.rules.get(k, ""), " ".join(map(str, lines)))
            for k, lines in sorted(self.selected.items(), reverse=True)
        ]
        return Table("Lines to keep", ["k", "lines", "rule", "which"], rows, self.caption())

    def caption(self) -> str:
        """What the values are of, how sure the lines are where no value tells it, and the notes."""
        metric = self.settings.get("metric", "rmse")
        words = [
            f"{len(self.lines)} candidates of {self.num_lines} lines; value: share of the drop in {metric} from "
            f"{self.error_empty:.0f} (no line) to {self.error_full:.0f} (all candidates), mean of "
            f"{len(self.per_frame)} frames; {self.forwards:,} forwards."
        ]
        if self.partial:
            words.append("Partial: the run ended before all coalitions were evaluated.")
        unranked = {rule for rule in self.rules.values() if rule not in _RANKED}
        if unranked and bool((self.se > 0).any()):
            words.append(
                f"Lines by {'; '.join(sorted(unranked))} follow no ranking of values: errors of the values do not tell "
                "how sure they are."
            )
        return " ".join([*words, *self.notes])

    def unresolved(self, k: int) -> str | None:
        """Say so where values do not tell the lines of set k from those left out; None where they do.

        Two lines are told apart when their values differ by two standard errors of the difference. Compared are, for
        the rule `region`, the two most valuable lines of every region, for `none` the k-th and the next of all. Other
        rules weigh distances or the network's answers too, so that no pair of values decides: None.

        Args:
            k: one of `selected`.
        """
        n, rule = len(self.lines), self.rules.get(k, "none")
        if k <= 0 or k >= n or not self.rounds or rule not in _RANKED:
            return None
        order = self.values.argsort(descending=True, stable=True).tolist()
        if rule == "region":
            regions = [[place for place in order if place * k // n == region] for region in range(k)]
            rivals = [(region[0], region[1]) for region in regions if len(region) > 1]
        else:
            rivals = [(order[k - 1], order[k])]
        worst, told = 1.0, None
        for kept, left in rivals:
            apart = float(self.values[kept] - self.values[left])
            error = math.hypot(float(self.se[kept]), float(self.se[left]))
            factor = (2 * error / apart) ** 2 if apart > 0 else math.inf if error > 0 else 1.0
            if factor > worst:
                worst, told = factor, (self.lines[kept], self.lines[left], apart, error)
        if told is None:
            return None
        spent = self.rounds[-1].forwards / max(1, len(self.per_frame))
        needed = f"about {worst * spent:,.0f} coalitions a frame" if worst < 100 else "no budget within reach"
        return (
            f"k = {k} is not resolved at this budget: the values of lines {told[0]} and {told[1]} differ by "
            f"{told[2]:.1f} +- {told[3]:.1f}; {needed} would tell them apart."
        )

    # Files.

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, fit for JSON and for checkpoints with `weights_only=True`."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data["version"] = VERSION
        data["per_frame"] = [[frame, values.tolist()] for frame, values in self.per_frame.items()]
        data["rounds"] = [asdict(one) for one in self.rounds]
        for name in ("values", "se", "pixels"):
            data[name] = data[name].tolist()
        for name in _BY_SIZE:  # JSON has no keys that are numbers
            data[name] = _pairs(data[name])
        data["baselines"] = {name: _pairs(sets) for name, sets in self.baselines.items()}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LineSelection:
        """Read what `to_dict` made.

        Raises:
            ValueError: it is something else, or was made by a later version of the package.
        """
        with reading("not a selection of lines"):
            version = data.get("version")
            if version != VERSION:
                raise ValueError(f"expected lines of version {VERSION}, got {version!r}: written by another version")
            return cls._checked(data)

    @classmethod
    def _checked(cls, data: Mapping[str, Any]) -> LineSelection:
        entries = {name: entry for name, entry in data.items() if name != "version"}
        for name, unknown in (("values", math.nan), ("se", math.inf)):
            entries[name] = _numbers(entries[name], unknown)
        entries["pixels"] = torch.tensor(entries["pixels"], dtype=torch.int64)
        for name in _BY_SIZE:
            entries[name] = dict(entries[name])
        entries["baselines"] = {name: dict(sets) for name, sets in entries["baselines"].items()}
        entries["per_frame"] = {frame: _numbers(values, math.nan) for frame, values in entries["per_frame"]}
        for name in ("error_empty", "error_full"):
            entries[name] = math.nan if entries[name] is None else entries[name]
        entries["rounds"] = [
            {**one, "max_se": math.inf if one["max_se"] is None else one["max_se"]} for one in entries["rounds"]
        ]
        selection: LineSelection = parsed(cls, entries, "the selection")
        count, many = (len(selection.lines),), selection.num_lines
        if selection.lines != sorted({*selection.lines} & {*range(many)}):
            raise ValueError(f"expected ascending lines of 0..{many - 1}, got {selection.lines}")
        if {selection.values.shape, selection.se.shape, *(v.shape for v in selection.per_frame.values())} != {count}:
            raise ValueError(f"expected a value and a standard error for each of {count[0]} lines, also of every frame")
        if selection.pixels.shape not in ((0,), (many,)) or len(selection.elevations or range(many)) != many:
            raise ValueError(f"expected pixels and elevations of {many} lines")
        for sets in (selection.selected, *selection.baselines.values()):
            if any({*kept} - {*selection.lines} for kept in sets.values()):
                raise ValueError(f"expected kept lines among {selection.lines}, got {sets}")
        return selection

    def save(self, path: str | Path) -> Path:
        """Write `lines.json`, or another name; folders are made. JSON has no infinity and no NaN: null is written."""
        return write_text(path, json.dumps(_strict(self.to_dict()), indent=1, allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> LineSelection:
        """Read what `save` wrote, to the bit.

        Raises:
            ValueError: the file holds something else.
        """
        with reading(f"{path} holds no selection of lines"):
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _strict(entry: Any) -> Any:
    """Plain Python with None for every number that is not finite."""
    if isinstance(entry, Mapping):
        return {name: _strict(one) for name, one in entry.items()}
    if isinstance(entry, list | tuple):
        return [_strict(one) for one in entry]
    return None if isinstance(entry, float) and not math.isfinite(entry) else entry


def _numbers(entries: Iterable[float | None], unknown: float) -> Tensor:
    return torch.tensor([unknown if one is None else one for one in entries], dtype=torch.float64)


def _pairs(by_size: Mapping[int, Any]) -> list[list[Any]]:
    return [[k, entry] for k, entry in by_size.items()]


def overlap(before: Mapping[int, Sequence[int]], now: Mapping[int, Sequence[int]]) -> float:
    """Smallest intersection over union of two selections, over all k; two empty sets are the same."""
    shares = [len({*before[k]} & {*now[k]}) / max(1, len({*before[k]} | {*now[k]})) for k in now if now[k]]
    return min(shares, default=1.0)


def in_order(ids: Iterable[FrameId]) -> list[FrameId]:
    """Ids of frames in an order of their own, whatever order they were loaded in.

    Numbers come before strings; digits within strings count as numbers, so that `"f9"` comes before `"f10"`.
    """
    return sorted(ids, key=_place)


def _place(frame: FrameId) -> tuple[bool, list[str | int], FrameId]:
    parts = re.split(r"(\d+)", frame) if isinstance(frame, str) else ["", str(frame)]
    # odd places hold the digits; the id itself tells "f01" from "f1"
    natural = [int(part) if place % 2 else part for place, part in enumerate(parts)]
    return isinstance(frame, str), natural, frame
