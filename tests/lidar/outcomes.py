"""A selection of lines and an evaluation of four sets of them, made up for tests of what is told about them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from lightning_eff.lidar.evaluation import ALL, NONE, RANDOM, Contestant, LineEvaluation
from lightning_eff.lidar.report import LineSelection, Round


def selection(**changes: Any) -> LineSelection:
    made = LineSelection(
        num_lines=8,
        lines=[0, 1, 2, 4, 5, 6],
        values=torch.tensor([300.0, 100.0, 90.0, -5.0, 40.0, 41.0], dtype=torch.float64),
        se=torch.tensor([10.0, 3.0, 4.0, 1.0, 0.1, 0.1], dtype=torch.float64),
        selected={3: [0, 2, 6], 1: [0]},
        rules={3: "region", 1: "none"},
        scores={3: {"region": 1.5, "uniform": 1.0}},
        per_frame={"b": torch.arange(6, dtype=torch.float64), 7: torch.zeros(6, dtype=torch.float64)},
        pixels=torch.tensor([9, 8, 7, 0, 6, 5, 4, 0]),
        error_empty=2000.0,
        error_full=1434.0,
        settings={"metric": "rmse", "seed": 3},
        forwards=400,
        baselines={"uniform": {3: [0, 2, 6], 1: [2]}},
        baseline_forwards={"greedy": 12},
        elevations=[2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0],
        rounds=[Round(200, math.inf), Round(400, 10.0, 0.5)],
        notes=["A note."],
    )
    return replace(made, **changes)


CONTESTANTS = [
    Contestant("region", 2, ((0, 3),), 40),
    Contestant("gap_dp", 2, ((1, 3),)),
    Contestant(RANDOM, 2, ((0, 1), (2, 3))),
    Contestant("dynamic oracle", 2, None),
    Contestant(ALL, None, ((0, 1, 2, 3),)),
    Contestant(NONE, None, ((),)),
]


def measured() -> dict[str | int, Any]:
    table = torch.tensor([[100.0], [80.0], [300.0], [500.0], [70.0], [50.0], [900.0]], dtype=torch.float64)
    return {"b": table.expand(7, 5), "a": 3 * table.expand(7, 5)}


def evaluation() -> LineEvaluation:
    return LineEvaluation.of_frames("test", CONTESTANTS, measured(), skipped=1, notes=["So it is."])
