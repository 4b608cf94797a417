"""Heads read any feature."""

import pytest
import torch
import torchvision
from torch import nn

from lightning_eff.early_exit.attaching.heads import Head, PooledHead, channels_of, class_token, head_from
from lightning_eff.early_exit.network import MultiExitNetwork


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        ("auto", (7,)),
        ("linear", (7, 5, 6)),
        ("auto", (9, 7)),
        ("auto", (7, 2, 3, 4)),
        ("pool", (7, 9, 9)),
        ("pool", (7, 2, 3)),
        ("conv", (7, 5, 5)),
        ("token", (9, 7)),
        ("mlp", (7, 5, 5)),
        (Head("mlp", layers=3, hidden=11), (7,)),
        (Head("conv", layers=2), (7, 5, 5)),
        (Head("token", layers=5), (9, 7)),
        (Head("linear", channels="last"), (5, 6, 7)),
        (Head("pool", channels="last"), (5, 6, 7)),
    ],
)
def test_head_maps_a_feature_to_logits(head, shape):
    built = head_from(head)(shape, 4)
    logits = built(torch.randn(3, *shape))
    assert logits.shape == (3, 4)
    logits.sum().backward()
    assert all(p.grad is not None for p in built.parameters())


def test_linear_head_is_the_mean_over_positions_then_one_layer():
    x = torch.randn(3, 7, 5, 6, dtype=torch.float64)
    head = Head()((7, 5, 6), 4).double()
    torch.testing.assert_close(head(x), head.layers(x.mean((2, 3))))
    last = Head(channels="last")((5, 6, 7), 4).double()
    last.load_state_dict(head.state_dict())
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)), head(x))


def test_token_head_reads_the_class_token_only():
    x = torch.randn(3, 9, 7)
    head = Head("token")((9, 7), 4)
    other = x.clone()
    other[:, 1:] = 0
    assert torch.equal(head(x), head(other))
    mean = Head("linear")((9, 7), 4)
    assert not torch.equal(mean(x), mean(other))


def test_pooled_head_mixes_max_and_mean_of_a_four_by_four_grid():
    x = torch.randn(2, 3, 8, 8)
    head = PooledHead((3, 8, 8), 4)
    blocks = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)
    pooled = head.mix * blocks.amax(-1) + (1 - head.mix) * blocks.mean(-1)
    torch.testing.assert_close(head(x), head.linear(pooled.flatten(1)))
    assert 0 <= head.mix < 1


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [("pool", (9, 7), r"reads \[B, C, H, W\]"), ("token", (7, 5, 5), r"reads \[B, L, D\]")],
)
def test_head_that_cannot_read_the_feature_says_so(kind, shape, message):
    with pytest.raises(ValueError, match=message):
        Head(kind)(shape, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "big"}, "the kind of a head must be one of auto, .*got 'big'"),
        ({"layers": 0}, "layers must be a whole number >= 1, got 0"),
        ({"hidden": 2.5}, "hidden must be a whole number >= 1, got 2.5"),
        ({"token": "last"}, "token must be one of first, mean, None, got 'last'"),
        ({"channels": "middle"}, "channels must be one of first, last, None, got 'middle'"),
    ],
)
def test_head_options_that_cannot_be_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        Head(**options)


def test_head_must_be_something_that_builds():
    with pytest.raises(TypeError, match="a name, a Head, a module or a callable, got int"):
        head_from(3)


def test_class_token_is_found_by_the_name_of_its_parameter():
    vit = torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=3)
    assert class_token(vit)
    assert not class_token(torchvision.models.resnet18(num_classes=3))
    network = MultiExitNetwork(vit, 1, 3, example_input=torch.randn(2, 3, 16, 16))
    assert network.heads[0].first


def test_channels_are_where_the_widths_of_the_layer_are():
    assert channels_of(nn.Conv2d(3, 8, 3), (8, 5, 5)) == "first"
    assert channels_of(nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8)), (5, 5, 8)) == "last"
    assert channels_of(nn.ReLU(), (5, 5, 8)) == "first"
    swin = torchvision.models.swin_t(num_classes=3)
    network = MultiExitNetwork(swin, ["features.1"], 3, example_input=torch.randn(2, 3, 32, 32))
    assert network.heads[0].channels_last


def test_a_head_per_exit_by_name():
    backbone = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    mine = nn.Linear(4, 3)
    network = MultiExitNetwork(backbone, {"1": mine, "3": Head("mlp", layers=2)}, 3, example_input=torch.randn(2, 4))
    assert network.heads[0] is mine
    assert len(network.heads[1].layers) == 3
