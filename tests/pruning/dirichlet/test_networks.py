"""The networks of the paper at the widths of its published code: parameters and multiply-adds, counted by the graph."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.models import LeNet
from lightning_eff.surgery import ChannelGraph

VGG_FULL = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512)
VGG_CODE = (25, 25, 65, 80, 201, 158, 159, 460, 450, 490, 470, 465, 465, 450)
VGG_SMALL = (39, 39, 63, 48, 55, 98, 97, 52, 62, 22, 42, 47, 47, 42)
WRN_FULL = (160,) * 4 + (320,) * 4 + (640,) * 4
WRN_CODE = (75, 85, 80, 80, 159, 159, 154, 159, 315, 315, 314, 316)


class VGG(nn.Module):
    """Thirteen convolutions and one hidden linear layer of the given widths."""

    def __init__(self, widths: Sequence[int] = VGG_FULL) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for number, width in enumerate(widths[:13]):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            if number in (1, 3, 6, 9, 12):
                layers.append(nn.MaxPool2d(2))
            before = width
        self.features = nn.Sequential(*layers)
        self.hidden, self.out = nn.Linear(before, widths[13]), nn.Linear(widths[13], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(self.features(x).flatten(1))))


class Wide(nn.Module):
    """Norm, convolution, norm, convolution, and a shortcut, 1 x 1 where the shape changes."""

    def __init__(self, before: int, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(before), nn.Conv2d(before, inner, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, out, 3, stride, 1)
        self.shortcut = nn.Conv2d(before, out, 1, stride) if before != out or stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(y))) + self.shortcut(x)


class WRN(nn.Module):
    """WideResNet-28-10 with the given widths between the two convolutions of its twelve blocks."""

    def __init__(self, inner: Sequence[int] = WRN_FULL) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        blocks, before = [], 16
        for number, width in enumerate(inner):
            out = (160, 320, 640)[number // 4]
            blocks.append(Wide(before, width, out, 2 if number in (4, 8) else 1))
            before = out
        self.blocks, self.norm, self.out = nn.Sequential(*blocks), nn.BatchNorm2d(640), nn.Linear(640, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.adaptive_avg_pool2d(F.relu(self.norm(self.blocks(self.first(x)))), 1).flatten(1))


def graph_of(model: nn.Module, names: Sequence[str]) -> ChannelGraph:
    """Hand-written groups for a chain of layers: of each named layer, its norm and the layer that reads it."""
    modules = dict(model.named_modules())
    order = [name for name, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)]
    groups = []
    for name in names:
        size = modules[name].weight.shape[0]
        index = list(range(size))
        members = [{"path": name, "axis": "out", "index": index}]
        for path in order[order.index(name) + 1 :]:
            members.append(
                {"path": path, "axis": "out" if isinstance(modules[path], nn.BatchNorm2d) else "in", "index": index}
            )
            if not isinstance(modules[path], nn.BatchNorm2d):
                break
        groups.append({"name": name, "size": size, "members": members})
    return ChannelGraph.from_dict({"groups": groups}, model, torch.zeros(1, 3, 32, 32, device="meta"))


@pytest.mark.parametrize(
    ("widths", "params", "macs"),
    [(VGG_FULL, 14.99e6, 313.5e6), (VGG_CODE, 11.44e6, 160.4e6), (VGG_SMALL, 0.359e6, 39.4e6)],
    ids=["full", "code", "small"],
)
def test_vgg16_has_the_published_size_at_the_published_widths(
    widths: Sequence[int], params: float, macs: float
) -> None:
    with torch.device("meta"):
        model = VGG()
        narrow = VGG(widths)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) or name == "hidden"]
    graph = graph_of(model, names)
    config = dict(zip(names, widths, strict=True))
    assert float(graph.params(config)) == sum(p.numel() for p in narrow.parameters())
    assert float(graph.params(config)) == pytest.approx(params, rel=5e-4)  # the figures are rounded
    assert float(graph.macs(config)) == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize(
    ("widths", "params", "macs"), [(WRN_FULL, 36.49e6, 5.95e9), (WRN_CODE, 18.12e6, 2.97e9)], ids=["full", "code"]
)
def test_wide_resnet_has_the_published_size_at_the_published_widths(
    widths: Sequence[int], params: float, macs: float
) -> None:
    with torch.device("meta"):
        model = WRN()
        narrow = WRN(widths)
    names = [f"blocks.{number}.conv1" for number in range(12)]
    graph = graph_of(model, names)
    config = dict(zip(names, widths, strict=True))
    assert float(graph.params(config)) == sum(p.numel() for p in narrow.parameters())
    assert float(graph.params(config)) == pytest.approx(params, rel=5e-4)
    assert float(graph.macs(config)) == pytest.approx(macs, rel=2e-3)


@pytest.mark.parametrize(
    ("widths", "params"),
    [((10, 20, 100, 25), 40.2e3), ((8, 9, 36, 17), 8.0e3), ((20, 50, 800, 500), 1.07e6), ((5, 7, 45, 20), 7.2e3)],
)
def test_lenet_has_the_published_size_at_the_published_widths(widths: Sequence[int], params: float) -> None:
    assert sum(p.numel() for p in LeNet(channels=widths).parameters()) == pytest.approx(params, rel=1e-2)
