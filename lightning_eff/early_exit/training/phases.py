"""The phases of training and when each begins (arXiv 2407.14320, section on regimes).

A phase trains the backbone on its own output (``"backbone"``), everything on all outputs (``"all"``), or the heads on
a backbone that stands still (``"heads"``), with an optimizer and a schedule of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable

from lightning_eff.documents import parsed, whole_state
from lightning_eff.early_exit.training.losses import Weights
from lightning_eff.early_exit.training.schedules import Schedule

Unit = Literal["epoch", "step"]

REGIMES = {"mixed": ("backbone", "all"), "joint": ("all",), "disjoint": ("backbone", "heads")}
TRAINABLE = ("backbone", "all", "heads")


@dataclass(frozen=True)
class Phase:
    """One part of the training.

    Attributes:
        train: ``"backbone"``, ``"all"`` or ``"heads"``.
        epochs: its length, >= 1; None is a share of the trainer's epochs.
        optimizer: ``parameters -> optimizer``; None is the module's.
        lr_scheduler: see :data:`~.schedules.Schedule`; None is the module's.
        loss_weights: of the outputs, see :func:`~.losses.loss_weights`; None is the module's.

    Raises:
        ValueError: an unknown part, or no epochs.
    """

    train: Literal["backbone", "all", "heads"]
    epochs: int | None = None
    optimizer: OptimizerCallable | None = None
    lr_scheduler: Schedule | None = None
    loss_weights: Weights | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.train not in TRAINABLE:
            raise ValueError(f"expected a phase to train one of {', '.join(map(repr, TRAINABLE))}, got {self.train!r}")
        if self.epochs is not None and (not isinstance(self.epochs, int) or self.epochs < 1):
            raise ValueError(f"expected a phase of at least one epoch, or None for a share, got {self.epochs!r}")

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint tells of the phase, plain Python."""
        return {"train": self.train, "epochs": self.epochs}


def phases_from(regime: str | Sequence[Phase | Mapping[str, Any]]) -> tuple[Phase, ...]:
    """Phases of a regime: ``"mixed"``, ``"joint"``, ``"disjoint"``, or a list of phases, which may be dicts.

    Raises:
        ValueError: an unknown name, no phases, or a dict that is no phase.
    """
    if isinstance(regime, str):
        if regime not in REGIMES:
            raise ValueError(f"regime must be one of {', '.join(REGIMES)}, or a list of phases, got {regime!r}")
        return tuple(Phase(part) for part in REGIMES[regime])  # type: ignore[arg-type]
    if not regime:
        raise ValueError(f"expected at least one phase, or one of {', '.join(map(repr, REGIMES))}")
    known = [field.name for field in fields(Phase)]
    for one in regime:
        if isinstance(one, Mapping) and (set(one) - set(known) or "train" not in one):
            raise ValueError(f"expected a phase with 'train' and any of {known[1:]}, got {dict(one)}")
    return tuple(one if isinstance(one, Phase) else Phase(**one) for one in regime)


@dataclass(frozen=True)
class Timetable:
    """How long each phase lasts.

    Attributes:
        unit: what is counted, ``"epoch"`` or ``"step"`` (of the optimizer).
        lengths: of the phases; 0 is left out, None lasts until somebody ends it.
        total: length of the fit; None is without end.
        notes: what the user should know about it.
    """

    unit: Unit
    lengths: tuple[int | None, ...]
    total: int | None
    notes: tuple[str, ...] = ()


def timetable(
    phases: Sequence[Phase],
    *,
    start: int = 0,
    max_epochs: int | None = None,
    max_steps: int | None = None,
    split: float = 0.5,
    open_ended: bool = False,
) -> Timetable:
    """Share out the trainer's epochs, or its steps where it counts nothing else, among the phases.

    Args:
        phases: in order.
        start: the first phase that is trained; those before are left out.
        max_epochs: of the trainer; None is no limit.
        max_steps: of the trainer, looked at where there are neither ``max_epochs`` nor epochs of phases.
        split: share of the first, where two phases have no epochs of their own, in [0, 1]. Any other number of such
            phases share equally.
        open_ended: whether something else ends phases, early stopping for example.

    Raises:
        ValueError: nothing says how long the phases last.
    """
    trained = list(phases[start:])
    given = [phase.epochs for phase in trained]
    skipped: tuple[int | None, ...] = (0,) * start
    if max_epochs is None and None not in given:
        lengths = [epochs for epochs in given if epochs is not None]
        return Timetable("epoch", (*skipped, *lengths), sum(lengths))
    if max_epochs is None and max_steps is not None and given == [None] * len(given):
        return Timetable("step", (*skipped, *_shares(max_steps, len(given), split)), max_steps)
    if max_epochs is None:
        if len(trained) > 1 and not open_ended:
            raise ValueError(
                f"nothing says how long the phases {[phase.train for phase in trained]} last: give "
                "Trainer(max_epochs=...), epochs to every phase, or (with max_epochs=-1) PhaseEarlyStopping"
            )
        return Timetable("epoch", (*skipped, *given), None)
    rest = max(0, max_epochs - sum(epochs for epochs in given if epochs is not None))
    shares = iter(_shares(rest, given.count(None), split))
    wanted = [next(shares) if epochs is None else epochs for epochs in given]
    lengths = []
    for epochs in wanted:
        lengths.append(min(epochs, max_epochs - sum(lengths)))
    notes = []
    if any(got < wish for got, wish in zip(lengths, wanted, strict=True)) or (0 in lengths and 0 < split < 1):
        told = ", ".join(f"{phase.train} {got}" for phase, got in zip(trained, lengths, strict=True))
        notes.append(f"max_epochs={max_epochs} is too few for the phases, which get: {told}")
    spare = max_epochs - sum(lengths)
    if spare:
        lengths[-1] += spare
        notes.append(
            f"the phases have {sum(wanted)} epochs and max_epochs is {max_epochs}: the last one is extended by {spare}"
        )
    return Timetable("epoch", (*skipped, *lengths), max_epochs, tuple(notes))


