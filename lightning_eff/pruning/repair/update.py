"""Correct the weights of a network on trial, so that it does what the whole network did, without training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_eff.batch import SplitBatch
from lightning_eff.pruning.repair.consumers import layers_to_correct
from lightning_eff.pruning.repair.moments import Moments, Solver
from lightning_eff.pruning.repair.norms import recalibrate_norms
from lightning_eff.pruning.repair.sequential import fit_in_order, write
from lightning_eff.pruning.repair.settings import Repair
from lightning_eff.surgery import ChannelGraph
from lightning_eff.surgery.trial import Trial


def repair(
    trial: Trial,
    batches: Sequence[Any],
    options: Repair,
    *,
    moments: Solver | None = None,
    split_batch: SplitBatch | None = None,
    final: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Write corrected weights, biases and norm statistics into the stand-ins of ``trial``.

    Depthwise convolutions read each channel alone and have nothing to correct; nor have layers that lose no input.

    Args:
        trial: the smaller network, open or closed.
        batches: raw calibration batches on the model's device.
        options: what to do.
        moments: of the whole network, for updates ``"gram"`` and ``"channel"``; collected here when not given.
        split_batch: ``batch -> (inputs, target)``, for batches of another form.
        final: the network is to be kept: ``"auto"`` then means ``"sequential"``.
        seed: of the sampled positions.

    Returns:
        For each corrected layer the part of its output that could not be given back, 0 to 1, on the calibration
        samples.

    Raises:
        ValueError: no calibration sample, or moments of another mode.
        RepairError: a layer cannot be solved; the error names it.
    """
    layers = layers_to_correct(trial)
    errors: dict[str, float] = {}
    update = options.update
    if update == "auto":
        update = "sequential" if final else "gram"
    if layers and update == "sequential":
        errors = fit_in_order(trial, layers, batches, options, split_batch=split_batch, seed=seed)
    elif layers and update != "none":
        if moments is None:
            with trial.lifted():
                moments = collect_moments(
                    trial.model, trial.dense_graph, batches, options, split_batch=split_batch, seed=seed
                )
        wanted = "channel" if update == "channel" else "kernel"
        if moments.mode != wanted:
            raise ValueError(f"expected moments of mode {wanted!r} for update={update!r}, got {moments.mode!r}")
        for path, (keep_in, keep_out) in layers.items():
            if path not in moments.skipped:
                found = moments.solve(path, keep_in, keep_out, options.ridge, fit_bias=options.fit_bias)
                write(trial, path, found)
                errors[path] = found.relative_error
    if options.bn_samples:
        with trial:
            recalibrate_norms(trial.model, batches, split_batch=split_batch, samples=options.bn_samples)
    return errors


def collect_moments(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Sequence[Any],
    options: Repair,
    *,
    split_batch: SplitBatch | None = None,
    seed: int = 0,
) -> Moments:
    """Collect the moments of the whole network that ``options`` needs."""
    return Moments.collect(
        model,
        graph,
        batches,
        split_batch=split_batch,
        samples=options.samples,
        positions=options.positions,
        mode="channel" if options.update == "channel" else "kernel",
        max_memory_mb=options.max_memory_mb,
        seed=seed,
    )
