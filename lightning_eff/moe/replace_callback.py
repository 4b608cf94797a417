"""Mixtures of experts in a model that a trainer trains: put in, and their auxiliary losses scaled as its loss is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_eff.arguments import check_number
from lightning_eff.moe.injection import HINT, set_aux_scale
from lightning_eff.moe.layer import FineGrainedMoE
from lightning_eff.moe.replace import AuxMode, Init, replace_ffn


class AuxLossScale(L.Callback):
    """Scale injected auxiliary losses as Lightning scales the loss: for accumulated batches, and by a gradient scaler.

    Needed with ``accumulate_grad_batches`` and with ``"16-mixed"``, harmless otherwise. Under manual optimization only
    the gradient scaler is known; what you multiply the loss by yourself is ``scale``.

    Args:
        scale: What the training step multiplies the loss by besides, > 0.
    """

    def __init__(self, scale: float = 1.0) -> None:
        check_number("scale", scale, above=0)
        self.scale = scale

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Set the scale of this batch: a scaler changes its own between steps, a scheduler that of accumulation."""
        scale: float | Tensor = self.scale
        if pl_module.automatic_optimization:
            scale /= trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scale = scaler.scale(torch.tensor(scale, device=pl_module.device))
        set_aux_scale(pl_module, scale)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the scale back to 1."""
        set_aux_scale(pl_module, 1.0)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Set the scale back to 1."""
        set_aux_scale(pl_module, 1.0)


class ReplaceFFN(AuxLossScale):
    """Replace feed-forward networks by mixtures of experts before training or evaluation begins.

    As :func:`replace_ffn` on the LightningModule, for a network that is built in its ``__init__``; one that
    ``configure_model`` builds is not there yet: call :func:`replace_ffn` there. Checkpoints hold the mixtures: a
    trainer with this callback resumes from them and evaluates them; for ``load_from_checkpoint``, call
    :func:`replace_ffn` in ``__init__``, or on the module before its ``load_state_dict``. Among callbacks it stands
    before those that average weights, which copy the network when the fit is set up.

    Args:
        match: Names as of ``named_modules()`` of the LightningModule, with ``*`` and ``**``; or a function.
        config: Options of the layers, by name; a :class:`MoEConfig`, too.
        init: ``"fresh"`` or ``"upcycle"``.
        aux_mode: ``"inject"``, or ``"collect"`` where the training step adds :func:`total_aux_loss`.
        scale: As of :class:`AuxLossScale`.

    Attributes:
        names: Names of the layers, once they are there.

    Raises:
        ValueError: As of :func:`replace_ffn`; or a callback before this one has copied the dense network.
    """

    def __init__(
        self,
        match: str | Callable[[str, nn.Module], bool],
        config: dict[str, Any] | None = None,
        init: Init = "fresh",
        aux_mode: AuxMode = "inject",
        scale: float = 1.0,
    ) -> None:
        super().__init__(scale)
        self.match, self.config, self.init, self.aux_mode = match, config, init, aux_mode
        self.names: list[str] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Replace; nothing happens where that was done before."""
        modules, match = dict(pl_module.named_modules(remove_duplicate=False)), self.match
        if self.names and all(isinstance(modules.get(name), FineGrainedMoE) for name in self.names):
            match = self._is_there  # a function that tells networks by class would not know the new layers
        before = set(pl_module.parameters())
        try:
            self.names = replace_ffn(pl_module, match, self.config, self.init, self.aux_mode)
        except ValueError as error:
            if not is_overridden("configure_model", pl_module):
                raise
            raise ValueError(f"{error}; what configure_model builds is not there yet: replace it there") from error
        averaging = _averages_before(self, trainer) if stage == "fit" else None
        if averaging is not None and set(pl_module.parameters()) != before:
            raise ValueError(
                f"{averaging} stands before {type(self).__name__} and has copied the dense network, whose weights are "
                f"not those of the experts: put {type(self).__name__} before it"
            )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave word for whoever loads the checkpoint into the dense network."""
        if not trainer.strategy.restore_checkpoint_after_setup:  # those that shard match names one by one
            weights = checkpoint["state_dict"]
            told = [f"{name}.{HINT}" for name in self.names if f"{name}.router" in weights]
            checkpoint["state_dict"] = {**weights, **dict.fromkeys(told[:1], torch.empty(0))}

    def _is_there(self, name: str, module: nn.Module) -> bool:
        return name in self.names


def _averages_before(callback: L.Callback, trainer: L.Trainer) -> str | None:
    """Return the name of a callback that averages weights and is set up before this one."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is callback:
            break
        if isinstance(other, WeightAveraging | StochasticWeightAveraging):
            return type(other).__name__
    return None
