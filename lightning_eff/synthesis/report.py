"""What a generator's owner may tell others: the guarantee, what it rests on, what it does not cover."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning_eff.accounting import PrivacyLedger, gaussian_epsilon
from lightning_eff.reporting import Column, Report, Table
from lightning_eff.synthesis.embedding import MeanEmbedding
from lightning_eff.synthesis.options import ReleaseOptions
from lightning_eff.synthesis.signal import drowned_classes, signal_to_noise, usable_classes
from lightning_eff.synthesis.tables import TableSchema
from lightning_eff.synthesis.tables.schema import INFERRED

VALIDATION = "Validation compares private records with generated ones; what val/mmd2 tells is not covered."
"""What a ledger says where validation was allowed."""
_NEIGHBOURS = {
    "replace_one": "one record replaced by another, their number being public",
    "add_remove": "one record more or less",
}
_YES = {True: "yes", False: "no"}
_PACKAGES = ("lightning-eff", "torch", "lightning", "scipy", "numpy")


@dataclass(frozen=True)
class PrivacyReport(Report):
    """Facts of a release, sentences, and a table by class. Nothing in it is private.

    Tables: ``privacy``, ``releases`` if there are several, ``classes``, ``terms``.

    Args:
        facts: Name and value, in the order in which they are shown.
        caveats: Why the guarantee does not hold as it stands; shown first.
        assumptions: What it rests on.
        not_covered: What it does not cover.
        classes: Released count and estimated signal to noise of each class.
        history: The releases, as the ledger recorded them.
    """

    facts: dict[str, Any]
    caveats: list[str]
    assumptions: list[str]
    not_covered: list[str]
    classes: list[dict[str, Any]]
    history: list[dict[str, Any]]

    @property
    def private(self) -> bool:
        """Whether there is a finite epsilon and nothing speaks against it."""
        return bool(self.facts["private"])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain Python; infinity is the word ``"inf"``, as JSON has none."""
        plain = {**self.facts, **{name: getattr(self, name) for name in self._parts}}
        return {name: _jsonable(value) for name, value in plain.items()}

    def releases(self) -> list[dict[str, Any]]:
        """Number, epsilon and sigma of each release by itself, and whether it is the one in use."""
        sigmas = [event["noise_multiplier"] for event in self.history for _ in range(event["steps"])]
        return [
            {
                "release": number,
                "epsilon": gaussian_epsilon(sigma, self.facts["delta"]),
                "sigma": sigma,
                "in_use": number == self.facts.get("release_in_use"),
            }
            for number, sigma in enumerate(sigmas, start=1)
        ]

    _parts = ("caveats", "assumptions", "not_covered", "classes", "history")

    def preface(self) -> list[str]:
        """Return the caveats and the headline."""
        epsilon, delta = self.facts["epsilon"], self.facts["delta"]
        known = f"epsilon = {epsilon:.6g} at delta = {delta:g}" if math.isfinite(epsilon) else "NOT PRIVATE"
        return [*self.caveats, known if self.history else "nothing released yet"]

    def tables(self) -> dict[str, Table]:
        """Return facts, releases if there are several, classes, and what it all rests on and does not cover."""
        rows = [[name.replace("_", " "), _shown(value)] for name, value in self.facts.items()]
        tables = {"privacy": Table("Privacy of the release", ["fact", "value"], rows)}
        if len(releases := self.releases()) > 1:
            told: list[str | Column] = ["release", Column("epsilon", ".6g"), Column("sigma", ".6g"), "in use"]
            rows = [[line["release"], line["epsilon"], line["sigma"], _YES[line["in_use"]]] for line in releases]
            tables["releases"] = Table("Releases", told, rows)
        if self.classes:
            numbers = [Column("records (released)", ",.0f"), Column("signal to noise", ".3g")]
            lines = [list(line.values()) for line in self.classes]
            tables["classes"] = Table("Classes", ["class", *numbers, "remark"], lines)
        sentences = (("rests on", self.assumptions), ("does not cover", self.not_covered))
        if terms := [[kind, sentence] for kind, listed in sentences for sentence in listed]:
            tables["terms"] = Table("Terms", ["epsilon", "sentence"], terms)
        return tables


def privacy_report(
    ledger: PrivacyLedger,
    embedding: MeanEmbedding | None,
    options: ReleaseOptions,
    schema: TableSchema | None = None,
    in_use: int | None = None,
) -> PrivacyReport:
    """Gather what is known of all releases of a ledger.

    Args:
        ledger: With every release.
        embedding: The one in use; ``None`` before the first.
        options: What the next one would promise; of a release that is there, what it has promised counts.
        schema: Of a table.
        in_use: Number of the release ``embedding``, from 1; by default that of the last with its sigma.
    """
    epsilon = ledger.epsilon()
    meta = {} if embedding is None else embedding.meta
    released = options.counts_are_released if embedding is None else meta.get("count_weight") is not None
    facts = {
        "private": bool(ledger.steps) and math.isfinite(epsilon) and not ledger.caveats,
        "epsilon": epsilon,
        "delta": ledger.delta,
        "max_epsilon": ledger.max_epsilon,
        "releases": ledger.steps,
        "release_in_use": None if embedding is None else in_use or _last_with(ledger, meta.get("sigma")),
        "sigma": meta.get("sigma"),
        "sensitivity": meta.get("sensitivity"),
        "adjacency": f"{ledger.adjacency}: {_NEIGHBOURS[ledger.adjacency]}",
        "unit_of_privacy": _unit(meta.get("max_contributions", options.max_contributions)),
        "records": None if embedding is None else embedding.num_records or "not public",
        "class_counts": "released with noise" if released else "public shares",
        "mechanism": "Gaussian, calibrated exactly (arXiv 1805.06530)",
        "noise_source": meta.get("noise"),
        "schema": None if schema is None else schema.source,
        "nonprivate_validation": VALIDATION in ledger.not_covered,
        "versions": _versions(),
    }
    assumptions = list(ledger.assumptions)
    if schema is not None and schema.source == INFERRED:
        assumptions.append("The schema was taken from rows that its author declared public.")
    return PrivacyReport(
        {name: value for name, value in facts.items() if value is not None},
        list(ledger.caveats),
        assumptions,
        list(ledger.not_covered),
        [] if embedding is None else _classes(embedding, schema),
        [dict(vars(event)) for event in ledger.history],
    )


def _last_with(ledger: PrivacyLedger, sigma: float | None) -> int | None:
    sigmas = [event.noise_multiplier for event in ledger.history for _ in range(event.steps)]
    return max((number for number, own in enumerate(sigmas, start=1) if own == sigma), default=None)


def _unit(max_contributions: int) -> str:
    return "one record" if max_contributions == 1 else f"one person with up to {max_contributions} records"


def _classes(embedding: MeanEmbedding, schema: TableSchema | None) -> list[dict[str, Any]]:
    names = schema.label_categories if schema is not None else None
    ratio, usable = signal_to_noise(embedding).tolist(), usable_classes(embedding).tolist()
    drowned = drowned_classes(embedding).tolist()
    return [
        {
            "class": c if names is None else names[c] if c < len(names) else "missing",
            "records": float(embedding.counts[c]),
            "signal_to_noise": ratio[c],
            "remark": ("signal below its noise" if drowned[c] else None)
            if usable[c]
            else "too few records for this epsilon; left out of training",
        }
        for c in range(embedding.num_classes)
    ]


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_jsonable(entry) for entry in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value
