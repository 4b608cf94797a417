"""Attention rollout: closed form, the whole product, dropped entries."""

import pytest
import torch

from lightning_eff.glimpse.rollout import attention_rollout


def some_attention(blocks=4, batch=3, tokens=7, seed=0):
    logits = torch.randn(blocks, batch, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    return list(logits.double().softmax(-1))


def whole_product(attention, discard_ratio):
    """Rollout as a product of matrices, one image and one entry at a time."""
    rows = []
    for image in range(len(attention[0])):
        product = torch.eye(attention[0].shape[-1], dtype=torch.float64)
        for weights in attention:
            kept = weights[image].clone().flatten()
            order = kept.argsort()
            for entry in order[: int(discard_ratio * len(kept))].tolist():
                if entry:
                    kept[entry] = 0
            mixed = (kept.view_as(weights[image]) + torch.eye(len(product), dtype=torch.float64)) / 2
            product = mixed / mixed.sum(-1, keepdim=True) @ product
        rows.append(product[0])
    return torch.stack(rows)


@pytest.mark.parametrize(("tokens", "blocks"), [(5, 1), (5, 3), (17, 12)])
def test_even_attention_has_its_closed_form(tokens, blocks):
    even = [torch.full((2, tokens, tokens), 1 / tokens, dtype=torch.float64)] * blocks
    row = attention_rollout(even, discard_ratio=0)
    torch.testing.assert_close(row[:, 1:], torch.full((2, tokens - 1), (1 - 2.0**-blocks) / tokens).double())
    torch.testing.assert_close(row.sum(1), torch.ones(2).double())


@pytest.mark.parametrize("discard_ratio", [0, 0.3, 0.5, 0.9])
def test_the_row_is_that_of_the_whole_product(discard_ratio):
    attention = some_attention()
    row = attention_rollout(attention, discard_ratio)
    torch.testing.assert_close(row, whole_product(attention, discard_ratio), atol=1e-12, rtol=0)
    torch.testing.assert_close(row.sum(1), torch.ones(3).double())


def test_the_class_tokens_own_entry_is_never_dropped():
    weights = torch.tensor([[[0.01, 0.99], [0.5, 0.5]]])
    # [[.01, .99], [0, .5]] of which I is added: without the kept entry the first row would be [1, .99] / 1.99
    torch.testing.assert_close(attention_rollout([weights], 0.5), torch.tensor([[1.01, 0.99]]) / 2)


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"discard_ratio must lie in \[0, 1\), got {ratio}"):
        attention_rollout(some_attention(), ratio)


def test_no_block_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        attention_rollout([])
