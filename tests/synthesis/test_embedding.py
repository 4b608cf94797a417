"""The class sums that a release hands on."""

from __future__ import annotations

import io

import pytest
import torch

from lightning_eff.synthesis.embedding import MeanEmbedding


def embedding(fill: float = 1.0) -> MeanEmbedding:
    blocks = {"weight": torch.full((2, 3, 4), fill), "bias": torch.full((2, 3), 2 * fill)}
    return MeanEmbedding(blocks, torch.tensor([5.0, 2.0]), num_records=7, private=True, meta={"seed": 3})


def test_norms_and_products_run_over_all_blocks() -> None:
    one = embedding()
    assert one.layout == {"weight": (3, 4), "bias": (3,)}
    assert (one.num_classes, one.feature_dim) == (2, 15)
    assert one.norm(per_class=True).tolist() == pytest.approx([24**0.5] * 2)  # 12 * 1 + 3 * 4
    assert float(one.norm()) == pytest.approx(48**0.5)
    assert one.dot(embedding(0.5)).tolist() == [12, 12]
    assert torch.equal(one.flatten()[0], torch.tensor([1.0] * 12 + [2.0] * 3))


def test_norms_follow_changes_in_place() -> None:
    one = embedding()
    assert one.square_norms().tolist() == [24, 24]
    one.blocks["bias"][0] += 1
    assert one.square_norms().tolist() == [39, 24]
    one.blocks["weight"] = torch.zeros(2, 3, 4)
    assert one.square_norms().tolist() == [27, 12]


def test_state_goes_through_a_file_of_plain_types() -> None:
    file = io.BytesIO()
    torch.save(embedding().state_dict(), file)
    file.seek(0)
    back = MeanEmbedding.from_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(back.flatten(), embedding().flatten())
    assert (back.num_records, back.private, back.meta) == (7, True, {"seed": 3})


def test_moving_keeps_what_is_told() -> None:
    wide = embedding().to(dtype=torch.float64)
    assert wide.counts.dtype == wide.blocks["bias"].dtype == torch.float64
    assert (wide.num_records, wide.private) == (7, True)


def test_first_difference_of_layouts_is_named() -> None:
    other = {"weight": (3, 4), "bias": (2,)}
    with pytest.raises(ValueError, match=r"expected block 'bias' of shape \(2,\), got \(3,\)"):
        embedding().require_layout(other)
    with pytest.raises(ValueError, match=r"expected block 'bias' of shape none, got \(3,\)"):
        embedding().require_layout({"weight": (3, 4)})
    with pytest.raises(ValueError, match="expected an embedding of 2 classes, got 1"):
        embedding().dot(MeanEmbedding({n: b[:1] for n, b in embedding().blocks.items()}, torch.ones(1)))


def test_blocks_must_have_a_row_for_each_class() -> None:
    with pytest.raises(ValueError, match=r"a row for each of the 3 classes in block 'a', got the shape \(2, 4\)"):
        MeanEmbedding({"a": torch.zeros(2, 4)}, torch.ones(3))
    with pytest.raises(ValueError, match="at least one block"):
        MeanEmbedding({}, torch.ones(3))
