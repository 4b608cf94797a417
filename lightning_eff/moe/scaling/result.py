"""What a fit found: the law, how sure its coefficients and its predictions are, how well it holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_eff.arguments import check_number
from lightning_eff.documents import parsed, reading, write_text
from lightning_eff.moe.scaling.laws import ScalingLaw, law_from_dict
from lightning_eff.moe.scaling.objective import Objective
from lightning_eff.moe.scaling.runs import Runs
from lightning_eff.reporting import Column, Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
_VERSION = 1
_COLUMNS = ("n_total", "n_tokens", "loss", "granularity", "n_active", "expansion_rate", "flops", "weight")
# what a file tells as it is
_PLAIN: dict[str, Any] = {
    "fixed": tuple[str, ...],
    "value": float,
    "spread": float,
    "converged": bool,
    "rmse": float,
    "r2": float,
    "holdout_rmse": float | None,
    "notes": list[str],
}


class Prediction(NamedTuple):
    """Losses in nats a token with a band; without bootstrap the band is NaN.

    Args:
        loss: of the fitted law.
        low: lower end of the band of the resampled laws.
        high: its upper end.
    """

    loss: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, eq=False)
class FitResult(Report):
    """A fitted law, by :func:`fit_scaling_law`: table ``coefficients``, figures ``fit`` and ``granularity``.

    Args:
        law: the law; ``law(n_total, n_tokens, granularity)`` predicts.
        objective: what was minimised.
        fixed: names of coefficients that were held.
        value: the objective reached.
        spread: how far the worst of the starts ended above it.
        converged: two starts or more ended at the same optimum.
        rmse: root mean squared residual of the loss, nats a token.
        r2: share of the variance of the loss that is explained.
        holdout_rmse: RMSE on the runs of lowest loss of a law fitted without them; None if not measured.
        runs: the runs it was fitted to.
        samples: coefficients fitted to resampled runs, [S] by name; empty without bootstrap.
        notes: what the runs do not identify.
    """

    law: ScalingLaw
    objective: Objective
    fixed: tuple[str, ...]
    value: float
    spread: float
    converged: bool
    rmse: float
    r2: float
    holdout_rmse: float | None
    runs: Runs
    samples: dict[str, Floats] = field(repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def params(self) -> dict[str, float]:
        """Coefficients and exponents by name."""
        return self.law.coefficients

    @property
    def identifiable(self) -> bool:
        """Nothing in ``notes``: every coefficient is one that the runs determine."""
        return not self.notes

    def intervals(self, ci: float = 0.8) -> dict[str, tuple[float, float]]:
        """Percentiles of the coefficients over the resampled fits, by name; empty without bootstrap.

        Args:
            ci: share of the fits between the two, in (0, 1).
        """
        edges = _edges(ci)
        return {
            name: (float(low), float(high))
            for name in self.law.parameters
            if name in self.samples
            for low, high in [np.percentile(self.samples[name], edges)]
        }

    def laws(self) -> Iterator[ScalingLaw]:
        """The laws fitted to resampled runs."""
        state = self.law.to_dict()
        for values in zip(*(self.samples[name] for name in self.samples), strict=True):
            yield law_from_dict({**state, **dict(zip(self.samples, map(float, values), strict=True))})

    def predict(
        self, n_total: ArrayLike, n_tokens: ArrayLike, granularity: ArrayLike = 1.0, ci: float = 0.8
    ) -> Prediction:
        """Predict losses with a band.

        Args:
            n_total: N, > 0.
            n_tokens: D, > 0.
            granularity: G, >= 1.
            ci: share of the resampled laws inside of the band, in (0, 1).

        Returns:
            Three arrays of the shape the arguments broadcast to.
        """
        loss = np.asarray(self.law(n_total, n_tokens, granularity))
        every = np.array([law(n_total, n_tokens, granularity) for law in self.laws()])
        if not len(every):
            return Prediction(loss, np.full_like(loss, np.nan), np.full_like(loss, np.nan))
        low, high = np.percentile(every, _edges(ci), axis=0)
        return Prediction(loss, low, high)

    def tables(self) -> dict[str, Table]:
        """Coefficients with intervals."""
        return {"coefficients": self.coefficients()}

    def figures(self) -> dict[str, Figure]:
        """Predicted against measured losses, and losses over granularity where the runs differ in it."""
        from lightning_eff.moe.scaling.figures import fit_figure, granularity_figure, tells_granularity

        granularity = {"granularity": granularity_figure(self)} if tells_granularity(self) else {}
        return {"fit": fit_figure(self), **granularity}

    def coefficients(self, ci: float = 0.8) -> Table:
        """Coefficients with the interval that holds this share of the resampled fits, in (0, 1)."""
        low, high = _edges(ci)
        intervals = self.intervals(ci)
        rows = [
            (name, value, *((None, None) if name in self.fixed else intervals.get(name, (None, None))), how)
            for name, value in self.params.items()
            for how in ["fixed" if name in self.fixed else "fitted"]
        ]
        columns = [Column("parameter"), Column("estimate", ".4g"), Column(f"{low:g} %", ".4g")]
        columns += [Column(f"{high:g} %", ".4g"), Column("")]
        held = "" if self.holdout_rmse is None else f", {self.holdout_rmse:.4f} on the lowest losses when left out"
        again = self.runs.duplicates
        counts = f"{len(self.runs)} runs" + (f" ({again} again at the place of another)" if again else "")
        counts += f", {self.runs.diverged} diverged left out" if self.runs.diverged else ""
        caption = [
            f"{counts}; RMSE {self.rmse:.4f} nats a token{held}; R2 {self.r2:.4f}; objective {self.value:.6g}.",
            *(f"Mind: {note}." for note in self.notes),
        ]
        return Table(f"Scaling law, {self.law.to_dict()['law']}", columns, rows, "\n".join(caption))

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON; folders are made. :func:`load_law` reads the law alone from it."""
        runs: dict[str, Any] = {"names": self.runs.names, "diverged": self.runs.diverged}
        for name in _COLUMNS:
            column = getattr(self.runs, name)
            runs[name] = None if column is None else column.tolist()
        state = {
            "version": _VERSION,
            "law": self.law.to_dict(),
            "objective": asdict(self.objective),
            "runs": runs,
            "samples": {name: values.tolist() for name, values in self.samples.items()},
        }
        state |= {name: getattr(self, name) for name in _PLAIN}
        return write_text(path, json.dumps(state) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> FitResult:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file holds no fit, or one of a later version.
        """
        with reading(f"{path} holds no fit of a scaling law"):
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            if state["version"] != _VERSION:
                raise ValueError(f"expected version {_VERSION}, got {state['version']!r}")
            law, runs = law_from_dict(state["law"]), state["runs"]
            kinds = {
                name: list[float] if name in ("n_total", "n_tokens", "loss") else list[float] | None
                for name in _COLUMNS
            }
            columns = {name: parsed(kind, runs[name], name) for name, kind in kinds.items()}
            names = parsed(tuple[str, ...], runs["names"], "names")
            samples = parsed(dict[str, list[float]], state["samples"], "samples")
            for what, told in (("columns", [*columns.values(), names or None]), ("samples", list(samples.values()))):
                if len({len(column) for column in told if column is not None}) > 1:
                    raise ValueError(f"expected {what} of one length")
            if samples and samples.keys() != law.coefficients.keys():
                raise ValueError(f"expected samples of {sorted(law.coefficients)}, got {sorted(samples)}")
            return cls(
                law=law,
                objective=parsed(Objective, state["objective"], "objective"),
                runs=Runs(
                    **{
                        name: None if column is None else np.array(column, np.float64)
                        for name, column in columns.items()
                    },  # type: ignore[arg-type]
                    names=names,
                    diverged=parsed(int, runs["diverged"], "diverged"),
                ),
                samples={name: np.array(values, np.float64) for name, values in samples.items()},
                **{name: parsed(kind, state[name], name) for name, kind in _PLAIN.items()},
            )


def quality(law: ScalingLaw, runs: Runs) -> tuple[float, float]:
    """Root mean squared residual of the loss, and the share of its variance that is explained."""
    granularity = 1.0 if runs.granularity is None else runs.granularity
    residual = law(runs.n_total, runs.n_tokens, granularity) - runs.loss
    variance = ((runs.loss - runs.loss.mean()) ** 2).sum()
    rmse = float(np.sqrt((residual**2).mean()))
    return rmse, float(1 - (residual**2).sum() / variance) if variance else float("nan")


def _edges(ci: float) -> tuple[float, float]:
    check_number("ci", ci, above=0, below=1)
    return round(50 * (1 - ci), 10), round(50 * (1 + ci), 10)
