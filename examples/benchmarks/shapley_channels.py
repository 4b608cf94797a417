"""Channel games: the same coalitions by an official-style loop, by captum, and with the prefix cache.

Every contender walks the same orders from no channel to all and returns the same Shapley estimates (asserted first).
The official-style loop sets weights to zero in the network, runs the calibration set in batches of 105 and puts the
weights back, as the authors' code does; captum's ``ShapleyValueSampling`` works on a mask of channels.

Needs the extra ``bench``. Run: python examples/benchmarks/shapley_channels.py          (about 8 minutes)
"""

from collections.abc import Callable, Iterator

import torch
from captum.attr import ShapleyValueSampling
from harness import compare, main
from torch import Tensor, nn

from lightning_eff.models import LeNet
from lightning_eff.pruning import ChannelGame, Samples
from lightning_eff.reporting import Table
from lightning_eff.surgery import ChannelGraph

Estimate = Callable[[], Tensor]


class VGG16(nn.Module):
    """VGG-16 for 32 x 32 images: thirteen convolutions with BatchNorm, two linear layers."""

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


class Layer:
    """One layer of a network as a game of ``players`` blocks of channels, walked in the given orders."""

    def __init__(self, model: nn.Module, name: str, x: Tensor, y: Tensor, players: int, walks: int) -> None:
        self.model, self.x, self.y = model.eval(), x, y
        graph = ChannelGraph.from_model(model, x[:2], check=False)
        self.group = graph.resolve(name)
        self.block = torch.arange(self.group.size) * players // self.group.size
        generator = torch.Generator().manual_seed(0)
        self.orders = torch.stack([torch.randperm(players, generator=generator) for _ in range(walks)])
        self.graph, self.players = graph, players

    def ours(self) -> Tensor:
        """Walk with everything before the layer computed once."""
        samples = Samples.collect([(self.x, self.y)], len(self.x), lambda batch: batch, groups=1)
        game = ChannelGame(self.model, self.graph, self.group.name, samples)
        return self._walk(lambda coalitions: game(coalitions[:, self.block]))

    def official(self) -> Tensor:
        """Zero the weights that read the removed channels, run the loader, restore; once per coalition."""
        return self._walk(lambda coalitions: torch.stack([self._loop(c[self.block]) for c in coalitions]))

    def captum(self) -> Tensor:
        """Hand the same orders to captum, whose features are the entries of a channel mask."""

        def value(mask: Tensor) -> Tensor:
            return self._loop(mask[0] > 0.5).reshape(1)

        sampler = ShapleyValueSampling(value)

        def generator(n_features: int, n_samples: int) -> Iterator[list[int]]:
            yield from self.orders.tolist()

        sampler.permutation_generator = generator
        values = sampler.attribute(
            torch.ones(1, self.group.size),
            baselines=torch.zeros(1, self.group.size),
            feature_mask=self.block[None],
            n_samples=len(self.orders),
        )
        first = [int((self.block == p).nonzero()[0]) for p in range(self.players)]
        return values[0, first].double()

    def _walk(self, value: Callable[[Tensor], Tensor]) -> Tensor:
        phi = torch.zeros(self.players, dtype=torch.float64)
        for order in self.orders:
            coalitions = torch.zeros(self.players + 1, self.players, dtype=torch.bool)
            for step, player in enumerate(order, start=1):
                coalitions[step:, player] = True
            phi[order] += value(coalitions).diff()
        return phi / len(self.orders)

    @torch.no_grad()
    def _loop(self, kept: Tensor) -> Tensor:
        saved = []
        for member in self.group.consumers:
            weight = self.model.get_submodule(member.path).weight
            saved.append((weight, weight.clone()))
            weight[:, member.index[~kept[member.root]]] = 0
        right = 0
        for x, y in zip(self.x.split(105), self.y.split(105), strict=True):
            right += int((self.model(x).argmax(1) == y).sum())
        for weight, old in saved:
            weight.copy_(old)
        return torch.tensor(right / len(self.x), dtype=torch.float64)


def _whole(layers: list[Layer], how: str) -> Estimate:
    return lambda: torch.cat([getattr(layer, how)() for layer in layers])


def _width(model: nn.Module, name: str) -> int:
    return model.get_submodule(name).weight.shape[0]


def _table(title: str, layers: list[Layer], repeats: int) -> Table:
    return compare(
        {
            "official-style loop": _whole(layers, "official"),
            "captum ShapleyValueSampling": _whole(layers, "captum"),
            "lightning_eff, prefix cache": _whole(layers, "ours"),
        },
        reference="captum ShapleyValueSampling",
        repeats=repeats,
        warmup=0,
        title=title,
        check=lambda a, b: torch.testing.assert_close(a, b, atol=1e-6, rtol=0),
    )


def tables() -> list[Table]:
    """Measure LeNet layer by layer and VGG-16 whole."""
    torch.manual_seed(0)
    lenet, images, labels = LeNet(), torch.randn(512, 1, 28, 28), torch.randint(0, 10, (512,))
    lenet(images)  # statistics of the norms
    vgg, small, classes = VGG16(), torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
    vgg(small)
    names = [f"features.{i}" for i, layer in enumerate(vgg.features) if isinstance(layer, nn.Conv2d)] + ["fc"]
    return [
        _table("LeNet layer 1: 10 channels, 512 images, 10 walks", [Layer(lenet, "c1.0", images, labels, 10, 10)], 3),
        _table("LeNet layer 2: 20 channels, 512 images, 10 walks", [Layer(lenet, "c3.0", images, labels, 20, 10)], 3),
        _table(
            "VGG-16, all 14 layers: blocks of 4 channels, 16 images, 1 walk",
            [Layer(vgg, name, small, classes, _width(vgg, name) // 4, 1) for name in names],
            1,
        ),
    ]


if __name__ == "__main__":
    main(tables)
