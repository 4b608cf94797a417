"""Removing one sample never changes the clipped sum by more than C, and often by nearly that much."""

import pytest
import torch
from agreement import GRANULARITIES, draw_selections, run
from layer_zoo import ATTENTION, EMBEDDINGS, EXPANDED, NORMS, N
from torch import nn

from lightning_eff.batch import take
from lightning_eff.privacy.engine import PerSampleEngine

ZOO = [*NORMS, *EMBEDDINGS, *ATTENTION[::4], *EXPANDED]
DRAWS = 200


def change(engine: PerSampleEngine, inputs: object, left_out: int, max_norm: float, clipping: str) -> float:
    """Euclidean norm of the difference that one sample makes."""
    rest = take(inputs, [i for i in range(N) if i != left_out])
    _, whole = run(engine, inputs, N, max_norm, clipping)
    _, without = run(engine, rest, N - 1, max_norm, clipping)
    return float(sum((whole[name] - without[name]).square().sum() for name in whole)) ** 0.5


@pytest.mark.filterwarnings("ignore:.*did not take part in the step")
@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_one_example_changes_the_sum_by_at_most_the_clipping_norm(clipping: str) -> None:
    changes = []
    for draw in range(DRAWS if clipping == "flat" else DRAWS // 8):
        torch.manual_seed(draw)
        specimen = ZOO[draw % len(ZOO)]
        model, inputs = specimen.build().double(), specimen.inputs()
        engine = PerSampleEngine(model, tune=False)
        engine.select(draw_selections(model, GRANULARITIES[draw % len(GRANULARITIES)], 0.3, draw))
        max_norm = 10.0 ** (draw % 4 - 2)
        changes.append(change(engine, inputs, draw % N, max_norm, clipping) / max_norm)
    assert max(changes) <= 1 + 1e-5
    assert max(changes) >= 0.99  # else the bound would hold for nothing


def test_norms_over_all_coordinates_would_waste_what_is_dropped() -> None:
    # one coordinate of two is active: the sample (3, 4) is clipped to (1, 0), not to (0.6, 0)
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    engine = PerSampleEngine(model)
    engine.select(draw_selections(model, "columns", 0.5, seed=1))
    kept = int(draw_selections(model, "columns", 0.5, seed=1)["weight"].columns)
    example = torch.tensor([[3.0, 4.0]])
    with engine.record(1):
        loss = -model(example).sum()
    engine.backward(loss)
    assert float(engine.norms()) == (3.0, 4.0)[kept]
    assert engine.clipped_sum(1.0)["weight"].tolist() == [[pytest.approx(-1.0, abs=1e-5)]]
