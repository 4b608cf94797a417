"""The 78 mixtures that arXiv 2402.07871 fitted its law to: sizes, tokens and granularities, without their losses."""

import numpy as np

from lightning_eff.moe.scaling import DecoderShape, FineGrainedMoELaw

# (width, blocks): billions of tokens -> finest granularity; 1, 2, 4 ... up to it were trained
GRID = {
    (256, 4): {16: 16, 33: 16, 66: 16},
    (384, 4): {16: 16, 33: 16, 66: 16},
    (512, 4): {16: 16, 33: 16, 66: 16, 130: 4},
    (512, 8): {16: 16, 33: 16, 66: 8},
    (640, 10): {16: 16, 33: 16, 66: 4},
    (768, 12): {33: 4},
}


def paper_runs(noise: float = 0.0, seed: int = 0, law: FineGrainedMoELaw | None = None) -> dict[str, np.ndarray]:
    """Columns of runs whose losses a law gives, times exp(noise x a normal number)."""
    rows = []
    for (width, blocks), finest in GRID.items():
        for tokens, last in finest.items():
            for granularity in (1, 2, 4, 8, 16):
                if granularity <= last:
                    shape = DecoderShape(width, blocks, 64, granularity)
                    flops = shape.flops_per_token() * tokens * 1e9
                    rows.append((shape.n_total, tokens * 1e9, granularity, 64, flops))
    names = ("n_total", "n_tokens", "granularity", "expansion_rate", "flops")
    columns = dict(zip(names, np.array(rows, dtype=float).T, strict=True))
    loss = (law or FineGrainedMoELaw.paper())(columns["n_total"], columns["n_tokens"], columns["granularity"])
    columns["loss"] = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
    return columns
