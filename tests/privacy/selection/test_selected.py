"""One tensor's active coordinates: blocks, packing, restoring."""

from __future__ import annotations

import io

import pytest
import torch

from lightning_eff.privacy.selection.selected import Selection, pack_bits, unpack_bits

SHAPE = (5, 4, 3)
ROWS, COLUMNS = torch.tensor([0, 3, 4]), torch.tensor([1, 2])
MASK = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5

KINDS = {
    "all": Selection.all(SHAPE),
    "none": Selection.none(SHAPE),
    "rows": Selection(SHAPE, rows=ROWS),
    "columns": Selection(SHAPE, columns=COLUMNS),
    "rows and columns": Selection(SHAPE, rows=ROWS, columns=COLUMNS),
    "mask": Selection(SHAPE, mask=MASK),
    "rows and mask": Selection(SHAPE, rows=ROWS, mask=MASK),
    "columns and mask": Selection(SHAPE, columns=COLUMNS, mask=MASK),
    "all three": Selection(SHAPE, rows=ROWS, columns=COLUMNS, mask=MASK),
    "scalar": Selection.all(()),
    "no scalar": Selection.none(()),
}
selections = pytest.mark.parametrize("selection", KINDS.values(), ids=KINDS)


def expected_mask(selection: Selection) -> torch.Tensor:
    """Straight from the definition: in the rows, in the columns and in the mask."""
    expected = torch.zeros(selection.shape, dtype=torch.bool)
    for index in torch.ones(selection.shape).nonzero().tolist():
        in_rows = selection.rows is None or index[0] in selection.rows.tolist()
        in_columns = selection.columns is None or index[1] in selection.columns.tolist()
        in_mask = selection.mask is None or bool(selection.mask[tuple(index)])
        expected[tuple(index)] = in_rows and in_columns and in_mask
    return expected


def values(selection: Selection, seed: int = 1) -> torch.Tensor:
    return torch.randn(selection.shape, generator=torch.Generator().manual_seed(seed))


@selections
def test_active_coordinates_are_those_in_rows_columns_and_mask(selection: Selection) -> None:
    expected = expected_mask(selection)
    assert torch.equal(selection.full_mask(), expected)
    assert selection.count == int(expected.sum())
    assert selection.is_empty == (not expected.any())
    assert selection.is_all == bool(expected.all())


@selections
def test_block_put_back_into_the_tensor_is_the_tensor_with_zeros_where_nothing_is_active(selection: Selection) -> None:
    full = values(selection)
    block = selection.compact(full)
    assert block.shape == selection.block_shape
    assert torch.equal(selection.expand(block), full * expected_mask(selection))


@selections
def test_packed_values_are_the_active_ones_and_unpack_to_the_block(selection: Selection) -> None:
    full = values(selection)
    block = selection.compact(full)
    packed = selection.pack(block)
    assert torch.equal(packed, full[expected_mask(selection)])
    assert torch.equal(selection.unpack(packed), block)


@selections
def test_put_back_restores_exactly_the_coordinates_that_are_not_active(selection: Selection) -> None:
    before, after = values(selection, 1), values(selection, 2)
    tensor = torch.nn.Parameter(after.clone())
    selection.put_back(tensor, before)
    assert torch.equal(tensor, torch.where(expected_mask(selection), after, before))


def test_put_back_replaces_values_that_are_not_finite() -> None:
    for selection in (KINDS["mask"], KINDS["rows"], KINDS["all three"]):
        before = values(selection)
        tensor = torch.full(SHAPE, torch.nan)
        selection.put_back(tensor, before)
        assert torch.equal(tensor.isnan(), selection.full_mask())


@selections
def test_intersection_allows_only_what_the_static_mask_allows(selection: Selection) -> None:
    static = torch.rand(selection.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    assert torch.equal(selection.intersect(static).full_mask(), expected_mask(selection) & static)


@selections
def test_state_survives_a_file_that_is_loaded_with_weights_only(selection: Selection) -> None:
    file = io.BytesIO()
    torch.save(selection.state(), file)
    file.seek(0)
    restored = Selection.from_state(torch.load(file, weights_only=True))
    assert restored.equals(selection)
    assert restored.block_shape == selection.block_shape  # the same block, not only the same coordinates


def test_different_selections_are_not_equal() -> None:
    assert KINDS["rows"].equals(Selection(SHAPE, rows=ROWS))
    assert not KINDS["rows"].equals(KINDS["columns"])
    assert not KINDS["all"].equals(Selection.all((5, 4)))


def test_bits_take_an_eighth_of_the_bytes_and_come_back() -> None:
    bits = pack_bits(MASK)
    assert bits.dtype == torch.uint8
    assert len(bits) == 8  # 60 coordinates
    assert torch.equal(unpack_bits(bits, SHAPE), MASK)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"shape": (), "rows": ROWS}, r"shape \[\] has no rows"),
        ({"shape": (5,), "columns": COLUMNS}, r"shape \[5\] has no columns"),
        ({"shape": SHAPE, "rows": ROWS.int()}, r"expected rows as int64 \[k\], got torch.int32"),
        ({"shape": SHAPE, "mask": MASK[0]}, r"expected a bool mask of shape \[5, 4, 3\], got torch.bool \[4, 3\]"),
        ({"shape": SHAPE, "mask": MASK.float()}, "got torch.float32"),
    ],
)
def test_indices_and_masks_that_do_not_fit_are_refused(parts: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(**parts)
