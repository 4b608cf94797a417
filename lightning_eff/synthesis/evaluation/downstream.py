"""What synthetic data are good for: classifiers trained on them and tested on real records (TSTR).

Shapes: N rows, D coordinates, C classes.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_eff.arguments import check_whole
from lightning_eff.reporting import Column, Report, Table
from lightning_eff.reporting import progress as progress_bar
from lightning_eff.synthesis.evaluation.classifiers import (
    MAJORITY,
    TABLE_CLASSIFIERS,
    check_classifiers,
    make_classifier,
)

SCORES = ("roc_auc", "average_precision", "f1", "accuracy")
"""ROC-AUC and average precision come from probabilities or margins, F1 and accuracy from decisions. With two classes
the positive one is class 1; with more, each class against the rest, averaged over the classes tested."""

Labelled = tuple[Any, Any]


@dataclass(frozen=True)
class Downstream(Report):
    """Scores of classifiers by what they were trained on: table ``classifiers``.

    Attributes:
        scores: By name of the training data, classifier and score, one value a seed.
    """

    scores: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)

    def mean(self, score: str, classifier: str | None = None, trained_on: str = "synthetic") -> float:
        """Mean over seeds, and over the classifiers unless one is named; those that look at no column are left out."""
        chosen = [classifier] if classifier else [name for name in self.scores[trained_on] if name != MAJORITY]
        return statistics.fmean(statistics.fmean(self.scores[trained_on][name][score]) for name in chosen)

    def tables(self) -> dict[str, Table]:
        """A row a classifier: each score trained on synthetic data and, where known, on real data; mean ± deviation."""
        sources = list(self.scores)
        short = {"roc_auc": "ROC-AUC", "average_precision": "avg. prec.", "f1": "F1", "accuracy": "accuracy"}
        columns = ["classifier"] + [f"{short[score]} {source}" for score in SCORES for source in sources]
        rows: list[list[Any]] = [
            [name, *(_shown(self.scores[source][name][score]) for score in SCORES for source in sources)]
            for name in self.scores[sources[0]]
        ]
        means: list[Any] = [f"{self.mean(score, trained_on=source):.3f}" for score in SCORES for source in sources]
        seeds = len(next(iter(self.scores[sources[0]].values()))["accuracy"])
        rows.append([f"mean of {len(rows) - (MAJORITY in self.scores[sources[0]])}", *means])
        table = Table(
            "Trained on synthetic data, tested on real records",
            [Column(columns[0]), *(Column(column, align="right") for column in columns[1:])],
            rows,
            f"{seeds} seed{'s' if seeds > 1 else ''} of the classifiers"
            + ("; mean ± standard deviation" * (seeds > 1)),
        )
        return {"classifiers": table}


def train_synthetic_test_real(
    synthetic: Labelled,
    test: Labelled,
    *,
    real: Labelled | None = None,
    classifiers: Sequence[str] = TABLE_CLASSIFIERS,
    seeds: int = 1,
    num_classes: int | None = None,
    progress: bool = True,
) -> Downstream:
    """Train classifiers on synthetic rows and score them on real ones.

    Args:
        synthetic: Rows ``[N, D]`` (more axes are flattened) and classes ``[N]``, tensors or arrays; the settings of the
            classifiers expect coordinates in [0, 1].
        test: Real rows and classes that no generator saw, in the same coordinates.
        real: Real rows to train on for comparison; ``None`` leaves it out.
        classifiers: Names out of :data:`TABLE_CLASSIFIERS`; one that looks at no column is added.
        seeds: Times each classifier is trained, >= 1.
        num_classes: C; ``None`` counts on the largest class at hand.
        progress: Whether a bar is shown.

    Returns:
        Scores under ``"synthetic"`` and, if given, ``"real"``.

    Raises:
        ValueError: Shapes do not fit, or a classifier is not known.
    """
    names = (*classifiers, MAJORITY)
    check_classifiers(names)
    check_whole("seeds", seeds)
    sources = {"synthetic": _arrays("synthetic", synthetic)}
    if real is not None:
        sources["real"] = _arrays("real", real)
    tested = _arrays("test", test)
    for name, (x, _) in sources.items():
        if x.shape[1] != tested[0].shape[1]:
            raise ValueError(f"expected {name} rows of {tested[0].shape[1]} coordinates as in test, got {x.shape[1]}")
    largest = 1 + max(int(y.max()) for _, y in (*sources.values(), tested))
    classes = largest if num_classes is None else num_classes
    if largest > classes:
        raise ValueError(f"expected classes in 0..{classes - 1}, got {largest - 1}")
    result = Downstream({source: {name: {s: [] for s in SCORES} for name in names} for source in sources})
    with progress_bar("classifiers", len(sources) * len(names) * seeds, enabled=progress, unit="fits") as bar:
        for source, (x, y) in sources.items():
            for name in names:
                for seed in range(seeds):
                    for score, value in fit_and_score(name, (x, y), tested, classes, seed).items():
                        result.scores[source][name][score].append(value)
                    bar.advance(note=name)
    return result


def fit_and_score(name: str, train: Labelled, test: Labelled, num_classes: int, seed: int = 0) -> dict[str, float]:
    """Train one classifier and return the four :data:`SCORES`; NaN where the test rows leave one undefined."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score

    (x, y), (x_test, y_test) = train, test
    # with rows of one class only there is nothing to be learned but that
    model = make_classifier(name if len(np.unique(y)) > 1 else MAJORITY, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # so many steps are the classifier's setting
        model.fit(x, y)
    likely = np.zeros((len(x_test), num_classes))
    likely[:, model.classes_] = _likelihood(model, x_test)
    decided = model.predict(x_test)
    positive = [1] if num_classes == 2 else list(range(num_classes))
    tested = [c for c in positive if 0 < (y_test == c).sum() < len(y_test)]
    if not tested:
        ranked = {"roc_auc": float("nan"), "average_precision": float("nan")}
    else:
        ranked = {
            "roc_auc": statistics.fmean(float(roc_auc_score(y_test == c, likely[:, c])) for c in tested),
            "average_precision": statistics.fmean(
                float(average_precision_score(y_test == c, likely[:, c])) for c in tested
            ),
        }
    f1 = f1_score(y_test, decided, labels=tested or positive, average="macro", zero_division=0)
    return {**ranked, "f1": float(f1), "accuracy": float(accuracy_score(y_test, decided))}


class TSTRScore(Metric):
    """:func:`train_synthetic_test_real` as a metric that gathers synthetic and real batches.

    ``compute`` returns ``{"logistic_regression/roc_auc": tensor(0.89), ...}``, means over seeds.

    Args:
        classifiers: Names out of :data:`TABLE_CLASSIFIERS`.
        num_classes: C; ``None`` counts on the largest class at hand.
        seeds: Times each classifier is trained, >= 1.
        **kwargs: Of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    synthetic_x: list[Tensor]
    synthetic_y: list[Tensor]
    real_x: list[Tensor]
    real_y: list[Tensor]

    def __init__(
        self,
        classifiers: Sequence[str] = ("logistic_regression", "hist_gradient_boosting"),
        num_classes: int | None = None,
        seeds: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_classifiers(tuple(classifiers))
        self.classifiers, self.num_classes, self.seeds = tuple(classifiers), num_classes, seeds
        for name in ("synthetic_x", "synthetic_y", "real_x", "real_y"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, x: Tensor, y: Tensor, real: bool) -> None:
        """Take rows ``[N, ...]`` and classes ``[N]``: real ones to test on, or synthetic ones to train on."""
        (self.real_x if real else self.synthetic_x).append(x.flatten(1))
        (self.real_y if real else self.synthetic_y).append(y)

    def compute(self) -> dict[str, Tensor]:
        """Train and score.

        Raises:
            ValueError: There are no synthetic or no real rows.
        """
        # gathered from several processes they are tensors, else lists
        sides = [self.synthetic_x, self.synthetic_y, self.real_x, self.real_y]
        if any(len(side) == 0 for side in sides):
            raise ValueError("expected synthetic rows and real rows, got only one of the two: call update with both")
        x, y, x_test, y_test = map(dim_zero_cat, sides)
        result = train_synthetic_test_real(
            (x, y),
            (x_test, y_test),
            classifiers=self.classifiers,
            seeds=self.seeds,
            num_classes=self.num_classes,
            progress=False,
        )
        means = {(name, score): result.mean(score, name) for name in self.classifiers for score in SCORES}
        return {f"{name}/{score}": torch.tensor(value) for (name, score), value in means.items()}


def _likelihood(model: Any, x: NDArray[Any]) -> NDArray[Any]:
    if hasattr(model, "predict_proba"):
        likely: NDArray[Any] = model.predict_proba(x)
        return likely
    margin: NDArray[Any] = model.decision_function(x)
    return np.stack([-margin, margin], axis=1) if margin.ndim == 1 else margin


def _arrays(name: str, rows: Labelled) -> tuple[NDArray[Any], NDArray[Any]]:
    x, y = (np.asarray(part.detach().cpu() if isinstance(part, Tensor) else part) for part in rows)
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y) or len(x) == 0:
        raise ValueError(
            f"expected {name} rows [N, D] and classes [N], N >= 1, got {list(x.shape)} and {list(y.shape)}"
        )
    if y.dtype.kind not in "iu" or y.min() < 0:
        raise ValueError(f"expected {name} classes to be whole numbers >= 0, got {y.dtype} from {y.min()}")
    return x.reshape(len(x), -1), y


def _shown(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"
