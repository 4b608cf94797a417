"""What an estimator returns: values with standard errors, what they cost, and what is needed to go on from there."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_eff.documents import parsed, reading, write_text
from lightning_eff.reporting import Column, Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(eq=False)
class ShapleyResult(Report):
    """Shapley values (or partial ones) of a game with `n` players, all tensors float64 on the CPU.

    Table and figure `values`; `save` and `load` are for the result itself.

    Attributes:
        values: `[n]`, or `[n, D]` for a vector-valued game, in the unit of the game. NaN: the budget never reached
            this player.
        stderr: standard errors, shaped like `values`; 0 where nothing was sampled, inf below two samples.
        n_evals: evaluations spent; for a grouped game, forwards over all groups divided by their number.
        n_unique: distinct coalitions among them, counted the same way.
        v_empty: value of no player, `[]` or `[D]`; None where the method did not need it.
        v_full: value of all players, likewise.
        method: `"exact"`, `"leave_one_out"`, `"permutation"`, `"regression"`, `"stratified"`, `"unbiased_kernel"`,
            `"top_k"` or `"greedy_backward"` (whose values are places, not shares of a value).
        depth: number of removals (or insertions) averaged over; n is the Shapley value itself.
        seconds: wall-clock time, resumed parts included.
        converged: the precision the stop rule asked for was reached; without such a rule, all requested work was done.
        truncated: fraction of marginal contributions taken as 0 instead of evaluated.
        names: a name for each player, from the game's `names`.
        state: plain Python from which `estimate(resume=...)` goes on; None where there is nothing to go on with.
    """

    values: Tensor
    stderr: Tensor
    n_evals: int
    n_unique: int
    v_empty: Tensor | None
    v_full: Tensor | None
    method: str
    depth: int
    seconds: float
    converged: bool
    truncated: float = 0.0
    names: list[str] | None = None
    state: dict[str, Any] | None = None

    @property
    def efficiency_gap(self) -> Tensor:
        """v(all) - v(none) - sum of values, `[]` or `[D]`: 0 up to rounding.

        Not so for truncated walks, `"top_k"` and the regression of the published code.

        Raises:
            ValueError: a partial value (depth < n) or an order of removal, for which the axiom does not hold.
        """
        if self.method == "greedy_backward":
            raise ValueError("places in an order of removal do not share out a value")
        if self.v_full is None or self.v_empty is None or self.depth < len(self.values):
            raise ValueError(f"efficiency belongs to depth n = {len(self.values)}, this result has depth {self.depth}")
        return self.v_full - self.v_empty - self.values.sum(0)

    def rank(self) -> Tensor:
        """Players from the highest value to the lowest, int64 `[n]`; equal values by index, lowest first.

        Raises:
            ValueError: vector values (use `select`), or a player without a value.
        """
        if self.values.ndim > 1:
            components = self.values.shape[1]
            raise ValueError(f"values are vectors of {components} components: rank one with result.select(d).rank()")
        missing = self.values.isnan().nonzero().flatten().tolist()
        if missing:
            raise ValueError(f"players {missing} have no value yet: use estimate(resume=result) or a larger budget")
        return self.values.argsort(descending=True, stable=True)

    def top(self, k: int) -> Tensor:
        """The `k` players of highest value, best first, int64 `[k]`; raises as `rank`, or unless 0 <= k <= n."""
        return self.rank()[: self._checked_count(k)]

    def bottom(self, k: int) -> Tensor:
        """The `k` players of lowest value, worst first, int64 `[k]`; raises as `rank`, or unless 0 <= k <= n."""
        return self.rank().flip(0)[: self._checked_count(k)]

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Ends of normal confidence intervals, each shaped like `values`; too narrow for few samples or skewed games.

        Raises:
            ValueError: `level` outside (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie in (0, 1), got {level}")
        half = NormalDist().inv_cdf((1 + level) / 2) * self.stderr
        return self.values - half, self.values + half

    def select(self, d: int) -> ShapleyResult:
        """The result of component `d` of a vector-valued game; it can be ranked but not resumed.

        Raises:
            ValueError: values are no vectors, or have no component `d`.
        """
        if self.values.ndim < 2 or not 0 <= d < self.values.shape[1]:
            raise ValueError(f"no component {d} in values of shape {list(self.values.shape)}")
        return replace(
            self,
            values=self.values[:, d],
            stderr=self.stderr[:, d],
            v_empty=None if self.v_empty is None else self.v_empty[d],
            v_full=None if self.v_full is None else self.v_full[d],
            state=None,
        )

    def tables(self) -> dict[str, Table]:
        """One row a player in the order of the game: value, standard error and place; a vector has columns for each."""
        names = self.names or [str(player) for player in range(len(self.values))]
        scalar = self.values.ndim == 1
        values, stderr = (one.reshape(len(names), -1).T.tolist() for one in (self.values, self.stderr))
        marks = [""] if scalar else [f" {d}" for d in range(len(values))]
        columns: list[str | Column] = [Column("player", align="left")]
        columns += [Column(f"{what}{mark}", ".4g") for mark in marks for what in ("value", "stderr")]
        told = [column for pair in zip(values, stderr, strict=True) for column in pair]
        if scalar and not bool(self.values.isnan().any()):
            columns.append("place")
            told.append([place + 1 for place in self.rank().argsort().tolist()])
        partial = "" if self.depth >= len(names) or self.method == "greedy_backward" else f", depth {self.depth}"
        caption = f"{self.method}{partial}; {self.n_evals:,} evaluations, {self.n_unique:,} of them distinct."
        if not self.converged:
            caption += " The work or precision asked for was not reached."
        return {"values": Table("Shapley values", columns, zip(names, *told, strict=True), caption)}

    def figures(self) -> dict[str, Figure]:
        """Bars of the values with 95 % intervals; none of vectors, or where a player has no value."""
        from lightning_eff.shapley.figures import values_figure

        drawn = self.values.ndim == 1 and not bool(self.values.isnan().any())
        return {"values": values_figure(self)} if drawn else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain Python (numbers, strings, lists, dicts), fit for JSON and for checkpoints with `weights_only=True`."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: entry.tolist() if isinstance(entry, Tensor) else entry for name, entry in entries.items()}

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> ShapleyResult:
        """The result that `to_dict` described, to the bit.

        Raises:
            ValueError: it described something else.
        """
        with reading("not a Shapley result"):
            tensors = {
                name: torch.tensor(entries[name], dtype=torch.float64)
                for name in ("values", "stderr", "v_empty", "v_full")
                if entries[name] is not None
            }
            result: ShapleyResult = parsed(cls, {**entries, **tensors}, "the result")
            shape, names = result.values.shape, result.names
            if result.values.ndim not in (1, 2) or result.stderr.shape != shape:
                raise ValueError(
                    f"expected values and stderr [n] or [n, D], got {[*shape]} and {[*result.stderr.shape]}"
                )
            for end in (result.v_empty, result.v_full):
                if end is not None and end.shape != shape[1:]:
                    raise ValueError(f"expected v_empty and v_full of shape {[*shape[1:]]}, got {[*end.shape]}")
            if names is not None and len(names) != shape[0]:
                raise ValueError(f"expected {shape[0]} names, got {len(names)}")
        return result

    def save(self, path: str | Path) -> None:
        """Write JSON (with Python's `NaN` and `Infinity` where a player has no value or no error bar)."""
        write_text(path, json.dumps(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> ShapleyResult:
        """Read what `save` wrote, to the bit.

        Raises:
            ValueError: the file holds something else.
        """
        with reading(f"{path} holds no Shapley result"):
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def _checked_count(self, k: int) -> int:
        if not 0 <= k <= len(self.values):
            raise ValueError(f"k must lie in 0..{len(self.values)}, got {k}")
        return k
