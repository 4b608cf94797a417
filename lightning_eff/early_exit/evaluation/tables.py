"""Methods side by side: accuracy at budgets over seeds, for Markdown, CSV and LaTeX."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from lightning_eff.early_exit.evaluation.curve import BUDGETS, CurveResult, Rule, budget_heading
from lightning_eff.reporting import Column, Table

Runs = Mapping[str, CurveResult | Sequence[CurveResult]]


def compare_table(runs: Runs, budgets: Sequence[float] = BUDGETS, rule: Rule = "max") -> Table:
    """Accuracy in percent of several methods at several budgets: mean and standard deviation over seeds.

    Args:
        runs: curves of each method, one a seed.
        budgets: mean costs of a sample, as fractions of the plain backbone; a column without one is added.
        rule: how a curve is read; see :meth:`CurveResult.at_budget`.

    Returns:
        A row a method; ``-`` where one of its seeds cannot keep the budget, no deviation where there is one seed.

    Raises:
        ValueError: no method, or one without curves.
    """
    limits = [*budgets, math.inf]
    rows = [
        (name, *(_mean_std([curve.at_budget(budget, rule) for curve in curves]) for budget in limits))
        for name, curves in seeds_of(runs).items()
    ]
    columns = [Column("method"), *(Column(budget_heading(budget), align="right") for budget in limits)]
    caption = "Budget: mean cost of a sample, in percent of the plain backbone."
    return Table("Accuracy (%) at a budget, mean ± standard deviation over seeds", columns, rows, caption)


def to_latex(table: Table) -> str:
    r"""Return a ``tabular`` with the table's heading and cells, title and caption as comments; needs no package."""
    header = [column.name for column in table.columns]
    rows = [[column.text(value) for value, column in zip(row, table.columns, strict=True)] for row in table.rows]
    left = [column.align == "left" or (column.align is None and not column.format) for column in table.columns]
    lines = [" & ".join(map(_escaped, line)) + r" \\" for line in (header, *rows)]
    comments = [f"% {text}" for text in (table.title, table.caption) if text]
    begin = rf"\begin{{tabular}}{{{''.join('l' if one else 'r' for one in left)}}}"
    return "\n".join([*comments, begin, r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}"]) + "\n"


def seeds_of(runs: Runs) -> dict[str, list[CurveResult]]:
    """Curves of each method as a list.

    Raises:
        ValueError: no method, or one without curves.
    """
    listed = {name: [curves] if isinstance(curves, CurveResult) else list(curves) for name, curves in runs.items()}
    if not listed or not all(listed.values()):
        raise ValueError(f"expected one curve or more of each method, got { {k: len(v) for k, v in listed.items()} }")
    return listed


def _mean_std(accuracies: Sequence[float]) -> str | None:
    if any(map(math.isnan, accuracies)):
        return None
    mean = 100 * statistics.fmean(accuracies)
    return f"{mean:.2f}" if len(accuracies) == 1 else f"{mean:.2f} ± {100 * statistics.stdev(accuracies):.2f}"


def _escaped(text: str) -> str:
    for character in "\\&%$#_{}":
        text = text.replace(character, r"\textbackslash " if character == "\\" else f"\\{character}")
    return text.replace(" ± ", r" $\pm$ ")
