"""Embeddings: what the whole batch would act on is refused, and no table is made for each sample."""

import pytest
import torch
from agreement import run
from torch import Tensor, nn
from torch.nn import functional

from lightning_eff.privacy.engine import PerSampleEngine
from lightning_eff.privacy.engine.embedding import EmbeddingUse


@pytest.mark.parametrize(
    "option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=lambda option: next(iter(option))
)
def test_options_by_which_the_batch_acts_on_an_example_are_refused(option: dict[str, float]) -> None:
    layer = nn.Embedding(5, 3, **option)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=next(iter(option))):
        run(PerSampleEngine(layer), torch.tensor([[0, 1], [1, 4]]), 2)
    assert torch.equal(layer.weight, before)


def test_bags_by_offsets_are_refused() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return functional.embedding_bag(x.flatten(), self.weight, torch.tensor([0, 2]))

    with pytest.raises(ValueError, match="offsets"):
        run(PerSampleEngine(Bags()), torch.tensor([[0, 1], [1, 4]]), 2)


def test_norms_and_sum_never_make_a_table_for_each_example(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: EmbeddingUse, name: str, samples: slice) -> Tensor:
        raise AssertionError("a table for each sample was made")

    monkeypatch.setattr(EmbeddingUse, "per_sample", refuse)
    norms, sums = run(PerSampleEngine(nn.Embedding(1000, 3)), torch.randint(1000, (4, 6)), 4)
    assert norms.shape == (4,)
    assert sums["weight"].shape == (1000, 3)


def test_one_token_by_hand() -> None:
    # loss = sum of the looked-up rows: the gradient of a token that comes twice is 2 in each of 3 columns
    layer = nn.Embedding(4, 3)
    tokens = torch.tensor([[1, 1], [0, 2]])
    engine = PerSampleEngine(layer)
    with engine.record(2):
        loss = layer(tokens).sum((1, 2)).mean()
    engine.backward(loss)
    assert engine.norms().tolist() == pytest.approx([12**0.5, 6**0.5])
    summed = engine.clipped_sum(12**0.5 / 2)["weight"][:, 0]
    assert summed.tolist() == pytest.approx([3**0.5 / 6**0.5, 1.0, 3**0.5 / 6**0.5, 0.0], abs=1e-5)
