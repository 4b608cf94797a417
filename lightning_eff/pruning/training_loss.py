"""A LightningModule's own training step as a function of a batch, for rules that score channels by their loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor


def check_training_step(pl_module: LightningModule, otherwise: str = "") -> None:
    """Raise ValueError where the training step does not say what the loss of a batch is; ``otherwise`` ends it."""
    name = type(pl_module).__name__
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{name} optimizes by hand, so its training_step does not say what the loss is: give loss_fn, a function "
            f"(model, batch) -> loss{otherwise}"
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"{name}.training_step draws its own batches: give loss_fn, a function (model, batch) -> loss{otherwise}"
        )


def training_loss(pl_module: LightningModule) -> Callable[[Any, int], Tensor]:
    """Make ``(batch, number) -> loss`` of the module's training step; what it logs while it is asked goes nowhere.

    Use it while the module is ``borrowed``, which takes the silenced ``log`` away again.
    """
    numbered = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)

    def loss(batch: Any, index: int) -> Tensor:
        silent = dict.fromkeys(("log", "log_dict"), _nothing)
        vars(pl_module).update(silent)  # what was there comes back when the module is given back
        output: Any = pl_module.training_step(batch, index) if numbered else pl_module.training_step(batch)
        result = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(result, Tensor):
            raise ValueError(
                f"{type(pl_module).__name__}.training_step returned {type(output).__name__} in batch {index}, expected "
                "the loss or a dict with 'loss': give loss_fn, a function (model, batch) -> loss"
            )
        return result

    return loss


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Take what is logged; epoch averages must not see it."""


def scoring_autocast(trainer: Trainer) -> Callable[[], AbstractContextManager[Any]]:
    """The Trainer's autocast; none for float16, where gradients of gates would underflow."""
    precision = trainer.precision_plugin
    if isinstance(precision, MixedPrecision) and precision.precision == "16-mixed":
        rank_zero_info("Channels are scored in float32: in float16 the gradients of gates would vanish.")
        return nullcontext
    if precision.precision in ("16-true", "transformer-engine-float16"):
        rank_zero_warn(
            f"precision {precision.precision!r}: gradients of gates are small and may vanish; bf16 or float32 are safe"
        )
    return precision.forward_context
