"""A convolution or linear layer as one matrix product over the columns that its inputs give.

``"kernel"`` takes every weight for itself: a row is all a layer sees at one output position. ``"channel"`` takes
channels: a row is one position of the input, and all weights that read a channel are separate outputs of it, so that
a fitted mixing of channels is the same for all kernel positions.

Shape letters: ``B`` samples, ``J`` blocks of a grouped convolution, ``O`` outputs of the layer, ``C`` channels of its
input, ``T`` kernel positions, ``n`` rows, ``K`` columns and ``R`` outputs of the matrix product, each of one block.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Mode = Literal["kernel", "channel"]


@dataclass(frozen=True)
class Layout:
    """How the weights and inputs of one layer become matrices.

    Attributes:
        mode: what a column is: a weight of an output, or a channel.
        linear: whether the layer is linear, not a convolution.
        transposed: whether it is a transposed convolution.
        blocks: ``J``.
        outputs: ``O``.
        inputs: positions of the layer's input axis.
        taps: ``T``; for a linear layer in mode ``"channel"`` the features per channel.
        features: of a linear layer in mode ``"channel"`` the features of each channel, int64 ``[C, T]``.
    """

    mode: Mode
    linear: bool
    transposed: bool
    blocks: int
    outputs: int
    inputs: int
    taps: int
    features: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, mode: Mode, features: Tensor | None = None) -> Layout:
        """Describe ``module``, a convolution or linear layer."""
        if isinstance(module, nn.Linear):
            taps = 1 if features is None or mode == "kernel" else features.shape[1]
            kept = features if mode == "channel" else None
            return cls(mode, True, False, 1, module.out_features, module.in_features, taps, kept)
        assert isinstance(module, _ConvNd)
        taps = module.weight[0, 0].numel()
        transposed = isinstance(module, _ConvTransposeNd)
        return cls(mode, False, transposed, module.groups, module.out_channels, module.in_channels, taps)

    @property
    def columns(self) -> int:
        """``K``."""
        if self.linear:
            return self.inputs if self.features is None else len(self.features)
        return self.inputs // self.blocks * (self.taps if self.mode == "kernel" else 1)

    @property
    def rows_per_output(self) -> int:
        """``R`` over the layer's outputs of a block."""
        return self.taps if self.mode == "channel" else 1

    def matrix(self, weight: Tensor) -> Tensor:
        """Weights of the layer -> ``[J, R, K]``."""
        j = self.blocks
        if self.linear:
            if self.features is None:
                return weight.unsqueeze(0)
            return weight[:, self.features.to(weight.device)].transpose(1, 2).reshape(1, -1, len(self.features))
        if self.transposed:  # [C, O / J, ...]
            return weight.reshape(j, weight.shape[0] // j, -1).transpose(1, 2)
        if self.mode == "kernel":
            return weight.reshape(j, weight.shape[0] // j, -1)
        return weight.reshape(j, -1, weight.shape[1], self.taps).transpose(2, 3).reshape(j, -1, weight.shape[1])

    def weight(self, matrix: Tensor, kernel: torch.Size) -> Tensor:
        """Turn :meth:`matrix` round: ``[J, R, K]`` -> weights of the layer, whose last axes are ``kernel``."""
        j, _, k = matrix.shape
        if self.linear:
            if self.features is None:
                return matrix[0]
            weight = matrix.new_empty(self.outputs, self.inputs)
            weight[:, self.features.to(matrix.device)] = matrix.reshape(-1, self.taps, k).transpose(1, 2)
            return weight
        if self.transposed:
            return matrix.transpose(1, 2).reshape(self.inputs, self.outputs // j, *kernel)
        if self.mode == "channel":
            matrix = matrix.reshape(j, -1, self.taps, k).transpose(2, 3)
        return matrix.reshape(self.outputs, self.inputs // j, *kernel)

    def fold(self, rows: Tensor) -> Tensor:
        """Add up what a constant gives the outputs: ``[J, R]`` -> ``[O]``."""
        return rows.reshape(-1, self.rows_per_output).sum(1)

    def kept_columns(self, keep_in: Tensor) -> Tensor:
        """Spread kept input positions bool ``[inputs]`` over the columns of a block: bool ``[K]``."""
        if self.features is not None:
            return keep_in[self.features[:, 0]]
        block = keep_in.reshape(self.blocks, -1)[0]
        return block.repeat_interleave(self.columns // len(block))

    def kept_rows(self, keep_out: Tensor) -> Tensor:
        """Spread kept outputs bool ``[O]`` over the outputs of a block: bool ``[R]``."""
        return keep_out.reshape(self.blocks, -1)[0].repeat_interleave(self.rows_per_output)

    def cut(self, keep_in: Tensor, keep_out: Tensor) -> Layout:
        """The layout of the layer without some inputs and outputs."""
        smaller = replace(self, inputs=int(keep_in.sum()), outputs=int(keep_out.sum()))
        if self.features is None:
            return smaller
        position = keep_in.cumsum(0) - 1
        return replace(smaller, features=position[self.features[keep_in[self.features[:, 0]]]])

    def grid(self, module: nn.Module, x: Tensor) -> int:
        """Number of positions per sample that rows can be taken from."""
        if self.linear:
            return x[0, ..., 0].numel() if x.ndim > 2 else 1
        sizes = x.shape[2:] if self.mode == "channel" else _output_sizes(module, x)
        return int(torch.Size(sizes).numel())

    def rows(self, module: nn.Module, x: Tensor, at: Tensor) -> Tensor:
        """Inputs ``x`` of the layer ``[B, ...]`` at positions int64 ``[B, P]`` -> ``[J, n, K]``."""
        if self.linear:
            x = _positions_last(x)
            if self.features is None:
                return _gathered(x, at).unsqueeze(0)
            return _gathered(x, at)[:, self.features.to(x.device)].transpose(1, 2).reshape(1, -1, len(self.features))
        if self.mode == "channel":
            return _in_blocks(_gathered(x.flatten(2).transpose(1, 2), at), self.blocks)
        return _in_blocks(_patches(module, x, at), self.blocks)

    def output_rows(self, output: Tensor, at: Tensor) -> Tensor:
        """Outputs of the layer at the same positions -> ``[n, O]``; only in mode ``"kernel"``."""
        return _gathered(_positions_last(output) if self.linear else output.flatten(2).transpose(1, 2), at)


def unit_features(inputs: int, members: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Arrange the features of a linear layer by channels: int64 ``[C, T]``; None where channels have unequal many.

    Args:
        inputs: features of the layer.
        members: ``index`` and ``root`` of each group that it reads; features of no group are channels by themselves.
    """
    owned = torch.zeros(inputs, dtype=torch.bool)
    arranged = []
    for index, root in members:
        owned[index] = True
        counts = root.bincount()
        if counts.min() != counts.max():
            return None
        arranged.append(index[root.argsort(stable=True)].reshape(len(counts), -1))
    single = (~owned).nonzero()
    parts = [*arranged, single] if len(single) else arranged
    return torch.cat(parts) if len({part.shape[1] for part in parts}) == 1 else None


def _positions_last(x: Tensor) -> Tensor:
    """Features of a linear layer with all positions of a sample in one axis: ``[B, L, E]``."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def _gathered(x: Tensor, at: Tensor) -> Tensor:
    """``[B, L, E]`` at positions ``[B, P]`` -> ``[B * P, E]``."""
    return x[torch.arange(len(x), device=x.device)[:, None], at].flatten(0, 1)


def _in_blocks(rows: Tensor, blocks: int) -> Tensor:
    """``[n, J * K]`` -> ``[J, n, K]``."""
    return rows.reshape(len(rows), blocks, -1).transpose(0, 1)


def _padding(module: nn.Module) -> list[tuple[int, int]]:
    """Zeros before and behind the input, per spatial axis."""
    assert isinstance(module, _ConvNd)
    if isinstance(module.padding, str):
        spare = [d * (k - 1) if module.padding == "same" else 0 for d, k in _dilated(module)]
        return [(s // 2, s - s // 2) for s in spare]
    return [(int(p), int(p)) for p in module.padding]


def _dilated(module: _ConvNd) -> list[tuple[int, int]]:
    return list(zip(module.dilation, module.kernel_size, strict=True))


def _output_sizes(module: nn.Module, x: Tensor) -> list[int]:
    assert isinstance(module, _ConvNd)
    return [
        (size + sum(pad) - d * (k - 1) - 1) // stride + 1
        for size, pad, (d, k), stride in zip(
            x.shape[2:], _padding(module), _dilated(module), module.stride, strict=True
        )
    ]


def _patches(module: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    """What a convolution sees at output positions ``[B, P]`` of ``x [B, C, ...]``: ``[B * P, C * T]``."""
    assert isinstance(module, _ConvNd)
    outputs = _output_sizes(module, x)
    padding = [p for pair in reversed(_padding(module)) for p in pair]
    if any(padding):
        x = F.pad(x, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    sizes = x.shape[2:]
    strides = [int(torch.Size(sizes[i + 1 :]).numel()) for i in range(len(sizes))]
    start, left = torch.zeros_like(at), at
    for axis in reversed(range(len(sizes))):
        start = start + left % outputs[axis] * module.stride[axis] * strides[axis]
        left = left // outputs[axis]
    steps = [[d * i * s for i in range(k)] for (d, k), s in zip(_dilated(module), strides, strict=True)]
    taps = torch.tensor([sum(step) for step in itertools.product(*steps)], device=x.device)
    seen = _gathered(x.flatten(2).transpose(1, 2).contiguous(), (start[..., None] + taps).flatten(1))
    return seen.reshape(at.numel(), len(taps), -1).transpose(1, 2).flatten(1)
