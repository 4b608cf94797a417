"""Who else in a Trainer has a say where channels are removed: the module, other callbacks, a private strategy.

Everything that cannot go together is refused before any work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging


def refuse_module(callback: Callback, pl_module: LightningModule) -> None:
    """Raise where a module says by ``refuses["pruning"]`` why it cannot be pruned in a fit of its own."""
    if reason := getattr(pl_module, "refuses", {}).get("pruning"):
        raise MisconfigurationException(f"{type(callback).__name__} in a fit of {type(pl_module).__name__}: {reason}")


def refuse_same_layers(callback: Any, pruning: Iterable[Any]) -> None:
    """Raise where another callback prunes the same layers: each counts channels of the network it has traced.

    Args:
        callback: A pruning callback.
        pruning: All pruning callbacks of the Trainer.
    """
    mine = callback.layers.submodule
    for other in pruning:
        theirs = other.layers.submodule
        if other is not callback and (_within(mine, theirs) or _within(theirs, mine)):
            raise MisconfigurationException(
                f"{type(callback).__name__} and {type(other).__name__} prune the same network in one fit, and neither "
                "knows what the other has removed: use one fit after the other, one callback with several steps "
                "(Schedule(steps=...)), or layers.submodule of parts that do not overlap"
            )


def refuse_averaging_behind(callback: Callback, callbacks: Sequence[Any]) -> None:
    """Raise where weights are averaged by a callback that comes later."""
    for later in callbacks[callbacks.index(callback) + 1 :] if callback in callbacks else ():
        if isinstance(later, WeightAveraging | StochasticWeightAveraging):
            raise MisconfigurationException(
                f"{type(later).__name__} must come before {type(callback).__name__} in callbacks: at the end of the "
                "fit it replaces the weights, which are measured and masked after that"
            )


def refuse_private_data(callback: Callback, trainer: Trainer, loaders: Iterable[Any]) -> None:
    """Raise where a strategy that trains privately knows that its data are among those that would be read."""
    if hasattr(trainer.strategy, "refuse_private_data"):
        for loader in loaders:
            trainer.strategy.refuse_private_data(loader, type(callback).__name__)


def tell_strategy(callback: Callback, trainer: Trainer, chosen_by: str, *, public: bool) -> None:
    """Tell a strategy that trains privately that parameters have become smaller, and what that went by.

    Args:
        callback: Who removed channels.
        trainer: Of the run.
        chosen_by: What it went by, in words.
        public: Whether that needs no protection.
    """
    if hasattr(trainer.strategy, "note_resizing"):
        sentence = f"{type(callback).__name__} chose during training which channels stay, {chosen_by}."
        trainer.strategy.note_resizing(sentence, public=public)


def _within(part: str, whole: str) -> bool:
    """Whether a submodule lies within another, or is it."""
    return not whole or part == whole or part.startswith(f"{whole}.")