def _shares(total: int, count: int, split: float) -> list[int]:
    if count != 2:
        return [(i + 1) * total // count - i * total // count for i in range(count)]
    first = round(total * split)
    if 0 < split < 1 and total > 1:
        first = min(max(first, 1), total - 1)
    return [first, total - first]


class PhaseClock:
    """Which phase it is. Knows nothing of the trainer but its epoch and its step.

    Args:
        phases: in order.
        start: the first phase.

    Attributes:
        index: of the current phase.
        began: epoch and step at which it began.
        saved: epochs (or steps) by which phases were ended early; the fit ends as much earlier.
    """

    def __init__(self, phases: Sequence[Phase], start: int = 0) -> None:
        self.phases = tuple(phases)
        self.start = start
        self.table = Timetable("epoch", (None,) * len(self.phases), None)
        self.restart()

    def restart(self) -> None:
        """Go back to the first phase that lasts."""
        self.index, self.saved, self._asked = self.start, 0, False
        self.began: dict[Unit, int] = {"epoch": 0, "step": 0}
        while not self.is_last and self.table.lengths[self.index] == 0:
            self.index += 1

    @property
    def phase(self) -> Phase:
        """The current one."""
        return self.phases[self.index]

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it."""
        return self.index == len(self.phases) - 1

    @property
    def length(self) -> int | None:
        """Of the current phase; the last one lasts until the end of the fit. None if that is open."""
        if not self.is_last:
            return self.table.lengths[self.index]
        return None if self.table.total is None else self.table.total - self.saved - self.began[self.table.unit]

    def ask_next(self) -> None:
        """End the current phase before its time, at the next :meth:`advance`."""
        self._asked = True

    def advance(self, epoch: int, step: int) -> bool:
        """Move on if it is time, and tell whether that was so.

        Args:
            epoch: about to begin, or running.
            step: optimizer steps done.
        """
        now: dict[Unit, int] = {"epoch": epoch, "step": step}
        before = self.index
        while not self.is_last and (self._asked or self._over(now)):
            length, unit = self.table.lengths[self.index], self.table.unit
            begins = dict(now)
            if length is not None:
                planned = self.began[unit] + length
                if self._asked:
                    self.saved += max(0, planned - now[unit])
                else:
                    begins[unit] = planned
            self.index, self.began, self._asked = self.index + 1, begins, False
        return self.index != before

    def finished(self, epoch: int, step: int) -> bool:
        """Tell whether the last phase is over although the trainer would go on, since earlier ones were cut short."""
        return self.is_last and self.saved > 0 and self._over({"epoch": epoch, "step": step})

    def progress(self, epoch: int, step: int) -> tuple[int, int]:
        """Number of the epoch in the phase, from 1, and epochs of the phase; steps where these are counted."""
        now: dict[Unit, int] = {"epoch": epoch, "step": step}
        done = now[self.table.unit] - self.began[self.table.unit] + 1
        return done, self.length or done

    def state_dict(self) -> dict[str, Any]:
        """Plain Python, for checkpoints."""
        return {"index": self.index, "began": dict(self.began), "saved": self.saved, "asked": self._asked}

    @whole_state
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` wrote."""
        index, count = parsed(int, state["index"], "index"), len(self.phases)
        if not 0 <= index < count:
            raise ValueError(f"expected the index of one of {count} phases, got {index}")
        self.index, self.saved = index, parsed(int, state["saved"], "saved")
        self._asked = parsed(bool, state["asked"], "asked")
        self.began = parsed(dict[Unit, int], state["began"], "began")

    def _over(self, now: Mapping[Unit, int]) -> bool:
        return self.length is not None and now[self.table.unit] - self.began[self.table.unit] >= self.length
