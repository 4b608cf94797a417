"""Recording attention changes nothing of what it computes."""

import pytest
import torch
from agreement import run
from torch import Tensor, nn

from lightning_eff.privacy.engine import PerSampleEngine


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_outputs_weights_and_dropout_are_those_of_torch(batch_first: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(6, 2, dropout=0.4, batch_first=batch_first, add_bias_kv=True)
    x = torch.randn(3, 4, 6) if batch_first else torch.randn(4, 3, 6)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    torch.manual_seed(1)
    expected = layer(x, x, x, attn_mask=mask, need_weights=need_weights)
    engine = PerSampleEngine(layer)
    torch.manual_seed(1)
    with engine.record(3):
        found = layer(x, x, x, attn_mask=mask, need_weights=need_weights)
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other)


def test_gradients_are_those_of_the_dropout_that_was_drawn() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(6, 2, dropout=0.4, batch_first=True).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    torch.manual_seed(1)
    loss = layer(x, x, x)[0].square().sum((1, 2)).mean()
    expected = dict(
        zip(dict(layer.named_parameters()), torch.autograd.grad(loss, list(layer.parameters())), strict=True)
    )
    engine = PerSampleEngine(layer)
    torch.manual_seed(1)
    with engine.record(3):
        loss = layer(x, x, x)[0].square().sum((1, 2)).mean()
    engine.backward(loss)
    for name, total in engine.clipped_sum(1e9).items():
        torch.testing.assert_close(total / 3, expected[name])


def test_a_query_without_batch_is_refused() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    with pytest.raises(ValueError, match="three dimensions"):
        run(PerSampleEngine(Alone()), torch.randn(3, 4), 3)


def test_evaluating_encoder_is_seen_although_torch_has_a_fast_path_for_it() -> None:
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1).eval()
    norms, sums = run(PerSampleEngine(layer), torch.randn(3, 2, 4), 3)
    assert all(total.abs().sum() > 0 for total in sums.values())
    assert (norms > 0).all()
