"""One mixture-of-experts layer on a GPU in bfloat16, against the dense network of equal active FLOPs and Hugging Face.

Forward and backward pass of 16,384 tokens, d = 1024, SwiGLU of width 3,072, E = 8, routing included: `grouped` is what
the layer chooses there. The Mixtral block of transformers (`grouped_mm`, its default) holds the same weights and must
give the same output, but for tokens of close scores, before anything is timed; with one expert a token it has no router
weight and is only timed.

Needs a GPU and the extra ``bench``. Run: python examples/benchmarks/moe_layer_gpu.py          (about a minute)
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import Headline, entry, main, unavailable
from moe_layer import layer, mixtral, step
from torch import nn

from lightning_eff.moe import DenseFFN
from lightning_eff.reporting import Column, Table

TECHNIQUE = "Mixtures of experts"
WIDTH, TOKENS, ROUNDS = 1024, 16_384, 15


def milliseconds(contenders: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median of interleaved rounds of each."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(ROUNDS + 3):
        for name, run in contenders.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if round_ >= 3:
                found[name].append(begin.elapsed_time(end))
    return {name: statistics.median(times) for name, times in found.items()}


def kept(module: nn.Module, x: torch.Tensor) -> float:
    """MiB that a forward pass leaves for the backward pass."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = module(x.detach().requires_grad_())
    after = torch.cuda.memory_allocated()
    del y
    return (after - before) / 2**20


def tables() -> list[Table]:
    if not torch.cuda.is_available():
        unavailable("no GPU here")
    torch.manual_seed(0)
    place = {"device": "cuda", "dtype": torch.bfloat16}
    x, grad = torch.randn(1, TOKENS, WIDTH, **place), torch.randn(1, TOKENS, WIDTH, **place)
    dense = DenseFFN(WIDTH, 3 * WIDTH, "swiglu").to(**place)
    rows, memory = [], []
    for granularity in (1, 2, 4, 8, 16):
        ours = layer(granularity, width=WIDTH).to(**place)
        block = mixtral(ours, "grouped_mm").to(**place)
        if granularity > 1:
            output, expected = step(ours, x, grad)[0].float(), step(block, x, grad)[0].float()
            # the block's router computes in bfloat16: tokens of close scores go to other experts
            apart = ((output - expected).norm(dim=-1) / expected.norm(dim=-1)).median()
            assert apart < 0.02, f"G = {granularity}: outputs of a token {apart:.3f} apart"
        compiled = torch.compile(ours, fullgraph=True)
        modules = {"dense": dense, "ours": ours, "compiled": compiled, "HF grouped": block}
        least = milliseconds({name: partial(step, module, x, grad) for name, module in modules.items()})
        rows.append([granularity, least["dense"], *(least[name] / least["dense"] for name in list(modules)[1:])])
        memory.append([granularity, *(kept(module, x) for module in (dense, ours, block))])
    columns = ["G", Column("dense [ms]", ".3f")]
    columns += [Column(f"{name} [x dense]", ".2f") for name in ("ours", "ours, compiled", "HF grouped")]
    held = ["G", *(Column(f"{name} [MiB]", ".0f") for name in ("dense", "ours", "HF grouped"))]
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return [
        Table("Layer on a GPU", columns, rows, f"{device}; median of {ROUNDS} rounds, lower is better"),
        Table("Kept for the backward pass", held, memory, device),
    ]


def headlines(tables: list[Table]) -> list[Headline]:
    title, lines = "Layer on a GPU", []
    for granularity in (1, 4, 16):
        dense = entry(tables, title, granularity, "dense [ms]")
        ours, theirs = (dense * entry(tables, title, granularity, f"{who} [x dense]") for who in ("ours", "HF grouped"))
        work = f"layer of experts on a GPU, bfloat16, {TOKENS:,} tokens, granularity {granularity}"
        lines.append(Headline(work, ours, theirs, "transformers Mixtral, grouped_mm", "ms", aside=granularity == 4))
    return lines


if __name__ == "__main__":
    main(tables, headlines)
