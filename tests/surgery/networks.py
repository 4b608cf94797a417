"""Small networks that each hold one difficulty, and torchvision's, with statistics that make mistakes visible."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.models import LeNet, SmallCNN


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms weights and statistics that no channel maps to zero by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name in ("running_mean", "weight", "bias"):
                tensor = getattr(module, name, None)
                if tensor is not None and tensor.ndim == 1:
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
            if getattr(module, "running_var", None) is not None:
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3)
        self.norm = nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.conv(x)))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head((x * gate).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3, groups=4), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x))))).mean((2, 3))


class ConcatFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.c = nn.Conv2d(5, 2, 3, stride=4, padding=1)
        self.d = nn.Linear(8, 6)
        self.e = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)))
        return self.e(F.relu(self.d(x.flatten(1))))


class PadShortcut(nn.Module):
    """A residual network whose shortcut pads channels (option A): tracers map it wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.outer = nn.Conv2d(10, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = F.relu(self.outer(F.relu(self.inner(x))) + shortcut)
        return self.head(x.mean((2, 3)))


class Rolled(nn.Module):
    """Channels change places between two layers: mapped wrongly and silently."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(torch.roll(F.relu(self.a(x)), 3, dims=1)))).mean((2, 3))


class HardCodedView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mid, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(F.relu(self.conv(x)).view(-1, 512))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.c.weight = self.b.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(F.relu(self.b(F.relu(self.a(x))))).mean((2, 3)))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.out = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(6, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.up(F.relu(self.down(x)))))


def torchvision_net(name: str) -> Callable[[], nn.Module]:
    return lambda: randomised(getattr(torchvision.models, name)(weights=None, num_classes=10))


def bottlenecks(**options: int) -> Callable[[], nn.Module]:
    """ResNet-50's kind of blocks, with and without a projection beside them, in a third of its depth."""
    blocks = torchvision.models.resnet.Bottleneck, [1, 2, 1, 1]
    return lambda: randomised(torchvision.models.ResNet(*blocks, num_classes=10, **options))


def tiny_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight)  # zero in a new one: every output would equal every other
    return model


def vgg_bn() -> nn.Module:
    """VGG-11 with an eighth of its channels: its linear layers alone have 120 million weights."""
    widths = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]
    model = torchvision.models.VGG(torchvision.models.vgg.make_layers(widths, batch_norm=True), init_weights=False)
    for index, layer in enumerate(model.classifier):
        if isinstance(layer, nn.Linear):
            model.classifier[index] = nn.Linear(64 * 49 if index == 0 else 64, 10 if index == 6 else 64)
    return randomised(model)


CIFAR, IMAGE = (3, 8, 8), (3, 32, 32)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet": (lambda: randomised(LeNet(image_size=28)), (1, 28, 28)),
    "SmallCNN": (lambda: randomised(SmallCNN(width=8)), (1, 8, 8)),
    "VGG-BN": (vgg_bn, IMAGE),
    "ResNet-18": (torchvision_net("resnet18"), IMAGE),
    "bottlenecks": (bottlenecks(), IMAGE),
    "MobileNetV2": (torchvision_net("mobilenet_v2"), IMAGE),
    "MobileNetV3": (torchvision_net("mobilenet_v3_small"), IMAGE),
    "DenseNet": (
        lambda: randomised(torchvision.models.DenseNet(8, (3, 3), 16, num_classes=10)),
        IMAGE,
    ),
    "ResNeXt": (bottlenecks(groups=32, width_per_group=4), IMAGE),
    "squeeze-excite": (lambda: randomised(SqueezeExcite()), CIFAR),
    "grouped": (Grouped, CIFAR),
    "concat-flatten": (ConcatFlatten, CIFAR),
    "transposed": (Transposed, CIFAR),
    "ViT": (tiny_vit, IMAGE),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Return the network and a batch of three inputs."""
    make, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(), torch.randn(3, *shape)
