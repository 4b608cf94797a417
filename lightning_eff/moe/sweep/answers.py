"""What the runs of a sweep say: a law with its figures, and plans for a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from lightning_eff.moe.scaling.fitting import fit_scaling_law
from lightning_eff.moe.scaling.laws import load_law
from lightning_eff.moe.scaling.plan import PlanTable
from lightning_eff.moe.scaling.planner import ComputePlanner
from lightning_eff.moe.scaling.result import FitResult
from lightning_eff.moe.scaling.runs import Runs, read_runs
from lightning_eff.moe.sweep.points import RUNS_FILE


def fit_sweep(
    runs: str | Path,
    law: Literal["fine_grained", "chinchilla"] = "fine_grained",
    *,
    expansion_rate: float | None = None,
    granularity: float | None = None,
    fixed: dict[str, float] | None = None,
    bootstrap: int = 200,
    best: bool = True,
    out: str | Path | None = None,
) -> FitResult:
    """Fit a law to runs, print it, and write ``fit.json``, the table ``coefficients`` and figures.

    Args:
        runs: CSV file of runs, or the folder of a sweep.
        law: With a term for granularity or without (dense networks; mixtures of one granularity).
        expansion_rate: Take the runs of this E alone; 1 is the dense ones. Runs of several cannot be fitted together.
        granularity: Take the runs of this G alone.
        fixed: Coefficients that are not fitted, by name: ``--fixed.c 0.472``.
        bootstrap: Fits to resampled runs for the intervals, >= 0.
        best: Of runs of equal N, D and G (other learning rates or seeds) the one of lowest loss counts alone.
        out: Folder for the files; None is that of the runs.

    Returns:
        The fit.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: As of :func:`~lightning_eff.moe.fit_scaling_law`.
    """
    path = Path(runs) / RUNS_FILE if Path(runs).is_dir() else Path(runs)
    where = {"expansion_rate": expansion_rate, "granularity": granularity}
    read = read_runs(path, where={name: value for name, value in where.items() if value is not None})
    if best:
        read = _best(read)
    result = fit_scaling_law(read, law, fixed=fixed, bootstrap=bootstrap)
    result.print()
    folder = path.parent if out is None else Path(out)
    written = [result.save(folder / "fit.json"), *result.write(folder)]
    print("Written:", ", ".join(map(str, written)))
    return result


def plan_budget(
    flops: float,
    law: str = "moe64",
    *,
    expansion_rate: float | None = None,
    granularity: float | None = None,
    out: str | Path | None = None,
) -> PlanTable:
    """Print the network and tokens for a budget under a law, and what other granularities would give.

    Args:
        flops: Training FLOPs, > 0.
        law: A published law by name (``moe64``, ``moe16``, ``dense`` ...), or a JSON file such as ``fit.json``.
        expansion_rate: E; None is that of the law.
        granularity: Hold G; None takes the best.
        out: File for the table, ``.csv``, ``.json``, ``.md`` or ``.txt``; None writes none.

    Returns:
        The optimum, the same rounded to a network that can be built, and the optimum of each granularity.

    Raises:
        ValueError: As of :class:`~lightning_eff.moe.ComputePlanner` and :func:`~lightning_eff.moe.load_law`.
    """
    planner = ComputePlanner(load_law(law), expansion_rate)
    plan = planner.optimal(flops, granularity)
    built = planner.realise(plan)
    print(f"Optimum\n{plan}\n\nAs a network that can be built\n{built}\n")
    compared = planner.compare(flops)
    print(compared)
    table = PlanTable([plan, built, *compared], compared.title)
    if out is not None:
        print("Written:", table.table().save(out))
    return table


def _best(runs: Runs) -> Runs:
    """Return the runs of lowest loss among those of equal N, D and G."""
    columns = [runs.n_total, runs.n_tokens] + ([] if runs.granularity is None else [runs.granularity])
    order = np.argsort(runs.loss, kind="stable")  # np.unique tells the first of equal ones
    _, first = np.unique(np.stack(columns)[:, order], axis=1, return_index=True)
    return runs.take(np.sort(order[first]))
