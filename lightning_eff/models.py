"""Three small networks and a plain classifier, for examples, tests and the command line.

LeNet is the variant the pruning papers use (sizes 10-20-100-25: 40,225 parameters); the convolutional network is a
common small one for Fashion-MNIST; the residual one has stages that exits can stand on. Shapes: ``B`` batch, ``C``
channels, ``H``, ``W`` height and width, ``K`` classes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_eff.arguments import check_choice, check_number, check_whole, plain


class LeNet(nn.Module):
    """Two convolutions, three fully connected layers without activation between them.

    Args:
        in_channels: Channels of the images, >= 1.
        num_classes: Classes ``K``, >= 1.
        channels: Widths of ``c1``, ``c3``, ``c5`` and ``f6``.
        image_size: Side of the square images in pixels, >= 16.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        channels: Sequence[int] = (10, 20, 100, 25),
        image_size: int = 28,
    ) -> None:
        super().__init__()
        if len(channels) != 4 or min(channels) < 1:
            raise ValueError(f"expected channels to be four widths >= 1 (c1, c3, c5, f6), got {list(channels)}")
        check_whole("image_size", image_size, 16)
        _check_classes(in_channels, num_classes)
        c1, c3, c5, f6 = channels
        side = ((image_size - 4) // 2 - 4) // 2
        self.c1 = nn.Sequential(nn.Conv2d(in_channels, c1, 5), nn.MaxPool2d(2), nn.ReLU(), nn.BatchNorm2d(c1))
        self.c3 = nn.Sequential(nn.Conv2d(c1, c3, 5), nn.MaxPool2d(2), nn.ReLU(), nn.BatchNorm2d(c3))
        self.c5 = nn.Linear(c3 * side * side, c5)
        self.f6 = nn.Linear(c5, f6)
        self.out = nn.Linear(f6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to logits ``[B, K]``."""
        x = self.c3(self.c1(x)).flatten(1)
        logits: Tensor = self.out(self.f6(self.c5(x)))
        return logits


class SmallCNN(nn.Module):
    """Five 3x3 convolutions of widths ``w, w, 2w, 2w, 4w`` with BatchNorm and ReLU, for images of any size >= 4.

    Args:
        in_channels: Channels of the images, >= 1.
        num_classes: Classes ``K``, >= 1.
        width: ``w``, >= 1.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        _check_classes(in_channels, num_classes)
        check_whole("width", width)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, out_channels in enumerate((width, width, 2 * width, 2 * width, 4 * width), start=1):
            layers[f"conv{i}"] = nn.Conv2d(in_channels, out_channels, 3, padding=1)
            layers[f"norm{i}"] = nn.BatchNorm2d(out_channels)
            layers[f"relu{i}"] = nn.ReLU()
            if i in (2, 4):
                layers[f"pool{i}"] = nn.MaxPool2d(2)
            in_channels = out_channels
        layers["average"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["out"] = nn.Linear(in_channels, num_classes)
        self.layers = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to logits ``[B, K]``."""
        logits: Tensor = self.layers(x)
        return logits


class SmallResNet(nn.Module):
    """ResNet-18 for small images: four stages of two blocks behind one 3x3 convolution of stride 2.

    The default has 15 M operations for an image of 28 x 28 pixels; width 64 has the channels of the published network.

    Args:
        in_channels: Channels of the images, >= 1.
        num_classes: Classes ``K``, >= 1.
        width: Channels of the first stage, >= 1; each of the others has twice as many as the one before.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: int = 16) -> None:
        from torchvision.models.resnet import BasicBlock, conv1x1

        super().__init__()
        _check_classes(in_channels, num_classes)
        check_whole("width", width)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        inputs, stages = width, []
        for stage in range(4):
            outputs, stride = width * 2**stage, 1 if stage == 0 else 2
            shortcut = None
            if stage:
                shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
            blocks = BasicBlock(inputs, outputs, stride, shortcut), BasicBlock(outputs, outputs)
            stages.append(nn.Sequential(*blocks))
            inputs = outputs
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.out = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to logits ``[B, K]``."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        logits: Tensor = self.out(x.mean((2, 3)))
        return logits


class ImageClassifier(LightningModule):
    """Train any network that maps images to logits, on batches ``(images, labels)``, by cross entropy.

    Logs ``train/loss``, ``val/loss``, ``val/accuracy``, ``test/loss`` and ``test/accuracy``.

    A network handed over as an object is not written into the checkpoint's hyperparameters, so a new one is handed
    over again: ``ImageClassifier.load_from_checkpoint(path, net=LeNet())``. A network described in a YAML for the
    command line is plain data, is written, and ``load_from_checkpoint(path)`` is enough.

    Args:
        net: Maps images ``[B, C, H, W]`` to logits ``[B, K]``.
        lr: Learning rate, > 0.
        optimizer: Which optimizer.
        weight_decay: >= 0.
        momentum: Of ``sgd``, in [0, 1).
        example_input_shape: Shape of one sample without the batch axis, e.g. ``[1, 28, 28]``; sets
            ``example_input_array`` to zeros ``[1, *shape]``.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(
        self,
        net: nn.Module,
        lr: float = 1e-3,
        optimizer: Literal["adam", "adamw", "sgd"] = "adamw",
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        example_input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_number("lr", lr, above=0)
        check_choice("optimizer", optimizer, ("adam", "adamw", "sgd"))
        check_number("weight_decay", weight_decay, least=0)
        check_number("momentum", momentum, least=0, below=1)
        lr, weight_decay, momentum = plain((lr, weight_decay, momentum))
        self.save_hyperparameters(ignore=["net"])
        if "_instantiator" in self.hparams:  # built by LightningCLI, which gives the net as class_path and init_args
            self.save_hyperparameters()
        self.net = net
        self.lr, self.optimizer, self.weight_decay, self.momentum = lr, optimizer, weight_decay, momentum
        if example_input_shape is not None:
            self.example_input_array = torch.zeros(1, *example_input_shape)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to logits ``[B, K]``."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log loss and accuracy of one batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log loss and accuracy of one batch."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the logits of one batch ``(images, labels)`` or ``images``."""
        logits: Tensor = self(batch if isinstance(batch, Tensor) else batch[0])
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer over all parameters."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(self.parameters(), self.lr, weight_decay=self.weight_decay)

    def _evaluate(self, batch: Any, stage: str) -> None:
        images, labels = batch
        logits = self(images)
        accuracy = multiclass_accuracy(logits, labels, num_classes=logits.size(1), average="micro")
        values = {f"{stage}/loss": F.cross_entropy(logits, labels), f"{stage}/accuracy": accuracy}
        self.log_dict(values, batch_size=len(labels), sync_dist=True, prog_bar=stage == "val")


def _check_classes(in_channels: int, num_classes: int) -> None:
    check_whole("in_channels", in_channels)
    check_whole("num_classes", num_classes)
