import pytest
import torch
from torch import nn

from lightning_eff.synthesis import (
    ConvImageGenerator,
    MLPGenerator,
    NumericColumn,
    ResNetImageGenerator,
    TableSchema,
    TabularGenerator,
)
from lightning_eff.synthesis.tables import CategoricalColumn, Head

SCHEMA = TableSchema(
    [
        NumericColumn("age", 17, 90, bins=8),
        CategoricalColumn("sex", ["m", "f"]),
        NumericColumn("height", 1, 2, encoding="minmax"),
        NumericColumn("share", 0, 1, encoding="unit"),
    ],
    "y",
    ["no", "yes"],
)


def codes(generator, samples=40, classes=2):
    return torch.randn(samples, generator.noise_dim), torch.arange(samples) % classes


@pytest.mark.parametrize(
    ("generator", "shape", "low", "high"),
    [
        (ConvImageGenerator(5, 2), (1, 28, 28), 0, 1),
        (ConvImageGenerator(5, 2, (3, 8, 12), output="tanh"), (3, 8, 12), -1, 1),
        (MLPGenerator(5, 2), (1, 28, 28), 0, 1),
        (MLPGenerator(5, 2, (7,), (), output="tanh"), (7,), -1, 1),
        (ResNetImageGenerator(5, 2, width=4), (3, 32, 32), 0, 1),
        (ResNetImageGenerator(5, 2, (1, 16, 24), width=4, output="tanh"), (1, 16, 24), -1, 1),
    ],
)
def test_records_have_the_shape_and_range_asked_for(generator, shape, low, high):
    x = generator(*codes(generator))
    assert x.shape == (40, *shape)
    assert low <= float(x.detach().min()) < float(x.detach().max()) <= high
    x.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in generator.parameters())


def test_the_published_generators_have_their_sizes():
    # 15 x 200 + 200, batch norm 400, 200 x 784 + 784, batch norm 1568, 16 x 8 x 25 + 8, 8 x 25 + 1
    assert sum(p.numel() for p in ConvImageGenerator(5, 10).parameters()) == 3_200 + 400 + 157_584 + 1_568 + 3_208 + 201
    resnet = ResNetImageGenerator(141, 1, width=64, output="tanh")
    assert [layer.out_channels for layer in resnet.modules() if isinstance(layer, nn.ConvTranspose2d)] == [512]
    assert [block.skip.out_channels for block in resnet.blocks] == [256, 128, 64]


def test_the_class_matters():
    generator = MLPGenerator(5, 2, (7,)).eval()
    z = torch.randn(4, 5)
    assert not torch.equal(
        generator(z, torch.zeros(4, dtype=torch.int64)), generator(z, torch.ones(4, dtype=torch.int64))
    )


def test_every_row_of_a_table_keeps_to_its_heads():
    generator = TabularGenerator.for_schema(SCHEMA, 5)
    assert generator.noise_dim == 5 + 8 + 2
    x = generator(*codes(generator))
    assert x.shape == (40, SCHEMA.width)
    for head in SCHEMA.heads:
        block = x[:, head.start : head.stop]
        if head.kind == "onehot":
            assert torch.equal(block.sort(dim=1).values[:, -1], torch.ones(40))
            assert torch.equal(block.sum(dim=1), torch.ones(40))
        else:
            assert (-1 if head.kind == "tanh" else 0) <= float(block.detach().min()) <= float(block.detach().max()) <= 1


def test_categories_are_drawn_with_the_probabilities_of_the_softmax():
    generator = TabularGenerator(1, 1, [Head("onehot", 0, 3)], widths=())
    logits = torch.tensor([1.0, 0.0, -1.0])
    with torch.no_grad():
        generator.layers[0].weight.zero_()
        generator.layers[0].bias.copy_(logits)
    torch.manual_seed(0)
    drawn = generator(*codes(generator, 100_000, 1)).mean(dim=0)
    torch.testing.assert_close(drawn, logits.softmax(0), rtol=0, atol=0.005)  # standard error 0.0016


def test_the_gradient_through_a_drawn_category_is_that_of_the_softmax():
    generator = TabularGenerator(1, 1, [Head("onehot", 0, 3)], widths=(), temperature=0.7)
    z, y = codes(generator, 6, 1)
    direction = torch.randn(6, 3)
    (generator(z, y) * direction).sum().backward()
    straight = generator.layers[0].bias.grad.clone()
    generator.zero_grad()
    uniform = torch.special.ndtr(z[:, 1:].double())
    gumbel = -torch.log(-torch.log(uniform)).float()
    logits = generator.layers(torch.cat([z[:, :1], torch.ones(6, 1)], dim=1))
    (((logits + gumbel) / 0.7).softmax(dim=1) * direction).sum().backward()
    torch.testing.assert_close(straight, generator.layers[0].bias.grad, rtol=1e-4, atol=1e-5)


def test_extreme_latent_numbers_draw_a_category_all_the_same():
    generator = TabularGenerator(1, 1, [Head("onehot", 0, 3)], widths=())
    z = torch.tensor([[0.0, 9.0, -9.0, 0.0], [0.0, -30.0, -30.0, -30.0]])
    x = generator(z, torch.zeros(2, dtype=torch.int64)).detach()
    assert x[0].tolist() == [1, 0, 0]
    assert float(x[1].sum()) == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConvImageGenerator(5, 2, (1, 30, 28)), "multiples of 4"),
        (lambda: ResNetImageGenerator(5, 2, (3, 28, 32)), "multiples of 8"),
        (lambda: ConvImageGenerator(5, 2, (28, 28)), "the shape of an image"),
        (lambda: ConvImageGenerator(5, 2, output="relu"), "output must be one of"),
        (lambda: MLPGenerator(5, 2, (3,), (0,)), "each of widths must be a whole number >= 1"),
        (lambda: ResNetImageGenerator(5, 2, width=0), "width must be a whole number >= 1"),
        (lambda: TabularGenerator(5, 2, []), "heads must cover"),
        (lambda: TabularGenerator(5, 2, [Head("tanh", 1, 2)]), "heads must cover the coordinates from 0"),
        (lambda: TabularGenerator(5, 2, SCHEMA.heads, temperature=0), "temperature must be > 0"),
    ],
)
def test_arguments_out_of_range_are_told(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_numbers_behind_all_drawn_categories_are_worked_out_at_once(monkeypatch):
    calls, log_ndtr = [], torch.special.log_ndtr
    monkeypatch.setattr(torch.special, "log_ndtr", lambda values: calls.append(values.shape) or log_ndtr(values))
    generator = TabularGenerator.for_schema(SCHEMA, 3)
    generator(*codes(generator))
    assert calls == [(40, 10)]  # eight cells and two categories
