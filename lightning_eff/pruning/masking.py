"""Channels that are masked during training and cut, or set to zero, only at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_eff.surgery import ChannelGraph, Gates, PruningPlan
from lightning_eff.surgery.graph import groups_from_dict


class Masks:
    """Gates that hold removed channels at zero; can be opened again in a resumed run, before any data is there.

    Attributes:
        state: the masked groups and their kept channels, plain Python for checkpoints; None when nothing is masked.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state = state
        self._gates: Gates | None = None

    def replace(self, graph: ChannelGraph, keep: Mapping[str, Sequence[int]]) -> None:
        """Mask all channels but ``keep`` from now on; takes effect when opened."""
        self.close()
        groups = [group for group in graph.to_dict()["groups"] if group["name"] in keep]
        self.state = {"groups": groups, "keep": {name: list(kept) for name, kept in keep.items()}}

    def open(self, model: nn.Module) -> None:
        """Put the gates on ``model``, unless they are there."""
        if self.state is None or self._gates is not None:
            return
        groups = groups_from_dict(self.state)
        values = {name: torch.zeros(groups[name].size) for name in self.state["keep"]}
        for name, kept in self.state["keep"].items():
            values[name][kept] = 1
        self._gates = Gates(groups, model, values)
        self._gates.__enter__()

    def close(self) -> None:
        """Take the gates off."""
        if self._gates is not None:
            self._gates.__exit__()
            self._gates = None

    def cap(self, config: Mapping[str, int]) -> dict[str, int]:
        """Limit kept counts to what is not masked yet."""
        kept = self.state["keep"] if self.state is not None else {}
        return {name: min(count, len(kept[name])) if name in kept else count for name, count in config.items()}

    def last(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rank channels that are masked already last, so that they stay removed."""
        out = dict(values)
        for name, kept in (self.state["keep"] if self.state is not None else {}).items():
            if name in out:
                gone = torch.ones(len(out[name]), dtype=torch.bool)
                gone[kept] = False
                out[name] = out[name].masked_fill(gone, -torch.inf)
        return out


def zero_readers(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> None:
    """Set the weights that read removed channels to zero: the masked network without masks."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, keep in plan.keep_masks(graph).items():
        for m in graph.groups[name].consumers:
            weight = modules[m.path].weight.data
            gone = m.index[~keep[m.root]].to(weight.device)
            if isinstance(modules[m.path], _ConvTransposeNd):
                weight[gone] = 0
            else:
                # Input channel c of a grouped convolution is column c % width of the filters of block c // width.
                blocks = weight.view(getattr(modules[m.path], "groups", 1), -1, *weight.shape[1:])
                width = weight.shape[1]
                blocks[gone // width, :, gone % width] = 0
