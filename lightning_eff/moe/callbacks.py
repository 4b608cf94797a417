"""Callbacks for any LightningModule with mixture-of-experts layers: who is busy, and the loss-free balance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_eff.arguments import check_whole
from lightning_eff.documents import whole_state
from lightning_eff.moe.balance import forget_loads, update_balance_biases
from lightning_eff.moe.layer import FineGrainedMoE
from lightning_eff.moe.load_history import LoadHistory
from lightning_eff.moe.metrics import load_measures
from lightning_eff.reporting import results_folder
from lightning_eff.surgery.state import untouched_generators


class ExpertLoadMonitor(Callback):
    """Log how busy the experts are, and draw it at the end.

    Every few steps it logs, of the tokens of all training batches and all processes since it logged last:

    - ``moe/load_max_over_mean``: load of the busiest expert over the mean, in the layer where that is worst; 1 is
      equal;
    - ``moe/load_cv``: standard deviation of the loads over their mean, mean over layers;
    - ``moe/dead_experts``: experts of all layers that no token chose;
    - ``moe/dropped_fraction``: share of the assignments that were dropped for capacity;
    - ``moe/router_entropy``: of the last batch, mean over tokens and layers of the entropy of the router's scores, over
      that of equal scores: 1 says that the router has no preference, 0 that it is certain. Layers within a compiled
      model do not tell theirs.

    A layer that runs several times in a batch is counted by its last pass.

    Args:
        every_n_steps: Optimizer steps between two logs, >= 1.
        dirpath: Folder for the tables ``expert_layers`` and ``expert_loads`` and ``expert_loads.png`` at the end of the
            fit; None takes the folder ``moe`` beside what the trainer logs.

    Attributes:
        history: Loads of all windows; after at most 200 of them, neighbours are one.

    Raises:
        ValueError: ``every_n_steps`` is out of range, or, when a fit starts, the module has no
            :class:`FineGrainedMoE`.
    """

    def __init__(self, every_n_steps: int = 50, dirpath: str | Path | None = None) -> None:
        check_whole("every_n_steps", every_n_steps)
        self.every_n_steps, self.dirpath = every_n_steps, None if dirpath is None else Path(dirpath)
        self._reset()

    def _reset(self) -> None:
        self.history = LoadHistory({})
        self._since: Tensor | None = None
        self._logged_at = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew; what a checkpoint holds is loaded after this."""
        if stage == "fit":
            self._reset()
            self._folder = results_folder(self.dirpath, trainer, "moe")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse modules without experts."""
        moe_layers(pl_module, type(self).__name__)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers; a history of other layers does not go on."""
        self._layers = moe_layers(pl_module, type(self).__name__)
        self._seen: dict[str, Tensor | None] = {}
        self._entropies: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        if not trainer.is_global_zero:  # a checkpoint holds the counts of the first process: they are counted once
            self._since = None
        sizes = {name: layer.config.n_experts for name, layer in self._layers.items()}
        if self.history.sizes != sizes:
            self._reset()
            self.history, self._logged_at = LoadHistory(sizes), trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the routers' scores in a batch after which something may be logged."""
        self._unhook()
        self._seen = {name: layer.last_load for name, layer in self._layers.items()}  # of validation, too
        if self._due(trainer.global_step + len(trainer.optimizers)):
            self._hooks = [
                layer.register_forward_pre_hook(self._watch(name), with_kwargs=True)
                for name, layer in self._layers.items()
                if layer.config.n_experts > 1 and layer._compiled_call_impl is None
            ]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log where it is time."""
        self._unhook()
        self._count()
        if self._due(trainer.global_step):
            self._log(trainer, _stepped(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what has come since the last log, and write table and figure."""
        if trainer.global_step > self._logged_at:
            self._log(trainer, _stepped(trainer) - 1)  # the last batch has been counted by now
        if len(self.history) and trainer.is_global_zero:
            self.history.write(self._folder)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._unhook()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring the counts of all processes together: a checkpoint holds those of the first."""
        if trainer.world_size > 1 and self.history.sizes:
            total = _summed(trainer, self._counted().to(trainer.strategy.root_device))
            self._since = total if trainer.is_global_zero else None
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """History, and counts of the window that has begun."""
        since = None if self._since is None else self._since.cpu()
        return {"history": self.history.state_dict(), "since": since, "logged_at": self._logged_at}

    @whole_state
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` wrote."""
        self.history, self._logged_at = LoadHistory.of(state_dict["history"]), state_dict["logged_at"]
        self._since = state_dict["since"]

    def _due(self, step: int) -> bool:
        return step // self.every_n_steps > self._logged_at // self.every_n_steps

    def _watch(self, name: str) -> Any:
        def hook(layer: FineGrainedMoE, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.compiler.is_compiling():  # nothing of this belongs into a graph
                self._entropies[name] = _router_entropy(layer, *args, **kwargs)

        return hook

    def _unhook(self) -> None:
        for hook in getattr(self, "_hooks", ()):
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _count(self) -> None:
        loads = []
        for name, layer in self._layers.items():
            load, counts = layer.last_load, layer.last_counts
            if load is None or counts is None or load is self._seen[name]:  # it did not run in this batch
                loads.append(torch.zeros(2, layer.config.n_experts, dtype=torch.int64))
            else:
                loads.append(torch.stack([load, counts]))
        device = next((load.device for load in loads if load.device.type != "cpu"), torch.device("cpu"))
        total = torch.cat([load.to(device) for load in loads], dim=1)
        self._since = total if self._since is None else self._since.to(device) + total

    def _counted(self) -> Tensor:
        """Return tokens that chose and that were computed by all experts since the last log [2, experts]."""
        width = sum(self.history.sizes.values())
        return torch.zeros(2, width, dtype=torch.int64) if self._since is None else self._since

    def _log(self, trainer: Trainer, logger_step: int) -> None:
        device = trainer.strategy.root_device
        since = self._counted()
        # the entropies of processes whose layers have run, and their number
        entropies = [entropy.to(device).float() for entropy in self._entropies.values()]
        told = torch.stack([torch.stack(entropies).mean(), torch.ones((), device=device)]) if entropies else None
        if trainer.world_size > 1:
            since = _summed(trainer, since.to(device))
            told = _summed(trainer, torch.zeros(2, device=device) if told is None else told)
        chosen, computed = since.cpu()
        self.history.add(trainer.global_step, chosen, computed)
        values = self._statistics(chosen, computed)
        if told is not None and told[1] > 0:
            values["moe/router_entropy"] = float(told[0] / told[1])
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step=logger_step)
        self._since, self._logged_at, self._entropies = None, trainer.global_step, {}

    def _statistics(self, chosen: Tensor, computed: Tensor) -> dict[str, float]:
        pairs = zip(self.history.layers(chosen).values(), self.history.layers(computed).values(), strict=True)
        layers = [load_measures(*pair) for pair in pairs]
        assigned = int(chosen.sum())
        return {
            "moe/load_max_over_mean": max(float(layer["max_over_mean"]) for layer in layers),
            "moe/load_cv": math.fsum(float(layer["cv"]) for layer in layers) / len(layers),
            "moe/dead_experts": float((chosen == 0).sum()),
            "moe/dropped_fraction": 1 - int(computed.sum()) / assigned if assigned else math.nan,
        }


