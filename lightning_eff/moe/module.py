"""Train a language model of experts, or its dense twin, with any Lightning Trainer; the recipe of arXiv 2402.07871."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW

from lightning_eff.arguments import check_choice, check_number, plain
from lightning_eff.batch import SplitBatch, call_model
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.data import ByteTextDataModule
from lightning_eff.documents import parsed, whole_state
from lightning_eff.moe.auxiliary import collect_aux_losses, total_aux_loss
from lightning_eff.moe.balance import forget_loads, update_balance_biases
from lightning_eff.moe.decoder import DecoderConfig
from lightning_eff.moe.distributed import Experts, shard_model
from lightning_eff.moe.model import DecoderLM
from lightning_eff.moe.window import LossWindow
from lightning_eff.steps import planned_steps

#: Targets that count in no loss, as torch's cross-entropy has it.
IGNORED_TARGET = -100


class MoEScalingModule(LightningModule):
    """A :class:`DecoderLM` and its training: cross-entropy, auxiliary losses, warm-up and cosine, counts for laws.

    A batch is ``(tokens, targets)``, both int64 [B, T]; targets of -100 count in no loss. ``split_batch`` may also give
    a dict ``{"tokens": ..., "token_mask": ...}`` as inputs.

    Logs ``train/loss``, ``train/loss_smoothed``, ``train/aux_balance``, ``train/aux_z`` (before their weights),
    ``tokens`` and ``flops`` at the trainer's logging interval; ``val/loss`` and ``test/loss``, nats a token, and
    ``val/bits_per_byte`` where tokens are bytes. The loss-free bias (``balance: {method: bias}``) is moved after every
    optimizer step.

    The network is made by ``configure_model``, when a Trainer, ``load_from_checkpoint`` or the first forward pass asks
    for it; call that yourself to have it before. Checkpoints hold ``decoder`` and the schedule as plain data, so that
    ``MoEScalingModule.load_from_checkpoint(path)`` is enough; an optimizer handed over as an object must be handed over
    again where training goes on, one that is described in YAML not.

    Args:
        decoder: Options of the network, or a dict of them.
        optimizer: ``parameters -> optimizer``; its learning rate is the peak.
        warmup_fraction: Share of the run's steps in which the learning rate rises linearly, in [0, 1).
        final_lr_fraction: Learning rate at the end of the cosine, over the peak, in [0, 1].
        loss_window: Optimizer steps whose mean loss is the smoothed loss, >= 1.
        compile: Whether ``torch.compile`` compiles the network.
        split_batch: ``batch -> (inputs, targets)``, for batches that are not such a pair.
        experts: Under ``ModelParallelStrategy``: experts are gathered where they run, or stay while tokens travel
            (``"stay"``), see :func:`~lightning_eff.moe.shard_model`.

    Attributes:
        decoder: The options as a :class:`DecoderConfig`.
        model: The :class:`DecoderLM`; None until it is made.
        tokens_seen: Positions trained on so far, by all processes, padding included.

    Raises:
        ValueError: An argument lies outside its range; or, at the start of a run, tokens that the vocabulary does not
            have, windows longer than ``max_seq_len``, a run without an end, for which there is no schedule, or
            ``StochasticWeightAveraging``, which copies the module before the network is made.
    """

    def __init__(
        self,
        decoder: DecoderConfig = DecoderConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=2e-4, weight_decay=0.1),
        warmup_fraction: float = 0.01,
        final_lr_fraction: float = 0.1,
        loss_window: int = 1000,
        compile: bool = False,
        split_batch: SplitBatch | None = None,
        experts: Experts = "gather",
    ) -> None:
        super().__init__()
        check_number("warmup_fraction", warmup_fraction, least=0, below=1)
        if not callable(optimizer):
            raise ValueError(
                f"optimizer must be a function that makes one of the parameters, got {type(optimizer).__name__}; for "
                "example lambda p: AdamW(p, lr=2e-4)"
            )
        check_choice("experts", experts, get_args(Experts))
        check_number("final_lr_fraction", final_lr_fraction, least=0, most=1)
        self.decoder = DecoderConfig.of(decoder)
        warmup_fraction, final_lr_fraction, loss_window = plain((warmup_fraction, final_lr_fraction, loss_window))
        self.save_hyperparameters(ignore=["decoder", "optimizer", "split_batch"])
        if "_instantiator" in self.hparams:  # built by LightningCLI, which gives everything as plain data
            self.save_hyperparameters()
        else:
            self.save_hyperparameters({"decoder": self.decoder.to_dict()})
        self.optimizer = optimizer
        self.warmup_fraction, self.final_lr_fraction = warmup_fraction, final_lr_fraction
        self.compile_model = compile
        self.experts: Experts = experts
        self.split_batch = split_batch or split_pair
        self.model: DecoderLM | None = None
        self.tokens_seen = 0
        self._losses = LossWindow(loss_window)
        self._since_step: list[Tensor] = []  # losses of the micro-batches of an optimizer step
        self._batch_shape = (0, 0)
        self._steps: int | float = 0  # of the whole run

    def setup(self, stage: str) -> None:
        """Check that text and network fit together, and that nobody averages weights which are not there yet."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and self.model is None and any(isinstance(c, StochasticWeightAveraging) for c in callbacks):
            raise ValueError(
                "StochasticWeightAveraging copied the module before the network was made, and would average nothing: "
                "use EMAWeightAveraging or WeightAveraging, or call configure_model() on the module before fit"
            )
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ByteTextDataModule):
            return
        if data.seq_len > self.decoder.max_seq_len:
            raise ValueError(
                f"windows of seq_len = {data.seq_len} are longer than the decoder's max_seq_len = "
                f"{self.decoder.max_seq_len}"
            )
        size = self.decoder.vocab_size
        if size < 256 and (largest := data.largest_byte()) >= size:
            raise ValueError(f"the text has bytes up to {largest}, but the decoder's vocab_size is {size}; use 256")

    def configure_model(self) -> None:
        """Make the network unless there is one; under ``ModelParallelStrategy``, share it out.

        Raises:
            ValueError: The mesh has tensor parallelism, or more processes than divide the experts that stay.
        """
        if self.model is None:
            self.model = DecoderLM(self.decoder)
            mesh = self.device_mesh
            if mesh is not None:
                if mesh["tensor_parallel"].size() > 1:
                    raise ValueError(
                        "the decoder has no tensor parallelism; use ModelParallelStrategy(data_parallel_size="
                        f"{mesh.size()}, tensor_parallel_size=1)"
                    )
                shard_model(self.model, mesh["data_parallel"], self.experts, self.model.blocks)
            if self.compile_model:
                self.model.compile()

    def forward(self, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Return logits [B, T, V] of the token that follows each; arguments as of :meth:`DecoderLM.forward`."""
        logits: Tensor = self._network()(tokens, token_mask)
        return logits

    def on_train_start(self) -> None:
        """Forget batches of a step that an earlier fit did not get to make; a tuner may have changed the steps."""
        self._since_step = []
        forget_loads(self._network())
        if self._steps and self._steps != planned_steps(self.trainer):
            self._steps = planned_steps(self.trainer)
            for schedule in (config.scheduler for config in self.trainer.lr_scheduler_configs):
                for group, peak in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
                    group["lr"] = peak * self._factor(schedule.last_epoch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch, auxiliary losses included."""
        inputs, targets = self.split_batch(batch)
        self.tokens_seen += targets.numel() * self._data_parallel_size()
        self._batch_shape = targets.shape[0], targets.shape[1]
        loss = _cross_entropy(call_model(self, inputs), targets)
        if torch.is_anomaly_enabled() and not loss.isfinite():
            raise ValueError(f"the loss of batch {batch_idx} at step {self.global_step} is {loss.item()}")
        self._since_step.append(loss.detach())
        return loss + total_aux_loss(self._network())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss of one batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss of one batch."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the logits of one batch ``(tokens, targets)``, or of ``tokens``."""
        inputs = batch if isinstance(batch, Tensor) else self.split_batch(batch)[0]
        logits: Tensor = call_model(self, inputs)
        return logits

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Make a step, then move loss-free biases and log."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        update_balance_biases(self._network())
        if not self._since_step:  # a subclass has a training step of its own
            return
        loss = torch.stack(self._since_step).mean()
        self._since_step = []
        self._losses.add(loss)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            self._log_step(loss)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer over all parameters, and warm-up and cosine over the steps of the run."""
        optimizer = self.optimizer(self.parameters())
        self._steps = planned_steps(self.trainer)
        if math.isinf(self._steps):
            raise ValueError(
                "the learning rate falls over the whole run, which must have an end: give the Trainer max_steps or "
                "max_epochs"
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _factor(self, step: int) -> float:
        """Learning rate of a step, over the peak."""
        warmup = round(self.warmup_fraction * self._steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self._steps - warmup))
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * (1 + math.cos(math.pi * progress)) / 2

    @property
    def flops_seen(self) -> int:
        """Training FLOPs so far, as the paper counts: :attr:`DecoderLM.flops_per_token` times tokens."""
        return int(self.decoder.shape.flops_per_token()) * self.tokens_seen

    @property
    def flops_per_batch(self) -> int:
        """Training FLOPs of the last batch of this process, head and attention included: what hardware computes."""
        sequences, positions = self._batch_shape
        shape, vocabulary = self.decoder.shape, self.decoder.vocab_size
        return int(shape.flops_per_token("full", vocab_size=vocabulary, seq_len=positions) * sequences * positions)

    def smoothed_loss(self) -> float:
        """Return the mean cross-entropy of the last ``loss_window`` optimizer steps; NaN before the first.

        In a run of several processes all of them must call it: it is the mean over them.
        """
        return float(self._mean_of_processes(self._losses.mean()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write what has been counted."""
        losses = self._mean_of_processes(self._losses.state())
        checkpoint["moe"] = {
            "tokens_seen": self.tokens_seen,
            "losses": losses.cpu(),
            "decoder": self.decoder.to_dict(),
        }

    @whole_state
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what has been counted.

        Raises:
            ValueError: The checkpoint is of a network of other shapes; the message names the options that differ.
        """
        saved = checkpoint.get("moe")
        if saved is None:
            return
        self._check_shapes(checkpoint.get("state_dict", {}), saved["decoder"])
        self.tokens_seen = parsed(int, saved["tokens_seen"], "tokens_seen")
        self._losses.load(saved["losses"])

    def _network(self) -> DecoderLM:
        if self.model is None:
            self.configure_model()
        assert self.model is not None
        return self.model

    def _data_parallel_size(self) -> int:
        """Number of processes that see different batches."""
        kwargs = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None)
        return int(kwargs["num_replicas"]) if kwargs else 1

    def _mean_of_processes(self, value: Tensor) -> Tensor:
        if self._trainer is None or self.trainer.world_size == 1:
            return value
        # where processes are several, also what is still where a checkpoint was read has to be on the device
        return self.trainer.strategy.reduce(value.to(self.trainer.strategy.root_device, copy=True), reduce_op="mean")

    def _log_step(self, loss: Tensor) -> None:
        values = {"train/loss": loss, "train/loss_smoothed": self._losses.mean()}
        for name, aux in collect_aux_losses(self._network()).items():
            values[f"train/aux_{name}"] = aux.detach()
        means = self._mean_of_processes(torch.stack([value.float() for value in values.values()]))
        self.log_dict(dict(zip(values, means.unbind(), strict=True)))
        self.log_dict({"train/tokens": float(self.tokens_seen), "train/flops": float(self.flops_seen)})

    def _evaluate(self, batch: Any, stage: str) -> None:
        inputs, targets = self.split_batch(batch)
        counted = int((targets != IGNORED_TARGET).sum())
        loss = _cross_entropy(call_model(self, inputs), targets)
        if not counted:  # a mean over nothing; logged with no weight, for other processes wait for it
            loss = torch.zeros_like(loss)
        values = {f"{stage}/loss": loss}
        if self.decoder.vocab_size == 256:
            values[f"{stage}/bits_per_byte"] = loss / math.log(2)
        self.log_dict(values, batch_size=counted, sync_dist=True, prog_bar=stage == "val")

    def _check_shapes(self, state: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        """Raise a ValueError if weights of a checkpoint cannot be taken in because options differ."""
        theirs = {name: tuple(value.shape) for name, value in state.items() if name.startswith("model.")}
        ours = {f"model.{name}": tuple(value.shape) for name, value in self._network().state_dict().items()}
        differing = _differences(saved, self.decoder.to_dict())
        if theirs and theirs != ours and differing:
            told = "; ".join(f"{name}: {there!r} there, {here!r} here" for name, (there, here) in differing.items())
            raise ValueError(f"the checkpoint is of another decoder: {told}. Build the module with its options")


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over targets, float32 or wider."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten(), ignore_index=IGNORED_TARGET)


def _differences(one: Any, other: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Entries of nested dicts that differ, by dotted name."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return {} if one == other else {name: (one, other)}
    found = {}
    for key in {**one, **other}:
        found.update(_differences(one.get(key), other.get(key), f"{name}.{key}".lstrip(".")))
    return found
