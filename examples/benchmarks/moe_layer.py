"""One mixture-of-experts layer against the dense network of equal active FLOPs and Hugging Face's Mixtral block.

Forward and backward pass of 2,048 tokens, d = 256, SwiGLU of width 768, E = 8, routing and top-k included, float32. The
Mixtral block (`grouped_mm`, its default, and `eager`) holds the same weights and must give the same output and gradient
before anything is timed; for one expert a token it has no router weight at all and only its time is compared. Besides:
what the backward pass keeps, unequal loads, and growth with experts and tokens.

Needs the extra ``bench``. Run: python examples/benchmarks/moe_layer.py          (about 3 minutes)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from harness import Headline, compare, entry, main, one_thread
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from lightning_eff.moe import DenseFFN, FineGrainedMoE
from lightning_eff.reporting import Column, Table

TECHNIQUE = "Mixtures of experts"
WIDTH, HIDDEN, TOKENS, RATE = 256, 768, 2048, 8
ROUNDS = 9
FLOPS = "dense network of as many FLOPs"
PEERS = {"HF grouped": "transformers Mixtral, grouped_mm", "HF eager": "transformers Mixtral, eager"}


def layer(
    granularity: int, rate: int = RATE, width: int = WIDTH, aux: bool = False, backend: str = "auto"
) -> FineGrainedMoE:
    """The layer with what a Mixtral block has: weights normalised, no norm, no loss of its own unless asked for."""
    return FineGrainedMoE(
        width,
        3 * width,
        expansion_rate=rate,
        granularity=granularity,
        activation="swiglu",
        output_norm="none",
        backend=backend,
        routing={"normalize_weights": granularity > 1, "weight_scale": 1},
        balance={} if aux else {"method": "none", "z_weight": 0.0},
    )


def mixtral(ours: FineGrainedMoE, experts: str) -> MixtralSparseMoeBlock:
    """The block with the weights of ``ours``."""
    n, h, d = ours.w2.shape
    config = MixtralConfig(
        hidden_size=d,
        intermediate_size=h,
        num_local_experts=n,
        num_experts_per_tok=ours.config.experts_per_token,
        experts_implementation=experts,
    )
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(ours.router)
        block.experts.gate_up_proj.copy_(ours.w1.transpose(1, 2))
        block.experts.down_proj.copy_(ours.w2.transpose(1, 2))
    return block


def step(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward pass with fresh gradients; return output and gradient by the tokens."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(grad)
    return y.detach(), x.grad


def batch(width: int = WIDTH, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    return torch.randn(1, tokens, width), torch.randn(1, tokens, width)


def seconds(contenders: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Least CPU seconds of each."""
    table = compare(contenders, reference=next(iter(contenders)), repeats=rounds, check=None)
    return {row[0]: row[2] for row in table.rows}


def check(ours: FineGrainedMoE, block: nn.Module, x: Tensor, grad: Tensor) -> None:
    if ours.config.granularity > 1:
        torch.testing.assert_close(step(ours, x, grad), step(block, x, grad), rtol=1e-3, atol=1e-5)


def against_dense(granularities: Sequence[int] = (1, 2, 4, 8, 16), rounds: int = ROUNDS) -> Table:
    dense, (x, grad) = DenseFFN(WIDTH, HIDDEN, "swiglu"), batch()
    names = ["ours", "ours, with losses", "ours, grouped", "HF grouped", "HF eager"]
    rows = []
    for granularity in granularities:
        ours = layer(granularity)
        with_losses, grouped = layer(granularity, aux=True), layer(granularity, backend="grouped")
        blocks = {name: mixtral(ours, kind) for name, kind in (("HF grouped", "grouped_mm"), ("HF eager", "eager"))}
        for block in blocks.values():
            check(ours, block, x, grad)
        modules = {"dense": dense, "ours": ours, "ours, with losses": with_losses, "ours, grouped": grouped, **blocks}
        contenders = {name: partial(step, module, x, grad) for name, module in modules.items()}
        least = seconds({**contenders, "dense again": contenders["dense"]}, rounds)
        base = min(least["dense"], least["dense again"])
        best = min(least["HF grouped"], least["HF eager"])
        rows.append([granularity, base, *(least[name] / base for name in names), least["ours"] / best])
    columns = ["G", Column("dense [s]", ".4f"), *(Column(f"{name} [x dense]", ".2f") for name in names)]
    columns.append(Column("ours [x best HF]", ".2f"))
    return Table(
        "Layer against the dense network", columns, rows, f"least CPU seconds of {rounds} rounds; lower is better"
    )


