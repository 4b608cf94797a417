"""The classifiers with which the literature on private data generation measures synthetic data.

The twelve of Harder et al., DP-MERF, 2021, under fixed settings: nothing is chosen by looking at test rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

TABLE_CLASSIFIERS = (
    "logistic_regression",
    "gaussian_nb",
    "bernoulli_nb",
    "linear_svm",
    "decision_tree",
    "lda",
    "adaboost",
    "bagging",
    "random_forest",
    "gradient_boosting",
    "mlp",
    "hist_gradient_boosting",
)
"""For tables; the last stands for XGBoost, which takes its place under the name ``"xgboost"`` where installed."""

IMAGE_CLASSIFIERS = ("logistic_regression", "mlp")
"""For images."""

MAJORITY = "class shares only"
"""The classifier that knows the class shares and looks at no column."""


def make_classifier(name: str, seed: int = 0) -> Any:
    """Build a classifier of scikit-learn (or XGBoost's), not yet fitted.

    Args:
        name: One of :data:`TABLE_CLASSIFIERS`, ``"xgboost"`` if installed, or :data:`MAJORITY`.
        seed: Of what it draws.

    Raises:
        ValueError: The name is not known, or XGBoost is not installed.
    """
    check_classifiers((name,))
    return _makers()[name](seed)


def check_classifiers(names: tuple[str, ...]) -> None:
    """Raise a ValueError unless all names are known and none occurs twice."""
    known = [*TABLE_CLASSIFIERS, "xgboost", MAJORITY]
    if not names or len(set(names)) < len(names) or any(name not in known for name in names):
        raise ValueError(f"expected classifiers out of {known}, none twice, got {list(names)}")
    if "xgboost" in names and find_spec("xgboost") is None:
        raise ValueError(
            "the classifier xgboost needs xgboost: pip install xgboost, or take its relative hist_gradient_boosting"
        )


def _makers() -> dict[str, Callable[[int], Any]]:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import (
        AdaBoostClassifier,
        BaggingClassifier,
        GradientBoostingClassifier,
        HistGradientBoostingClassifier,
        RandomForestClassifier,
    )
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import BernoulliNB, GaussianNB
    from sklearn.neural_network import MLPClassifier
    from sklearn.svm import LinearSVC
    from sklearn.tree import DecisionTreeClassifier

    def seeded(kind: Any, **settings: Any) -> Callable[[int], Any]:
        return lambda seed: kind(random_state=seed, **settings)

    def xgboost(seed: int) -> Any:
        from xgboost import XGBClassifier  # type: ignore[import-not-found, unused-ignore]

        return XGBClassifier(random_state=seed, n_jobs=1)

    return {
        "logistic_regression": seeded(LogisticRegression, max_iter=300),
        "gaussian_nb": lambda seed: GaussianNB(var_smoothing=1e-3),  # constant columns have no variance
        "bernoulli_nb": lambda seed: BernoulliNB(binarize=0.5),
        "linear_svm": seeded(LinearSVC),
        "decision_tree": seeded(DecisionTreeClassifier, max_depth=10),
        "lda": lambda seed: LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1),
        "adaboost": seeded(AdaBoostClassifier),
        "bagging": seeded(BaggingClassifier, n_estimators=20, max_samples=0.1),
        "random_forest": seeded(RandomForestClassifier, min_samples_leaf=2),
        "gradient_boosting": seeded(GradientBoostingClassifier, n_estimators=50, subsample=0.1),
        "mlp": seeded(MLPClassifier, max_iter=60, n_iter_no_change=5, tol=1e-3),
        "hist_gradient_boosting": seeded(HistGradientBoostingClassifier),
        "xgboost": xgboost,
        MAJORITY: partial(lambda kind, seed: kind(strategy="prior"), DummyClassifier),
    }
