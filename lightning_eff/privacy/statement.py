"""What every report of private training says beside epsilon: what it rests on, and what it does not cover."""

from __future__ import annotations

from lightning_eff.accounting import PrivacyLedger
from lightning_eff.privacy.budget import SEEDED, SHUFFLED, note


def write_statement(ledger: PrivacyLedger, *, poisson: bool, seeded: bool) -> None:
    """Add the sentences that hold for every fit.

    Args:
        ledger: Gets them, each once.
        poisson: Whether batches are drawn, not shuffled.
        seeded: Whether the noise can be repeated.
    """
    if seeded:
        note(ledger.caveats, SEEDED)
    if poisson:
        note(ledger.assumptions, "Each step draws every sample with probability q, whatever the others do.")
    else:
        note(ledger.caveats, SHUFFLED)
    for sentence in (
        "Which coordinates a step trains depends on released parameters and gradients, public data and "
        "independent randomness alone.",
        "The number of samples, the network and all settings were chosen without looking at the private data.",
    ):
        note(ledger.assumptions, sentence)
    for sentence in (
        "Losses and metrics of private batches that were logged or shown.",
        "Choices made on private validation data: when to stop, which checkpoint, which settings.",
        "Leaks of floating-point noise and of running times.",
    ):
        note(ledger.not_covered, sentence)