def kept_for_backward() -> Table:
    x, _ = batch()
    rows = []
    for granularity in (1, 4, 16):
        ours = layer(granularity)
        modules = {
            "dense": DenseFFN(WIDTH, HIDDEN, "swiglu"),
            "ours": ours,
            "HF grouped": mixtral(ours, "grouped_mm"),
            "HF eager": mixtral(ours, "eager"),
        }
        rows.append([granularity, *(_kept(module, x) / (TOKENS * WIDTH * 4) for module in modules.values())])
    columns = ["G", *(Column(f"{name} [x tokens]", ".1f") for name in ("dense", "ours", "HF grouped", "HF eager"))]
    return Table("Kept for the backward pass", columns, rows, "bytes over those of the layer's input")


def _kept(module: nn.Module, x: Tensor) -> int:
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(x.clone().requires_grad_())  # holds the graph, so that no storage is used twice
        del y
    return sum(size for pointer, size in kept.items() if pointer not in own)


def unequal_loads() -> Table:
    dense, rows = DenseFFN(WIDTH, HIDDEN, "swiglu"), []
    for granularity in (4, 16):
        ours, (x, grad) = layer(granularity), batch()
        with torch.no_grad():
            # one direction that all tokens share: experts along it get most of them
            x = x + 8 * nn.functional.normalize(ours.router.sum(0) + 3 * ours.router[0], dim=0)
        block = mixtral(ours, "grouped_mm")
        check(ours, block, x, grad)
        load = ours.route(x).assignment.load
        modules = {"dense": dense, "ours": ours, "HF grouped": block}
        least = seconds({name: partial(step, module, x, grad) for name, module in modules.items()})
        ratios = (least[name] / least["dense"] for name in ("ours", "HF grouped"))
        rows.append([granularity, (load.max() / load.float().mean()).item(), *ratios])
    columns = [
        "G",
        Column("max / mean load", ".1f"),
        Column("ours [x dense]", ".2f"),
        Column("HF grouped [x dense]", ".2f"),
    ]
    return Table("Unequal loads", columns, rows, f"least CPU seconds of {ROUNDS} rounds")


def growth() -> Table:
    cases = {
        **{f"n = {RATE * g} (G = {g})": (layer(g), batch()) for g in (1, 4, 16, 64)},
        **{f"n = {4 * rate} (E = {rate}, G = 4)": (layer(4, rate), batch()) for rate in (16, 32)},
        **{f"n = 32 (G = 4), {t:,} tokens": (layer(4), batch(tokens=t)) for t in (1024, 4096)},
        "n = 128 (G = 16), d = 128": (layer(16, width=128), batch(128)),
        "n = 128 (G = 16), d = 512": (layer(16, width=512), batch(512)),
    }
    least = seconds({name: partial(step, module, *tensors) for name, (module, tensors) in cases.items()}, rounds=5)
    return Table("Growth", ["case", Column("CPU time [s]", ".4f")], [list(row) for row in least.items()], "of ours")


def tables() -> list[Table]:
    torch.manual_seed(0)
    with one_thread():
        return [against_dense(), kept_for_backward(), unequal_loads(), growth()]


def short() -> list[Table]:
    torch.manual_seed(0)
    with one_thread():
        return [against_dense((1, 4, 16), rounds=5), kept_for_backward()]


def headlines(tables: list[Table]) -> list[Headline]:
    title, lines = "Layer against the dense network", []
    for granularity, slower, of_peer in ((1, 1.15, 1.03), (4, 1.22, 0.96), (16, 1.50, 0.62)):
        dense = 1e3 * entry(tables, title, granularity, "dense [s]")
        ours = dense * entry(tables, title, granularity, "ours [x dense]")
        theirs = {kind: dense * entry(tables, title, granularity, f"{kind} [x dense]") for kind in PEERS}
        kind = min(theirs, key=lambda name: theirs[name])
        work = f"layer of experts, forward and backward, {TOKENS:,} tokens, granularity {granularity}"
        aside = granularity == 4
        lines.append(Headline(work, ours, theirs[kind], PEERS[kind], "ms", target=1 / of_peer, aside=aside))
        lines.append(Headline(work, ours, dense, FLOPS, "ms", target=1 / slower, aside=aside))
    size = TOKENS * WIDTH * 4 / 1e6
    for granularity in (1, 16):
        held = [size * entry(tables, "Kept for", granularity, f"{name} [x tokens]") for name in ("ours", "dense")]
        work = f"kept for the backward pass, granularity {granularity}"
        lines.append(Headline(work, *held, FLOPS, "MB", target=1, aside=granularity == 1))
    return lines


if __name__ == "__main__":
    main(tables, headlines, short)
