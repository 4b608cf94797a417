"""Latency of dense and cut networks: half of all channels, 224 x 224, batch 1 and 32, one CPU thread.

Run: python examples/benchmarks/pruned_latency.py          (about 4 minutes)
"""

import copy
from collections.abc import Sequence

import torch
import torchvision
from harness import Headline, entry, machine, main, one_thread

from lightning_eff.reporting import Column, Table
from lightning_eff.surgery import ChannelGraph, PruningPlan, apply_plan, measure_latency

TECHNIQUE = "Cutting channels"
CASES = (("resnet18", 1), ("resnet18", 32), ("vgg16_bn", 1), ("vgg16_bn", 32))


def tables(cases: Sequence[tuple[str, int]] = CASES) -> list[Table]:
    """Cut half of the channels of every group and time both networks in interleaved rounds."""
    rows = []
    with one_thread():
        for name in ("resnet18", "vgg16_bn"):
            torch.manual_seed(0)
            dense = getattr(torchvision.models, name)(weights=None)
            example = torch.randn(2, 3, 224, 224)
            small = copy.deepcopy(dense)
            graph = ChannelGraph.from_model(small, example)
            keep = {group: range((graph.groups[group].size + 1) // 2) for group in graph.prunable}
            cut = apply_plan(small, PruningPlan(keep), example, graph=graph)
            for batch in (batch for network, batch in cases if network == name):
                repeats = {1: 20, 32: 3}[batch]
                images = torch.randn(batch, 3, 224, 224)
                times = measure_latency({"dense": dense, "cut": small}, images, warmup=1, repeats=repeats)
                rows.append(
                    (
                        name,
                        batch,
                        times["dense"].median,
                        times["cut"].median,
                        times["dense"].median / times["cut"].median,
                        cut.macs[0] / cut.macs[1],
                        cut.params[0] / cut.params[1],
                    )
                )
        caption = f"{machine()}; median CPU time of a forward pass, dense and cut interleaved"
    columns = [
        "network",
        "batch",
        Column("dense [ms]", ".1f"),
        Column("cut [ms]", ".1f"),
        Column("faster [x]", ".2f"),
        Column("fewer MACs [x]", ".2f"),
        Column("fewer parameters [x]", ".2f"),
    ]
    return [Table("Half of all channels removed", columns, rows, caption)]


def headlines(tables: list[Table]) -> list[Headline]:
    title = "Half of all channels removed"
    return [
        Headline(
            f"forward pass of {name} without half of its channels, batch {batch}",
            *(entry(tables, title, (name, batch), column) for column in ("cut [ms]", "dense [ms]")),
            "the whole network",
            unit="ms",
            aside=name != "resnet18",
        )
        for name, batch, *_ in tables[0].rows
    ]


if __name__ == "__main__":
    main(tables, headlines, lambda: tables(CASES[:3]))
