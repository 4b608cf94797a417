"""How well depth is completed from selected lines, beside other selections of as many: the table of a test.

Shapes: `S` sets of lines, `F` frames, `L` lines of the sensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_eff.documents import parsed
from lightning_eff.lidar.frames import Frame, LinePixels
from lightning_eff.lidar.game import Completion, FrameGame
from lightning_eff.lidar.metrics import DEVKIT, depth_errors
from lightning_eff.lidar.records import FrameId
from lightning_eff.lidar.report import in_order
from lightning_eff.reporting import Column, Report, Table
from lightning_eff.surgery.state import quiet_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL, NONE, RANDOM, OPTIMUM = "all lines", "no lidar", "random", "gap_dp"

QUANTITIES = (*DEVKIT, "points")
"""What is measured of every set: errors in mm, mm, 1/km, 1/km, and pixels with depth that are left."""


@dataclass(frozen=True)
class Contestant:
    """Sets of lines that a row of the table is about.

    Attributes:
        rule: what selected them.
        k: how many were asked for; None for all lines and for none.
        sets: lines of the sensor; several only for draws at random, whose errors are averaged; None where every frame
            has a set of its own.
        forwards: of the network that the selection took, over all calibration frames.
    """

    rule: str
    k: int | None
    sets: tuple[tuple[int, ...], ...] | None
    forwards: int = 0


def measure_sets(
    frame: Frame, sets: Sequence[Sequence[int]], completion: Completion, num_lines: int
) -> tuple[Tensor, int] | None:
    """Errors of the depth completed from sets of lines of one frame; equal ones are completed once.

    Args:
        frame: the frame.
        sets: lines of the sensor.
        completion: the network.
        num_lines: of the sensor.

    Returns:
        `QUANTITIES` of every set, float64 `[S, 5]`, and the number of forwards; None without valid ground truth.

    Raises:
        ValueError: depth that is not finite, the message names the frame and the lines; lines that the sensor has not.
    """
    if not completion.options.has_truth(frame):
        return None
    LinePixels.count([frame], num_lines)  # refuses lines beyond the sensor's, which no set could hold
    game = FrameGame(frame, range(num_lines), completion)
    kept = torch.zeros(len(sets), num_lines, dtype=torch.bool)
    for row, lines in zip(kept, sets, strict=True):
        row[list(lines)] = True
    distinct, place = torch.unique(kept[:, game.present], dim=0, return_inverse=True)
    found = torch.empty(len(distinct), len(QUANTITIES), dtype=torch.float64)
    done, size = 0, completion.batch or 1
    while done < len(distinct):
        batch = slice(done, done + size)
        try:
            found[batch] = _measured(game, distinct[batch], completion)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
            continue
        done = batch.stop
    return found[place], len(distinct)


def _measured(game: FrameGame, coalitions: Tensor, completion: Completion) -> Tensor:
    frame, options = game.frame, completion.options
    sparse = game.masked(coalitions)
    dense = complete(completion, frame.rgb, sparse)
    valid = frame.gt > options.min_target
    finite = dense[:, valid].isfinite().all(1).tolist()
    if not all(finite):
        players = coalitions[finite.index(False)].nonzero().flatten()
        raise ValueError(
            f"the network returned depth that is not finite for frame {frame.id!r} with the lines "
            f"{game.present[players].tolist()}"
        )
    errors = depth_errors(dense, frame.gt[None], min_depth=options.min_depth, min_target=options.min_target)
    points = (sparse > 0).flatten(1).sum(1).double()
    return torch.stack([*(errors[name] for name in DEVKIT), points], 1).cpu()


def complete(completion: Completion, rgb: Tensor, sparse: Tensor) -> Tensor:
    """Dense depth of several sparse maps of one image, as it is, float `[M, 1, H, W]` on the device of `sparse`.

    Args:
        completion: the network.
        rgb: `[3, H, W]`.
        sparse: `[M, 1, H, W]` in metres.
    """
    device = completion.device(sparse.device)
    with quiet_model(completion.model), torch.no_grad(), completion.autocast(device):
        # copies: a network may write into its input, and tensors made in Lightning's inference mode refuse that here
        dense = completion.forward.of_image(rgb[None].to(device).clone())(sparse.to(device).clone())
    return dense.float().to(sparse.device)


@dataclass(frozen=True)
class Row:
    """One row of the table: means over the frames.

    Attributes:
        rule: what selected the lines.
        k: how many were asked for; None for all lines and for none.
        lines: which; None for draws at random and where every frame has its own.
        errors: `QUANTITIES` by name.
        spread: standard deviation of the RMSE over draws at random, else None.
        forwards: that the selection took.
    """

    rule: str
    k: int | None
    lines: list[int] | None
    errors: dict[str, float]
    spread: float | None = None
    forwards: int = 0


@dataclass(eq=False)
class LineEvaluation(Report):
    """Errors of selections on a data set: table and figure `errors`.

    Attributes:
        stage: what it is: `"val"` or `"test"`.
        rows: of all selections.
        frames: how many frames were measured.
        skipped: frames without valid ground truth.
        notes: what a reader must know.
    """

    stage: str
    rows: list[Row]
    frames: int
    skipped: int = 0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_frames(
        cls,
        stage: str,
        contestants: Sequence[Contestant],
        measured: Mapping[FrameId, Tensor],
        *,
        skipped: int = 0,
        notes: Sequence[str] = (),
    ) -> LineEvaluation:
        """Average what was measured.

        Args:
            stage: what the data are.
            contestants: one row each.
            measured: of every frame, `[S, 5]`, the sets of all contestants one after the other (one for a contestant
                without).
            skipped: frames without valid ground truth.
            notes: what a reader must know.

        Raises:
            ValueError: no frame was measured.
        """
        if not measured:
            raise ValueError(f"no frame of {stage} has valid ground truth ({skipped} have none): nothing was measured")
        # in an order of their own, so that sums have the same bits whatever process measured which frame
        mean = torch.stack([measured[frame] for frame in in_order(measured)]).mean(0)
        rows, first = [], 0
        for one in contestants:
            count = 1 if one.sets is None else len(one.sets)
            part = mean[first : first + count]
            first += count
            rows.append(
                Row(
                    one.rule,
                    one.k,
                    list(one.sets[0]) if one.sets is not None and count == 1 else None,
                    dict(zip(QUANTITIES, part.mean(0).tolist(), strict=True)),
                    float(part[:, 0].std()) if count > 1 else None,
                    one.forwards,
                )
            )
        return cls(stage, rows, len(measured), skipped, list(notes))

    def row(self, rule: str, k: int | None = None) -> Row:
        """The row of a rule; KeyError where there is none."""
        for row in self.rows:
            if (row.rule, row.k) == (rule, k):
                return row
        raise KeyError(f"no row {rule!r} with k = {k}; there are {[(row.rule, row.k) for row in self.rows]}")

    def tables(self) -> dict[str, Table]:
        """One row per rule and k, best RMSE first among those of one k."""
        return {"errors": self._errors()}

    def figures(self) -> dict[str, Figure]:
        """RMSE against the number of lines, for every rule."""
        from lightning_eff.lidar.figures import errors_figure

        return {"errors": errors_figure(self)}

    def _errors(self) -> Table:
        columns: list[str | Column] = [
            Column("k", "d"),
            "rule",
            Column("RMSE [mm]", ".0f"),
            Column("+-", ".0f"),
            Column("MAE [mm]", ".0f"),
            Column("iRMSE [1/km]", ".2f"),
            Column("iMAE [1/km]", ".2f"),
            Column("points", ",.0f"),
            Column("forwards", ","),
            Column(f"over {OPTIMUM} [mm]", "+.0f"),
        ]
        optimum = {row.k: row.errors["rmse"] for row in self.rows if row.rule == OPTIMUM}
        order = sorted(self.rows, key=lambda row: (-(math.inf if row.k is None else row.k), row.errors["rmse"]))
        rows = []
        for row in order:
            errors = row.errors
            over = errors["rmse"] - optimum[row.k] if row.k in optimum else None
            told = (errors["rmse"], row.spread, errors["mae"], errors["irmse"], errors["imae"], errors["points"])
            rows.append((row.k, row.rule, *told, row.forwards, over))
        caption = (
            f"Means over {self.frames} frames. +-: standard deviation over draws at random. points: pixels with depth "
            "that are left. forwards: of the network, that the selection took."
        )
        if optimum:
            caption += f" {OPTIMUM}: best lines for interpolation without a network (gap game), not for this network."
        if self.skipped:
            caption += f" {self.skipped} frames without ground truth are left out."
        caption = " ".join([caption, *self.notes])
        return Table(f"Depth completed from selected lines ({self.stage})", columns, rows, caption)

    def logged(self) -> dict[str, float]:
        """RMSE of every row by a name for loggers: `rmse/{rule}/k{k}`, `rmse/all_lines`, `rmse/no_lidar`."""
        return {
            f"rmse/{row.rule.replace(' ', '_').replace(',', '')}" + ("" if row.k is None else f"/k{row.k}"): row.errors[
                "rmse"
            ]
            for row in self.rows
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain Python."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LineEvaluation:
        """Read what `to_dict` made; ValueError for anything else."""
        evaluation: LineEvaluation = parsed(cls, data, "the evaluation")
        return evaluation
