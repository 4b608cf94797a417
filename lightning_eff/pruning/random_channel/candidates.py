"""Candidates of a search: what was tried, how well each did, and in what order they rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from lightning_eff.documents import parsed
from lightning_eff.reporting import Column, Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Mode = Literal["max", "min"]


@dataclass(frozen=True)
class Candidate:
    """One channel configuration and what came of it.

    Attributes:
        number: row of the configurations; 0 is the uniform one where :func:`sample_configs` drew them.
        config: channels kept by each prunable group.
        macs: multiply-adds per sample.
        params: parameters.
        score: NaN where it could not be told.
        reconstruction_error: relative squared error that the repaired layers make, mean over layers; NaN where nothing
            was repaired.
        seconds: that it took.
        stage: ``"ranked"`` or ``"final"``; from scratch ``"rung 0"``, ``"rung 1"`` ...
    """

    number: int
    config: Mapping[str, int]
    macs: int
    params: int
    score: float
    reconstruction_error: float
    seconds: float
    stage: str = "ranked"

    def row(self) -> tuple[Any, ...]:
        """Values of the columns of :func:`candidate_columns`."""
        known = (self.number, self.stage, self.score, self.macs, self.params, self.reconstruction_error, self.seconds)
        return (*known, *self.config.values())

    @classmethod
    def from_record(cls, record: Mapping[str, str]) -> Candidate:
        """Read a line of the CSV that :meth:`row` became."""
        known = [column.name for column in candidate_columns(())]
        return cls(
            number=int(record["index"]),
            config={name: int(kept) for name, kept in record.items() if name not in known},
            macs=int(record["macs"]),
            params=int(record["params"]),
            score=float(record["score"]),
            reconstruction_error=float(record["reconstruction_error"]),
            seconds=float(record["seconds"]),
            stage=record["stage"],
        )


def candidate_columns(groups: Iterable[str]) -> list[Column]:
    """Columns of a table of candidates: what is known of each, then channels kept, a column a group."""
    formats = {"score": ".4f", "macs": ",", "params": ",", "reconstruction_error": ".4f", "seconds": ".3f"}
    known = ("index", "stage", "score", "macs", "params", "reconstruction_error", "seconds")
    return [Column(name, format=formats.get(name, "")) for name in (*known, *groups)]


def rank(candidates: Iterable[Candidate], mode: Mode) -> list[Candidate]:
    """Sort candidates, best first; equal scores by number, scores that are no number last."""
    sign = -1 if mode == "max" else 1

    def key(candidate: Candidate) -> tuple[bool, float, int]:
        unknown = math.isnan(candidate.score)
        return unknown, 0.0 if unknown else sign * candidate.score, candidate.number

    return sorted(candidates, key=key)


@dataclass
class Candidates(Report):
    """All candidates of a search: tables ``search`` and ``candidates``, figures of scores and of what the best keep.

    Attributes:
        candidates: in the order of stages and numbers.
        mode: whether ``"max"`` or ``"min"`` is best.
        sizes: channels of each prunable group before.
        macs: multiply-adds per sample of the network before.
        params: its parameters.
        dense_scores: score of the network before, by stage; empty where it has none.
        notes: what a reader must know.
        score_name: what the score is.
    """

    data_tables = frozenset({"candidates"})

    candidates: Sequence[Candidate]
    mode: Mode
    sizes: Mapping[str, int]
    macs: int
    params: int
    dense_scores: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    score_name: str = "score"

    @property
    def stages(self) -> list[str]:
        """Stages in their order; the last one decides."""
        return list(dict.fromkeys(candidate.stage for candidate in self.candidates))

    @property
    def best(self) -> Candidate:
        """Best candidate of the last stage."""
        return self.top(1)[0]

    @property
    def dense_score(self) -> float | None:
        """Score of the network before, judged like the best candidate."""
        return self.dense_scores.get(self.stages[-1])

    def top(self, count: int, stage: str | None = None) -> list[Candidate]:
        """The best ``count`` candidates of a stage, by default the last, best first."""
        stage = stage or self.stages[-1]
        return rank((c for c in self.candidates if c.stage == stage), self.mode)[:count]

    def tables(self) -> dict[str, Table]:
        """Network before beside uniform, median and best candidate; a row a candidate and stage with its channels."""
        rows = [candidate.row() for candidate in self.candidates]
        every = Table("Candidates", candidate_columns(self.sizes), rows, caption=" ".join(self.notes))
        return {"search": self._summary(), "candidates": every}

    def figures(self) -> dict[str, Figure]:
        """Scores against multiply-adds, and the ratios that each group keeps in the best candidates."""
        from lightning_eff.pruning.random_channel.figures import candidates_figure, ratio_figure

        return {"candidates": candidates_figure(self), "ratios": ratio_figure(self)}

    def _summary(self) -> Table:
        stage = self.stages[0]
        first = [c for c in self.candidates if c.stage == stage]
        scores = [c.score for c in first if not math.isnan(c.score)]
        of_dense = {name: (value, self.macs, self.params) for name, value in self.dense_scores.items()}
        rows: list[tuple[Any, ...]] = []

        def add(what: str, at: str, score: float, macs: int | None, params: int | None) -> None:
            dense = self.dense_scores.get(at)
            shares = [None if n is None else n / whole for n, whole in ((macs, self.macs), (params, self.params))]
            change = None if dense is None else score - dense
            rows.append((what, at, score, change, macs, shares[0], params, shares[1]))

        for at, (score, macs, params) in of_dense.items():
            add("dense", at, score, macs, params)
        uniform = next((c for c in first if c.number == 0), None)
        if uniform is not None:
            add("uniform", stage, uniform.score, uniform.macs, uniform.params)
        if scores:
            add(f"median of {len(first)}", stage, median(scores), None, None)
        for at in self.stages:
            (best,) = self.top(1, at)
            add(f"best: {best.number}", at, best.score, best.macs, best.params)
        columns: list[str | Column] = [
            "network",
            "stage",
            Column(self.score_name, format=".4f"),
            Column("difference", format="+.4f"),
            Column("MACs", format=","),
            Column("MACs kept", format=".1%"),
            Column("parameters", format=","),
            Column("parameters kept", format=".1%"),
        ]
        return Table("Search", columns, rows, caption=" ".join(self.notes))

    def quantities(self) -> dict[str, float]:
        """What is worth logging: best and median score, that of the network before, error of the repair, speed."""
        first = [c for c in self.candidates if c.stage == self.stages[0]]
        scores = [c.score for c in first if not math.isnan(c.score)]
        seconds = sum(c.seconds for c in first)
        values = {
            "best_score": self.best.score,
            "median_score": median(scores) if scores else math.nan,
            "reconstruction_error": self.best.reconstruction_error,
            "candidates_per_second": len(first) / seconds if seconds else math.nan,
        }
        return values if self.dense_score is None else {**values, "dense_score": self.dense_score}

    def to_dict(self) -> dict[str, Any]:
        """Plain Python for checkpoints."""
        candidates = [{**vars(candidate), "config": dict(candidate.config)} for candidate in self.candidates]
        told = {field.name: getattr(self, field.name) for field in fields(Candidates)}
        return {**told, "candidates": candidates, "sizes": dict(self.sizes), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidates:
        """Read what :meth:`to_dict` wrote; ValueError for anything else."""
        found: Candidates = parsed(cls, data, "the candidates")
        if not found.candidates or not all(found.sizes.keys() == one.config.keys() for one in found.candidates):
            raise ValueError(f"expected candidates, each with the channels of {', '.join(found.sizes)}")
        return found