class BalanceBiasUpdater(Callback):
    """Move the loss-free balance bias after every optimizer step, for modules that do not do it themselves.

    Layers with ``balance={"method": "bias"}`` want :meth:`FineGrainedMoE.update_balance_bias` to be called then. Where
    :class:`MoEScalingModule` or another one of these callbacks has called it already, nothing is left to do, and a bias
    moves once all the same. A batch in which several optimizers step counts as one step.

    Raises:
        ValueError: When a fit starts, no layer of the module has such a bias.
    """

    def __init__(self) -> None:
        self._stepped = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse modules that have nothing to balance."""
        layers = moe_layers(pl_module, type(self).__name__)
        if all(layer.balance_bias is None for layer in layers.values()):
            raise ValueError(
                "BalanceBiasUpdater moves the bias of layers with balance={'method': 'bias'}, and the module has "
                f"none of them; its layers have {sorted({layer.config.balance.method for layer in layers.values()})}"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of the steps of a run that goes on, and forget batches of one that was never made."""
        self._stepped = trainer.global_step
        forget_loads(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move it if an optimizer has stepped in this batch."""
        if trainer.global_step > self._stepped:
            self._stepped = trainer.global_step
            update_balance_biases(pl_module)


def moe_layers(module: nn.Module, asked_by: str) -> dict[str, FineGrainedMoE]:
    """Return the mixture-of-experts layers of a module by name.

    Raises:
        ValueError: There is none; the message names who asked.
    """
    layers = {
        name.replace("_orig_mod.", ""): layer
        for name, layer in module.named_modules()
        if isinstance(layer, FineGrainedMoE)
    }
    if not layers:
        raise ValueError(f"{asked_by} wants a module with FineGrainedMoE layers; {type(module).__name__} has none")
    return layers


def _stepped(trainer: Trainer) -> int:
    """Return batches after which optimizers stepped: the step under which Lightning logs what modules log."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _summed(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the sum over processes."""
    total = trainer.strategy.reduce(tensor, reduce_op="sum")
    assert isinstance(total, Tensor)
    return total


@torch.no_grad()
def _router_entropy(layer: FineGrainedMoE, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Return the entropy of the scores over that of equal ones, mean over tokens."""
    with untouched_generators():  # a router may draw noise
        scores = layer.route(x, token_mask).scores
    scores = scores / scores.sum(1, keepdim=True)
    entropies = torch.special.entr(scores).sum(1) / math.log(scores.shape[1])
    if token_mask is not None:
        entropies = entropies[token_mask.reshape(-1)]
    mean: Tensor = entropies.mean()
    return mean
