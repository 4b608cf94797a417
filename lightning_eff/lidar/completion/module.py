"""Train and judge a depth completion network with any Lightning Trainer. Shapes: ``B`` batch, ``H``, ``W`` pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.arguments import check_choice, check_number, check_whole, plain
from lightning_eff.batch import SplitBatch
from lightning_eff.lidar.batches import LidarKeys
from lightning_eff.lidar.completion.forwarding import DepthForward, Forward
from lightning_eff.lidar.metrics import DEVKIT, DepthCompletionMetrics
from lightning_eff.surgery.structure import prunable

_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}


@prunable
class DepthCompletionModule(LightningModule):
    """Train any network that completes depth, on batches of lidar frames.

    Logs ``train/loss``; validation and test log ``loss``, the errors of
    :class:`~lightning_eff.lidar.metrics.DepthCompletionMetrics` (``val/rmse``, ``val/mae`` ...), and how many images
    were ``skipped`` for want of ground truth and how many pixels ``clamped``, behind ``val/`` or ``test/``. ``predict``
    gives depth ``[B, 1, H, W]``.

    A network handed over as an object is not written into the checkpoint's hyperparameters, and neither are a loss, a
    ``forward`` and a ``split_batch`` that are objects, so they are handed over again:
    ``DepthCompletionModule.load_from_checkpoint(path, net=LightDepthCompletionNet())``. What a YAML for the command
    line describes is plain data, is written, and ``load_from_checkpoint(path)`` is enough.

    Args:
        net: maps image and sparse depth to depth; a training-free one can be validated and tested.
        loss: of the valid pixels: ``"l2"`` is the mean squared error in m², ``"l1"`` the mean absolute one in m; a
            module maps predicted and true depth, ``[N]`` in metres both, to a scalar.
        lr: learning rate, > 0.
        optimizer: which optimizer.
        weight_decay: >= 0.
        momentum: of ``sgd``, in [0, 1).
        decay_every: epochs after which the learning rate is divided by ten, again and again, >= 1; None leaves it.
        metrics: which errors are logged.
        min_depth: what a prediction <= 0 counts as in the errors, in metres, > 0.
        min_target: pixels count where the true depth is greater, in metres, >= 0.
        forward: how the network is called, see :class:`~lightning_eff.lidar.completion.forwarding.DepthForward`.
        split_batch: ``batch -> (inputs, target)`` with inputs a dict that has ``rgb`` and ``sparse``; None reads the
            batches of this package.
        reduction: the loss is the mean over all valid ``"pixels"`` of a batch, or over ``"frames"`` of the mean over
            each one's, which is what private training can bound: a frame counts the same whatever others are there.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Literal["l1", "l2"] | nn.Module = "l2",
        *,
        lr: float = 1e-3,
        optimizer: Literal["adam", "adamw", "sgd"] = "adamw",
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        decay_every: int | None = None,
        metrics: Sequence[str] = DEVKIT,
        min_depth: float = 0.9,
        min_target: float = 0.0,
        forward: Forward = "auto",
        split_batch: SplitBatch | None = None,
        reduction: Literal["pixels", "frames"] = "pixels",
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("pixels", "frames"))
        if not isinstance(loss, nn.Module) and loss not in _LOSSES:
            raise ValueError(f"expected loss {' or '.join(map(repr, _LOSSES))} or a module, got {loss!r}")
        check_number("lr", lr, above=0)
        check_number("weight_decay", weight_decay, least=0)
        check_number("momentum", momentum, least=0, below=1)
        check_choice("optimizer", optimizer, ("adam", "adamw", "sgd"))
        if decay_every is not None:
            check_whole("decay_every", decay_every)
        DepthForward(net, forward)  # tells now what cannot be called
        objects = {"loss": loss, "forward": forward, "split_batch": split_batch}
        unwritten = [name for name, value in objects.items() if not isinstance(value, str | None)]
        lr, weight_decay, momentum, decay_every = plain((lr, weight_decay, momentum, decay_every))
        min_depth, min_target = plain((min_depth, min_target))
        self.save_hyperparameters(ignore=["net", *unwritten])
        if "_instantiator" in self.hparams:  # built by LightningCLI, which gives objects as class_path and init_args
            self.save_hyperparameters()
        self.net, self.loss = net, loss
        self.lr, self.optimizer, self.weight_decay, self.momentum = lr, optimizer, weight_decay, momentum
        self.decay_every, self.min_target, self.reduction = decay_every, min_target, reduction
        self._forward_style, self._split = forward, split_batch or LidarKeys()
        self.val_metrics, self.test_metrics = (
            DepthCompletionMetrics(metrics, min_depth=min_depth, min_target=min_target) for _ in range(2)
        )

    @property
    def completion(self) -> DepthForward:
        """The network, called as ``(rgb, sparse) -> depth``."""
        return DepthForward(self.net, self._forward_style)

    @property
    def encode_image(self) -> Any:
        """That of the network, where it has one: features of the image, computed once for many depths."""
        return self._part("encode_image")

    @property
    def decode(self) -> Any:
        """That of the network, where it has one."""
        return self._part("decode")

    def _part(self, name: str) -> Any:
        if not self.completion.splits_image:
            raise AttributeError(f"{type(self.net).__name__} has no {name}, or is called by a callable of its own")
        return getattr(self.net, name)

    def forward(self, rgb: Tensor | None, sparse: Tensor) -> Tensor:
        """Map image ``[B, 3, H, W]`` and sparse depth ``[B, 1, H, W]`` in metres, 0 = none, to depth alike."""
        return self.completion(rgb, sparse)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss over the valid pixels of a batch."""
        depth, target = self._complete(batch)
        loss = self._loss(depth, target)
        self.log("train/loss", loss, batch_size=len(target), prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Take in a batch."""
        self._judge(batch, "val", self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the errors of the whole set."""
        self._log_errors("val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Take in a batch."""
        self._judge(batch, "test", self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the errors of the whole set."""
        self._log_errors("test", self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return depth ``[B, 1, H, W]`` of a batch, which needs no ground truth if it is a dict of this package."""
        if isinstance(self._split, LidarKeys):
            return self.completion(*_image_and_depth(self._split.inputs(batch)))
        return self._complete(batch)[0]

    def configure_optimizers(self) -> Any:
        """Build the optimizer over what can be trained, and its schedule.

        Raises:
            ValueError: nothing can be trained.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError(f"{type(self.net).__name__} has nothing to train: call trainer.validate or trainer.test")
        if self.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                parameters, self.lr, self.momentum, weight_decay=self.weight_decay
            )
        else:
            kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
            optimizer = kind(parameters, self.lr, weight_decay=self.weight_decay)
        if self.decay_every is None:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, self.decay_every)]

    def _complete(self, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, target = self._split(batch)
        return self(*_image_and_depth(inputs)), target

    def _loss(self, depth: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "frames":
            return torch.stack([self._mean(*frame) for frame in zip(depth, target, strict=True)]).mean()
        return self._mean(depth, target)

    def _mean(self, depth: Tensor, target: Tensor) -> Tensor:
        valid = target > self.min_target
        if not valid.any():
            return depth.sum() * 0  # a loss that every process can send back
        criterion = self.loss if isinstance(self.loss, nn.Module) else _LOSSES[self.loss]
        loss: Tensor = criterion(depth[valid], target[valid])
        return loss

    def _judge(self, batch: Any, stage: str, metrics: DepthCompletionMetrics) -> None:
        depth, target = self._complete(batch)
        metrics.update(depth, target)
        self.log(f"{stage}/loss", self._loss(depth, target), batch_size=len(target), sync_dist=True)

    def _log_errors(self, stage: str, metrics: DepthCompletionMetrics) -> None:
        values = metrics.compute()
        metrics.reset()
        names = [*metrics.names, "skipped", "clamped"]
        self.log_dict({f"{stage}/{name}": values[name].float() for name in names}, sync_dist=True)


def _image_and_depth(inputs: Any) -> tuple[Tensor | None, Tensor]:
    if not isinstance(inputs, Mapping) or "sparse" not in inputs:
        came = f"a dict of {sorted(map(str, inputs))}" if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise TypeError(
            f"expected split_batch to give inputs as a dict with 'sparse' (and 'rgb'), got {came}: pass split_batch=, "
            "for example LidarKeys(sparse='d') or BatchKeys(['rgb', 'sparse'], 'gt')"
        )
    return inputs.get("rgb"), inputs["sparse"]
