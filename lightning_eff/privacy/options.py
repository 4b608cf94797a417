"""What is seldom changed about private training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_eff.accounting import Accountant
from lightning_eff.arguments import check_choice, check_number, check_whole

Dropped = Literal["freeze", "zero_grad"]
IsolationCheck = Literal["off", "warn", "error"]


@dataclass(frozen=True)
class PrivateTrainingOptions:
    """Options of private training beside budget, clipping and selection.

    Args:
        accountant: ``"prv"``, which is tighter, or ``"rdp"``, which is quicker.
        dropped: What the optimizer may do with coordinates a step does not train: ``"freeze"`` gives them their value
            back, bit for bit, whatever momentum and weight decay did; ``"zero_grad"`` only gives a gradient of zero.
        isolation_check: Compare on the first, second, fourth, eighth ... batch the gradients of some samples inside
            of the batch with their gradients alone, which catches losses that mix samples: ``"error"``, ``"warn"``
            or ``"off"``.
        public_buffers: fnmatch patterns of buffers that training steps may change because nothing of the samples is
            in them, such as a counter of steps. Any other that changes is told in every report.
        memory_budget_mb: Megabytes that per-sample gradients may take, >= 0.
        log_every_n_steps: Steps between two exact values of epsilon, >= 1; ``None`` is the Trainer's. It is exact, too,
            at the end of every epoch and before validation and checkpoints; in between it is told for at most a tenth
            more steps than were taken.
        dirpath: Where ``privacy.json`` and ``privacy.md``, the ledger and its report, are written when a fit ends;
            ``None`` writes nothing.
        noise_seed: Makes noise and sampling repeatable, for tests: **nothing is private then**.
        allow_unaccounted_resume: Go on from a checkpoint that does not tell what was spent, or that was trained on
            another data set; every report says so.

    Raises:
        ValueError: An option lies outside its range.
    """

    accountant: Accountant = "prv"
    dropped: Dropped = "freeze"
    isolation_check: IsolationCheck = "error"
    public_buffers: Sequence[str] = ()
    memory_budget_mb: float = 256
    log_every_n_steps: int | None = None
    dirpath: str | Path | None = None
    noise_seed: int | None = None
    allow_unaccounted_resume: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("dropped", self.dropped, ("freeze", "zero_grad")),
            ("isolation_check", self.isolation_check, ("off", "warn", "error")),
        ):
            check_choice(name, value, known)
        if isinstance(self.public_buffers, str):
            raise ValueError(f"public_buffers must be a sequence of patterns, got the string {self.public_buffers!r}")
        object.__setattr__(self, "public_buffers", tuple(self.public_buffers))  # YAML makes lists
        if self.log_every_n_steps is not None:
            check_whole("log_every_n_steps", self.log_every_n_steps)
        if self.noise_seed is not None:
            check_whole("noise_seed", self.noise_seed, 0)
        check_number("memory_budget_mb", self.memory_budget_mb, least=0)


def check_options(options: object) -> None:
    """Refuse what is no :class:`PrivateTrainingOptions`.

    Raises:
        TypeError: Says what to write for a dict.
    """
    if not isinstance(options, PrivateTrainingOptions):
        given = options.items() if isinstance(options, Mapping) else [("accountant", "prv")]
        told = ", ".join(f"{name}={value!r}" for name, value in given)
        raise TypeError(f"expected options=PrivateTrainingOptions({told}), got a {type(options).__name__}")
