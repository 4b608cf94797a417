"""Tensor sketches of gradients: inner products kept in expectation, in far fewer coordinates.

Each gradient block delta a^T of a dense layer is sketched from its factors by two count sketches and a product of
their Fourier transforms (tensor sketch, Pham and Pagh 2013); other blocks by a count sketch. Blocks add up.

``n`` samples, ``k`` coordinates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_eff.synthesis.features.blocks import BlockUse
from lightning_eff.synthesis.features.recording import Recording
from lightning_eff.synthesis.features.uses import LayerUse, RowUse


class SketchRecording:
    """A recording whose gradients are sketched: one block for all layers.

    Args:
        sketch: The map.
        recording: Of the network.
        differentiable: Whether the sketches are to be differentiable in the samples.
    """

    def __init__(self, sketch: Sketch, recording: Recording, differentiable: bool) -> None:
        with torch.set_grad_enabled(differentiable):
            self.tensors = (sketch(recording.uses()),)

    def uses(self, tensors: Sequence[Tensor] | None = None) -> list[LayerUse]:
        """Return the one use, made of ``tensors`` or of what was recorded."""
        (matrix,) = self.tensors if tensors is None else tensors
        return [BlockUse(["sketch"], [matrix.shape[1]], matrix)]


class Sketch(nn.Module):
    """A random linear map from gradients to ``k`` numbers, fixed by its arguments.

    Args:
        dim: Coordinates k, >= 1.
        layout: Stored shape of each gradient block.
        seed: Draws the map; the global generator is left alone.
    """

    def __init__(self, dim: int, layout: Mapping[str, tuple[int, ...]], seed: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"expected sketch_dim >= 1, got {dim}")
        self.dim = dim
        generator = torch.Generator().manual_seed(seed)
        # one hash for each axis of a block; factors take the axes, a written-out block takes their sum
        self._names = {name: f"block_{index}" for index, name in enumerate(layout)}
        for name, shape in layout.items():
            rows = shape[0]
            columns = torch.Size(shape[1:]).numel()
            for axis, size in (("rows", rows), ("columns", columns)):
                places = torch.randint(dim, (size,), generator=generator, device="cpu")
                signs = (2 * torch.randint(2, (size,), generator=generator, device="cpu") - 1).float()
                self.register_buffer(f"{self._names[name]}_{axis}_places", places, persistent=False)
                self.register_buffer(f"{self._names[name]}_{axis}_signs", signs, persistent=False)

    def forward(self, uses: Iterable[LayerUse]) -> Tensor:
        """Return ``(n, k)`` sketches of the gradients, not normalised."""
        spectrum: Tensor | None = None
        plain: Tensor | None = None
        for use in uses:
            if isinstance(use, RowUse) and use.positions == 1:
                found = self._of_factors(use)
                spectrum = found if spectrum is None else spectrum + found
            else:
                block = self._of_block(use)
                plain = block if plain is None else plain + block
        if spectrum is None:
            assert plain is not None
            return plain
        folded = torch.fft.irfft(spectrum, n=self.dim)
        result: Tensor = folded if plain is None else folded + plain
        return result

    def _hash(self, name: str, axis: str) -> tuple[Tensor, Tensor]:
        prefix = f"{self._names[name]}_{axis}"
        return self.get_buffer(f"{prefix}_places"), self.get_buffer(f"{prefix}_signs")

    def _count(self, values: Tensor, places: Tensor, signs: Tensor) -> Tensor:
        zeros = values.new_zeros(len(values), self.dim)
        return zeros.index_add(1, places, values * signs.to(values.dtype))

    def _of_factors(self, use: RowUse) -> Tensor:
        rows = torch.fft.rfft(self._count(use.delta[:, 0], *self._hash(use.names[0], "rows")))
        columns = torch.fft.rfft(self._count(use.a[:, 0], *self._hash(use.names[0], "columns")))
        spectrum = rows * columns
        if use.has_bias:
            spectrum = spectrum + torch.fft.rfft(self._count(use.delta[:, 0], *self._hash(use.names[1], "rows")))
        result: Tensor = spectrum
        return result

    def _of_block(self, use: LayerUse) -> Tensor:
        places, signs = [], []
        for name in use.names:
            (row_places, row_signs), (column_places, column_signs) = (
                self._hash(name, "rows"),
                self._hash(name, "columns"),
            )
            places.append(((row_places[:, None] + column_places) % self.dim).flatten())
            signs.append((row_signs[:, None] * column_signs).flatten())
        return self._count(use.per_sample(), torch.cat(places), torch.cat(signs))
