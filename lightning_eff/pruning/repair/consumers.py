"""Which layers read channels that may be removed, and how each is corrected."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_eff.pruning.repair.calibration import Seen
from lightning_eff.pruning.repair.layout import Layout, Mode, unit_features
from lightning_eff.pruning.repair.least_squares import DOUBLE_UP_TO
from lightning_eff.surgery import ChannelGraph
from lightning_eff.surgery.trial import Trial

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def readers(graph: ChannelGraph, groups: Iterable[str]) -> list[str]:
    """Paths of the layers that read one of ``groups``, each once, in the order of the groups."""
    return list(dict.fromkeys(m.path for name in groups for m in graph.groups[name].consumers))


def layers_to_correct(trial: Trial) -> dict[str, tuple[Tensor, Tensor]]:
    """Kept input and output positions, bool ``[in]`` and ``[out]``, of every layer that loses inputs."""
    found = {}
    with trial.lifted():
        for path in readers(trial.dense_graph, trial.keep):
            layout = Layout.of(trial.model.get_submodule(path), "kernel")
            keep_in = _full(trial.axes.get((path, "in")), layout.inputs)
            if not keep_in.all():
                found[path] = keep_in, _full(trial.axes.get((path, "out")), layout.outputs)
    return found


def _full(mask: Tensor | None, length: int) -> Tensor:
    full = torch.ones(length, dtype=torch.bool)
    if mask is not None:
        full[: len(mask)] = mask
    return full


def layouts_of(
    model: nn.Module,
    graph: ChannelGraph,
    paths: Sequence[str],
    mode: Mode,
    max_memory_mb: float,
    *,
    together: bool = True,
) -> tuple[dict[str, Layout], dict[str, str]]:
    """Choose how the moments of each layer are held, so that they fit into memory.

    Transposed convolutions are corrected channel by channel, and so are the largest layers where all together would
    take more than ``max_memory_mb``; one warning names those.

    Args:
        model: the network.
        graph: its channel graph.
        paths: of the layers.
        mode: the wanted mode.
        max_memory_mb: limit on the moments.
        together: the moments of all layers are held at once, not one after the other.

    Returns:
        Layouts by path, and for the layers that cannot be corrected the reason.
    """
    layouts: dict[str, Layout] = {}
    for path in paths:
        module = model.get_submodule(path)
        transposed = isinstance(module, _ConvTransposeNd)
        if isinstance(module, nn.Linear | _ConvNd):
            layouts[path] = _layout(graph, path, module, "channel" if transposed else mode)
    limit = max_memory_mb * 2**20
    skipped: dict[str, str] = {}
    narrowed = []
    for path in sorted(layouts, key=lambda path: -_bytes(layouts[path])):
        held = sum(map(_bytes, layouts.values())) if together else _bytes(layouts[path])
        if held <= limit:
            continue
        layouts[path] = _layout(graph, path, model.get_submodule(path), "channel")
        if _bytes(layouts[path]) <= limit:
            narrowed.append(path)
        else:
            del layouts[path]
            skipped[path] = f"its moments do not fit into {max_memory_mb:g} MB"
    if narrowed:
        warnings.warn(
            f"the moments of all layers take more than max_memory_mb={max_memory_mb:g}: {', '.join(narrowed)} are "
            "corrected channel by channel, which is less exact",
            stacklevel=3,
        )
    return {path: layouts[path] for path in paths if path in layouts}, skipped


def _layout(graph: ChannelGraph, path: str, module: nn.Module, mode: Mode) -> Layout:
    if mode == "kernel" or not isinstance(module, nn.Linear):
        return Layout.of(module, mode)
    read = [m for group in graph.groups.values() for m in group.members if (m.path, m.axis) == (path, "in")]
    features = unit_features(module.in_features, [(m.index, m.root) for m in read])
    return Layout.of(module, mode if features is not None else "kernel", features)


def _bytes(layout: Layout) -> int:
    """Memory of the second moments and their products with the weights."""
    k, outputs = layout.columns, layout.outputs // layout.blocks * layout.rows_per_output
    return layout.blocks * k * (k + outputs) * (8 if k <= DOUBLE_UP_TO else 4)


def computes_plainly(seen: Seen) -> bool:
    """Tell whether a layer gave what its weight and bias alone give: some subclasses do more in their forward."""
    module, x, output = seen.module, seen.x[:1], seen.output
    assert output is not None
    kind: Any = next(cls for cls in type(module).__mro__ if cls in _PLAIN)
    weight = module.get_parameter("weight")
    expected = kind.forward(module, x.to(weight.dtype))
    if expected.shape != output[:1].shape:  # a transposed convolution that was told its output size
        return isinstance(module, _ConvTransposeNd)
    difference = (expected.float() - output[:1].float()).abs().max()
    return bool(difference <= 1e-2 * expected.abs().max().float() + 1e-6) or not bool(torch.isfinite(expected).all())


def warn_of_skipped(skipped: Mapping[str, str]) -> None:
    """Say in one warning which layers keep their weights as they are, and why."""
    if skipped:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in skipped.items())
        warnings.warn(f"some layers that lose inputs are not corrected: {reasons}", stacklevel=3)


def warn_of_few_rows(few: Sequence[str]) -> None:
    """Say in one warning which layers have more columns than rows."""
    if few:
        warnings.warn(
            f"fewer calibration rows than weights per output in {', '.join(few)}: their correction rests on the ridge; "
            "raise samples or positions",
            stacklevel=3,
        )
