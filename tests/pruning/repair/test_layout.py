"""Every layer is the matrix product that its layout says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.pruning.repair.layout import Layout, unit_features

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (6,)),
    "linear on tokens": (nn.Linear(6, 4), (5, 6)),
    "linear on a grid": (nn.Linear(6, 4, bias=False), (3, 2, 6)),
    "conv": (nn.Conv2d(6, 4, 3), (6, 7, 5)),
    "stride, padding, dilation": (nn.Conv2d(6, 4, (3, 2), (2, 1), (2, 1), (1, 2)), (6, 9, 8)),
    "same": (nn.Conv2d(6, 4, (3, 4), padding="same", dilation=(2, 1)), (6, 7, 7)),
    "valid": (nn.Conv2d(6, 4, 3, padding="valid"), (6, 7, 7)),
    "reflect": (nn.Conv2d(6, 4, 3, padding=2, padding_mode="reflect"), (6, 7, 7)),
    "replicate": (nn.Conv2d(6, 4, 3, padding=2, padding_mode="replicate"), (6, 7, 7)),
    "circular": (nn.Conv2d(6, 4, 3, padding=(2, 1), padding_mode="circular"), (6, 7, 7)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (6, 7, 7)),
    "pointwise": (nn.Conv2d(6, 4, 1, stride=2), (6, 7, 7)),
    "1d": (nn.Conv1d(6, 4, 3, padding=1), (6, 9)),
    "3d": (nn.Conv3d(6, 4, (1, 2, 3), stride=(1, 2, 1), padding=1), (6, 4, 5, 3)),
}


def inputs(shape: tuple[int, ...], samples: int = 3) -> Tensor:
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # asymmetric padding is meant
@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weights_are_the_layers_output(name: str) -> None:
    module, shape = LAYERS[name]
    x = inputs(shape)
    layout = Layout.of(module, "kernel")
    grid = layout.grid(module, x)
    at = torch.stack([torch.randperm(grid, generator=torch.Generator().manual_seed(i)) for i in range(len(x))])
    with torch.no_grad():
        rows = layout.rows(module, x, at)
        output = module(x)
        product = (rows @ layout.matrix(module.weight).transpose(1, 2)).transpose(0, 1).flatten(1)
        if module.bias is not None:
            product += module.bias
    expected = layout.output_rows(output, at)
    assert rows.shape == (layout.blocks, at.numel(), layout.columns)
    assert at.numel() == output.numel() / 4  # every position once
    assert torch.allclose(product, expected, atol=1e-5)


def weights() -> dict[str, tuple[nn.Module, Any]]:
    features = unit_features(6, [(torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([0, 0, 1, 1, 2, 2]))])
    return {
        **{name: (module, None) for name, (module, _) in LAYERS.items()},
        "flattened": (nn.Linear(6, 4), features),
        "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2), None),
        "grouped transposed": (nn.ConvTranspose2d(6, 4, (1, 3), groups=2), None),
    }


@pytest.mark.parametrize("name", weights())
def test_matrix_turns_back_into_the_weights_of_the_smaller_layer(name: str) -> None:
    module, features = weights()[name]
    for mode in ("kernel", "channel") if not isinstance(module, nn.ConvTranspose2d) else ("channel",):
        layout = Layout.of(module, mode, features)
        keep_in, keep_out = torch.tensor([True, True, False] * 2), torch.tensor([False, True] * 2)
        if features is not None:
            keep_in = torch.tensor([True, True, False, False, True, True])
        matrix = layout.matrix(module.weight)
        smaller = matrix[:, layout.kept_rows(keep_out)][:, :, layout.kept_columns(keep_in)]
        found = layout.cut(keep_in, keep_out).weight(smaller, module.weight.shape[2:])
        into, out = (0, 1) if layout.transposed else (1, 0)
        keep = {into: keep_in, out: keep_out}
        if layout.blocks > 1:
            shared = out if layout.transposed else into
            keep[shared] = keep[shared][: len(keep[shared]) // layout.blocks]
        expected = module.weight
        for dim, mask in keep.items():
            expected = expected.index_select(dim, mask.nonzero().flatten())
        assert torch.equal(found, expected)


def test_transposed_convolution_is_linear_in_the_channels_of_its_layout() -> None:
    module = nn.ConvTranspose2d(6, 4, 3, stride=2, bias=False)
    x, mixing = inputs((6, 5, 5)), torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    layout = Layout.of(module, "channel")
    mixed = nn.ConvTranspose2d(6, 4, 3, stride=2, bias=False)
    with torch.no_grad():
        mixed.weight.copy_(layout.weight(layout.matrix(module.weight) @ mixing, module.weight.shape[2:]))
        expected = module(torch.einsum("ij,bjhw->bihw", mixing, x))
        assert torch.allclose(mixed(x), expected, atol=1e-5)


def test_features_of_unequal_channels_are_not_arranged() -> None:
    index = torch.arange(5)
    assert unit_features(5, [(index, torch.tensor([0, 0, 1, 1, 1]))]) is None
    assert unit_features(5, [(index[:4], torch.tensor([0, 0, 1, 1]))]) is None  # the fifth is a channel of one
    found = unit_features(4, [(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 1, 0]))])
    assert found is not None
    assert found.tolist() == [[1, 3], [0, 2]]
