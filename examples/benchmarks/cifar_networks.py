"""Networks for images of 32 x 32 pixels in ten classes that several benchmarks run."""

import torch
from torch import Tensor, nn
from torchvision.models import resnet18


class VGG16(nn.Module):
    """VGG-16: thirteen convolutions with BatchNorm, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for out in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if out:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
                width = out
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(512, 512)
        self.out = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(self.features(x).flatten(1)))


def cifar_resnet18() -> nn.Module:
    """ResNet-18 whose first convolution is 3 x 3 without stride, and without the first pooling."""
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def with_statistics(model: nn.Module, images: Tensor) -> nn.Module:
    """The model in evaluation mode, its norms having seen ``images`` once."""
    with torch.no_grad():
        model.train()(images)
    return model.eval()
