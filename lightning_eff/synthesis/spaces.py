"""What one record is: its shape, the range of its numbers, its classes; for images, vectors and tables alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_eff.arguments import check_whole
from lightning_eff.surgery.state import quiet_model
from lightning_eff.synthesis.generators import (
    ConvImageGenerator,
    MLPGenerator,
    Output,
    ResNetImageGenerator,
    TabularGenerator,
)
from lightning_eff.synthesis.options import InputRange
from lightning_eff.synthesis.reading import check_finite
from lightning_eff.synthesis.tables import TableSchema, schema_from

Range = Literal["unit", "signed", "any"]
_BOUNDS: dict[Range, tuple[float, float]] = {"unit": (0.0, 1.0), "signed": (-1.0, 1.0), "any": (-math.inf, math.inf)}
_OUTPUT: dict[Range, Output] = {"unit": "sigmoid", "signed": "tanh", "any": "identity"}
_ROUNDING = 1e-4


@dataclass(frozen=True)
class RecordSpace:
    """The records of a data set, as public knowledge has them.

    Args:
        num_classes: C, >= 1.
        shape: Of one record.
        range: Of its numbers.
        schema: Of a table; ``shape`` is then its width.
    """

    num_classes: int
    shape: tuple[int, ...]
    range: Range = "any"
    schema: TableSchema | None = None

    @classmethod
    def of(
        cls,
        schema: TableSchema | Mapping[str, Any] | str | Path | None,
        num_classes: int | None,
        input_shape: Sequence[int] | None,
        input_range: InputRange,
    ) -> RecordSpace:
        """Take either a schema, or a number of classes and a shape.

        Raises:
            ValueError: Both or none of them were given, or one is no size.
        """
        if schema is not None:
            table = schema_from(dict(schema) if isinstance(schema, Mapping) else schema)
            for name, given, own in (
                ("num_classes", num_classes, table.num_classes),
                ("input_shape", None if input_shape is None else tuple(input_shape), (table.width,)),
            ):
                if given is not None and given != own:
                    raise ValueError(f"the schema says {name} = {own}, got {given}: leave {name} out")
            return cls(table.num_classes, (table.width,), "any", table)
        if num_classes is None or input_shape is None:
            raise ValueError(
                "expected schema= for a table, or num_classes= and input_shape= for images and vectors "
                f"(num_classes=1 without labels), got num_classes={num_classes}, input_shape={input_shape}"
            )
        check_whole("num_classes", num_classes, least=1)
        shape = tuple(input_shape)
        if not shape:
            raise ValueError("input_shape must have at least one axis, got ()")
        for size in shape:
            check_whole("each of input_shape", size, least=1)
        if input_range == "auto":
            input_range = "unit" if len(shape) == 3 else "any"
        return cls(int(num_classes), tuple(map(int, shape)), input_range)

    @property
    def coordinate_names(self) -> list[str] | None:
        """Column of each coordinate of a table."""
        if self.schema is None:
            return None
        return [column.name for column in self.schema.columns for _ in range(column.width)]

    def generator(self, latent_dim: int) -> nn.Module:
        """Build the generator that suits the records best as a first choice."""
        if self.schema is not None:
            return TabularGenerator.for_schema(self.schema, latent_dim)
        output = _OUTPUT[self.range]
        if len(self.shape) == 3 and not (self.shape[1] % 8 or self.shape[2] % 8) and self.shape[0] == 3:
            return ResNetImageGenerator(latent_dim, self.num_classes, self.shape, output=output)
        if len(self.shape) == 3 and not (self.shape[1] % 4 or self.shape[2] % 4):
            return ConvImageGenerator(latent_dim, self.num_classes, self.shape, output=output)
        widths = (256, 512) if len(self.shape) == 3 else (100, 100)
        return MLPGenerator(latent_dim, self.num_classes, self.shape, widths, output)

    def check_records(self, x: Tensor, number: int) -> None:
        """Raise a ValueError where records ``[B, ...]`` of a batch are not of this space; it tells no values."""
        shape = tuple(x.shape[1:])
        # axes of size 1 do not change the order of the numbers, all others do
        if shape != (math.prod(self.shape),) and _without_ones(shape) != _without_ones(self.shape):
            turned = sorted(shape) == sorted(self.shape)
            raise ValueError(
                f"batch {number}: expected records of shape {list(self.shape)}, got {list(shape)}"
                + ("; images are wanted with their channels first" if turned and len(shape) == 3 else "")
            )
        check_finite(x, number, self.coordinate_names)
        if not self._in_range(x):
            low, high = _BOUNDS[self.range]
            raise ValueError(
                f"batch {number}: expected numbers in [{low:g}, {high:g}], got others: images are wanted as [0, 1] "
                "(divide bytes by 255, take normalize=False) or, with FeatureOptions(input_range='signed'), as "
                "[-1, 1]; input_range='any' takes whatever comes"
            )

    def check_generator(self, generator: nn.Module, noise_dim: int) -> None:
        """Let a generator make two samples of each class, and raise a ValueError where they are not of this space."""
        device = next((tensor.device for tensor in generator.parameters()), torch.device("cpu"))
        y = torch.arange(self.num_classes, device=device).repeat(2)
        z = torch.randn(len(y), noise_dim, generator=torch.Generator().manual_seed(0)).to(device)
        name = type(generator).__name__
        with quiet_model(generator), torch.no_grad():
            try:
                x = generator(z, y)
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f"{name} must map z [B, {noise_dim}] and classes y [B] to records, but: {error}; a generator that "
                    "takes more numbers than latent_dim says how many as noise_dim"
                ) from error
        if not isinstance(x, Tensor) or tuple(x.shape) != (len(y), *self.shape):
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"expected {name} to give records {[len(y), *self.shape]}, got {got}")
        if not self._in_range(x):
            low, high = _BOUNDS[self.range]
            raise ValueError(
                f"expected {name} to give numbers in [{low:g}, {high:g}] as the records have them, got others: take "
                f"output={_OUTPUT[self.range]!r}, or another FeatureOptions(input_range=...)"
            )

    def _in_range(self, x: Tensor) -> bool:
        if self.range == "any" or not x.numel():
            return True
        low, high = _BOUNDS[self.range]
        return bool(x.min() >= low - _ROUNDING) and bool(x.max() <= high + _ROUNDING)


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]
