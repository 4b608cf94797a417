"""The cost of cutting and of counting, against torch-pruning.

All contenders cut the same channels out of a fresh copy and must give the same tensors. torch-pruning must trace every
copy; a channel graph names modules by path, so one trace serves all copies and all later cuts. Counting is compared
with what torch-pruning needs for one configuration: copy, prune, count.

Run: python examples/benchmarks/surgery.py          (about 2 minutes)
"""

import copy
import time

import torch
import torch_pruning as tp
import torchvision
from harness import Headline, compare, entry, machine, main, one_thread
from torch import Tensor, nn

from lightning_eff.reporting import Column, Table
from lightning_eff.surgery import ChannelGraph, PruningPlan, apply_plan

TECHNIQUE = "Cutting channels"


def _cut(name: str) -> Table:
    torch.manual_seed(0)
    model, x = getattr(torchvision.models, name)(weights=None), torch.randn(2, 3, 64, 64)
    graph = ChannelGraph.from_model(model, x)
    keep = {group: list(range(graph.groups[group].size // 2)) for group in graph.prunable}

    copies = [copy.deepcopy(model) for _ in range(3 * 5)]  # three contenders; checked, warmed up, three rounds

    def ours() -> dict[str, Tensor]:
        net = copies.pop()
        fresh = ChannelGraph.from_model(net, x, check=False)
        apply_plan(net, PruningPlan(keep), x, graph=fresh, verify=False)
        return net.state_dict()

    def traced_before() -> dict[str, Tensor]:
        net = copies.pop()
        apply_plan(net, PruningPlan(keep), x, graph=graph, verify=False)
        return net.state_dict()

    def peer() -> dict[str, Tensor]:
        net: nn.Module = copies.pop()
        dependency = tp.DependencyGraph().build_dependency(net, x, verbose=False)
        for group, kept in keep.items():
            gone = list(range(len(kept), graph.groups[group].size))
            dependency.get_pruning_group(net.get_submodule(group), tp.prune_conv_out_channels, gone).prune()
        return net.state_dict()

    return compare(
        {"torch-pruning": peer, "lightning_eff, traced anew": ours, "lightning_eff, traced once before": traced_before},
        reference="torch-pruning",
        title=f"Cut half of every layer of {name}; torch-pruning traces every copy",
        repeats=3,
    )


def _count() -> Table:
    rows = []
    for name in ("resnet18", "resnet50", "mobilenet_v2"):
        torch.manual_seed(0)
        model, x = getattr(torchvision.models, name)(weights=None), torch.randn(1, 3, 224, 224)
        graph = ChannelGraph.from_model(model, x, check=False)
        sizes = torch.tensor(list(graph.sizes.values()))
        config = (torch.rand(10_000, len(sizes)) * sizes).floor() + 1
        start = time.process_time()
        graph.macs(config)
        ours = (time.process_time() - start) / len(config)
        start = time.process_time()
        net = copy.deepcopy(model)
        dependency = tp.DependencyGraph().build_dependency(net, x, verbose=False)
        for group in graph.prunable:
            gone = list(range(graph.groups[group].size // 2))
            dependency.get_pruning_group(net.get_submodule(group), tp.prune_conv_out_channels, gone).prune()
        tp.utils.count_ops_and_params(net, x)
        peer = time.process_time() - start
        rows.append((name, peer * 1e3, ours * 1e6, peer / ours))
    columns = [
        "network",
        Column("torch-pruning: copy, prune, count [ms]", ".1f"),
        Column("closed form, one of 10,000 [us]", ".2f"),
        Column("faster [x]", ",.0f"),
    ]
    return Table("Multiply-adds of one configuration", columns, rows, machine())


def tables() -> list[Table]:
    """Measure cutting and counting."""
    with one_thread():
        return [_cut("resnet50"), _cut("densenet121"), _cut("mobilenet_v2"), _count()]


def headlines(tables: list[Table]) -> list[Headline]:
    lines = []
    for name, aim in (("resnet50", 3), ("densenet121", 20), ("mobilenet_v2", None)):
        title = f"Cut half of every layer of {name}"
        theirs = entry(tables, title, "torch-pruning", "median [s]")
        for ours in ("traced anew", "traced once before"):
            seconds = entry(tables, title, f"lightning_eff, {ours}", "median [s]")
            goal = aim if ours == "traced once before" else None
            lines.append(
                Headline(
                    f"{title}, {ours}",
                    seconds,
                    theirs,
                    "torch-pruning, traces every copy",
                    target=goal,
                    aside=name == "mobilenet_v2",
                )
            )
    title = "Multiply-adds of one configuration"
    theirs = 1e3 * entry(tables, title, "resnet50", "torch-pruning: copy, prune, count [ms]")
    ours = entry(tables, title, "resnet50", "closed form, one of 10,000 [us]")
    return [*lines, Headline(f"{title}, ResNet-50", ours, theirs, "torch-pruning", unit="us", target=1e4)]


if __name__ == "__main__":
    main(tables, headlines)
