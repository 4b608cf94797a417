"""What a private training run says of itself: when it begins, to loggers, and in files when it ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.documents import write_text
from lightning_eff.privacy.planning import PrivacyPlan


def banner(
    plan: PrivacyPlan,
    settings: Mapping[str, Any],
    *,
    trainable: int,
    kept: int,
    active: int,
    poisson: bool,
    seeded: bool,
) -> str:
    """Tell in three lines what is about to happen.

    Args:
        plan: Of the run.
        settings: From :func:`hyperparameters`.
        trainable: Coordinates that the optimizer has.
        kept: Those that pre-pruning left.
        active: Those that the first step trains.
        poisson: Whether batches are drawn, not shuffled.
        seeded: Whether the noise can be repeated.
    """
    sampling = "samples drawn for each step" if poisson else "batches SHUFFLED, so that epsilon is approximate"
    noise = "noise_seed, NOT PRIVATE" if seeded else "the operating system"
    return "\n".join(
        (
            f"Private training: {plan}.",
            f"  C = {settings['privacy/max_grad_norm']:g} ({settings['privacy/clipping']}); "
            f"{trainable:,} coordinates, {kept:,} kept, {active:,} trained in the first step; {sampling}; "
            f"noise from {noise}.",
            "  Neighbours: one sample more or less. Not covered: logged training metrics, and choices made on private "
            "validation data.",
        )
    )


def hyperparameters(plan: PrivacyPlan, max_grad_norm: float, clipping: str) -> dict[str, Any]:
    """What loggers are told beside the module's own hyperparameters."""
    return {
        "privacy/noise_multiplier": plan.noise_multiplier,
        "privacy/max_grad_norm": max_grad_norm,
        "privacy/clipping": clipping,
        "privacy/delta": plan.delta,
        "privacy/accountant": plan.accountant,
        "privacy/sample_rate": plan.sample_rate,
    }


def tell_loggers(loggers: Iterable[Any], settings: Mapping[str, Any]) -> None:
    """Add hyperparameters to those that each logger has."""
    for logger in loggers:
        logger.log_hyperparams(dict(settings))


def write_reports(ledger: PrivacyLedger, dirpath: str | Path) -> None:
    """Write ``privacy.json``, which :meth:`PrivacyLedger.load` reads, and ``privacy.md``."""
    ledger.save(Path(dirpath) / "privacy.json")
    write_text(Path(dirpath) / "privacy.md", ledger.to_markdown())
