"""The small objects that say which layers, how much, when, and judged on what data; shared by every pruning callback.

All of them can be written in YAML as nested keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch.utils.data import DataLoader

from lightning_eff.arguments import check_choice, check_number, check_whole


def check_choices(settings: Any) -> None:
    """Raise ValueError where a field of a settings object that is a Literal, or None, holds anything else."""
    for name, kind in get_type_hints(type(settings)).items():
        parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        literals = [part for part in parts if get_origin(part) is Literal]
        if not literals or not all(part in literals or part is type(None) for part in parts):
            continue
        choices = [choice for part in literals for choice in get_args(part)] + [None] * (len(parts) > len(literals))
        check_choice(name, getattr(settings, name), choices)


@dataclass(frozen=True)
class Layers:
    """Which channel groups may be pruned.

    Attributes:
        include: layer paths or glob patterns (``"layer3.*"``); None for all.
        exclude: layer paths or glob patterns to leave alone.
        coupled: ``"inner"`` prunes groups that one layer produces; ``"all"`` also residual streams and other groups
            that several layers produce together.
        submodule: prune only this part of the LightningModule, called with the batch's inputs; layer names count from
            it. Empty for the module itself.
        allow_norm_coupled: also prune channels that pass a LayerNorm or GroupNorm, where removing is more than masking.
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    coupled: Literal["inner", "all"] = "inner"
    submodule: str = ""
    allow_norm_coupled: bool = False

    def __post_init__(self) -> None:
        """Check the choices."""
        check_choices(self)


@dataclass(frozen=True)
class Allocation:
    """How the amount is shared out between layers.

    Attributes:
        mode: ``"uniform"`` removes the same fraction everywhere; ``"global"`` the channels of least score per cost,
            wherever they are (of least score where scores say what part of its layer a channel is); ``"budget"``
            follows measured sensitivity curves; ``"mass"`` keeps of every layer the fewest channels that hold the same
            part of the layer's scores. Ignored where the amount is given per layer.
        target: what the amount is a fraction of: ``"channels"``, ``"params"`` or ``"macs"``.
        min_keep: fewest channels a layer keeps, a count (>= 1) or a fraction of the layer.
        max_ratio: largest fraction of a layer that is removed, in (0, 1].
        round_to: round kept counts up to a multiple (8 suits tensor cores).
    """

    mode: Literal["uniform", "global", "budget", "mass"] = "uniform"
    target: Literal["channels", "params", "macs"] = "channels"
    min_keep: int | float = 1
    max_ratio: float = 0.9
    round_to: int | None = None

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        check_choices(self)
        number = isinstance(self.min_keep, int | float) and not isinstance(self.min_keep, bool)
        if not number or not (0 < self.min_keep < 1 or (self.min_keep >= 1 and float(self.min_keep).is_integer())):
            raise ValueError(f"min_keep must be a count >= 1 or a fraction in (0, 1), got {self.min_keep!r}")
        check_number("max_ratio", self.max_ratio, above=0, most=1)
        if self.round_to is not None:
            check_whole("round_to", self.round_to)

    def floor(self, size: int, current: int) -> int:
        """Fewest channels that a group of ``size`` channels, ``current`` of them left, may keep."""
        fewest = math.ceil(self.min_keep * size) if self.min_keep < 1 else int(self.min_keep)
        return self.rounded(max(1, fewest, size - math.floor(self.max_ratio * size + 1e-9)), current)

    def rounded(self, keep: int, current: int) -> int:
        """Round ``keep`` up to a multiple of ``round_to``, at most ``current``."""
        if self.round_to is not None:
            keep = math.ceil(keep / self.round_to) * self.round_to
        return min(keep, current)


@dataclass(frozen=True)
class Schedule:
    """When channels are removed.

    Attributes:
        start: epoch before which the first step runs; 0 is the start of the fit.
        steps: number of steps; 1 is one-shot.
        every_n_epochs: epochs of training between two steps.
        shape: share of the amount that is gone after step ``t`` of ``T``: ``"cubic"`` 1 - (1 - t/T)^3, ``"linear"``
            t/T, ``"geometric"`` the same fraction of what is left at every step.
        physical: ``"immediate"`` cuts at every step; ``"at_end"`` masks during training and cuts at its end;
            ``"never"`` only masks, and at the end sets the weights that read removed channels to zero.
    """

    start: int = 0
    steps: int = 1
    every_n_epochs: int = 1
    shape: Literal["cubic", "linear", "geometric"] = "cubic"
    physical: Literal["immediate", "at_end", "never"] = "immediate"

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        check_choices(self)
        for name, least in (("start", 0), ("steps", 1), ("every_n_epochs", 1)):
            check_whole(name, getattr(self, name), least)

    def epoch(self, step: int) -> int:
        """Epoch before which step ``step`` (from 0) runs."""
        return self.start + step * self.every_n_epochs

    def amount(self, step: int, amount: float) -> float:
        """Fraction removed after step ``step`` (from 0) when ``amount`` is removed after the last."""
        t = (step + 1) / self.steps
        if self.shape == "cubic":
            return amount * (1 - (1 - t) ** 3)
        if self.shape == "linear":
            return amount * t
        return 1 - math.pow(1 - amount, t)


@dataclass(frozen=True)
class Calibration:
    """The data that channels are judged on.

    Attributes:
        source: ``"val"`` or ``"train"``: the loaders of the Trainer; without a validation loader the training loader
            is taken, and the report says so. None: ``"train"`` for Dirichlet and random pruning, ``"val"`` otherwise.
        samples: number of samples over all processes; fewer are used where fewer exist.
        loader: a loader of your own instead of ``source``.
    """

    source: Literal["val", "train"] | None = None
    samples: int = 1024
    loader: DataLoader[Any] | None = None

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        check_choices(self)
        check_whole("calibration samples", self.samples)
        if self.loader is not None and not isinstance(self.loader, Iterable):
            raise ValueError(
                f"loader must give batches, as a DataLoader does, got a {type(self.loader).__name__}; how a batch is "
                "split is said by split_batch= of the callback"
            )


def check_amount(amount: float | dict[str, int | float]) -> None:
    """Raise ValueError unless ``amount`` is a fraction removed in [0, 1), or kept counts or fractions per layer."""
    if isinstance(amount, dict):
        if not amount:
            raise ValueError("amount per layer must name at least one layer")
        for layer, kept in amount.items():
            whole = isinstance(kept, int) and not isinstance(kept, bool) and kept >= 1
            if not whole and not (isinstance(kept, float) and 0 < kept <= 1):
                raise ValueError(
                    f"amount[{layer!r}] must be a number of channels kept (int >= 1) or a fraction kept (float in "
                    f"(0, 1]), got {kept!r}"
                )
    elif isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < 1:
        raise ValueError(f"amount must lie in [0, 1) (fraction removed), got {amount!r}")


def is_count_or_share(batches: object) -> bool:
    """Whether this says how many batches: a whole number of at least 1, or a share of them in (0, 1]."""
    if isinstance(batches, bool) or not isinstance(batches, int | float):
        return False
    return batches >= 1 if isinstance(batches, int) else 0 < batches <= 1
