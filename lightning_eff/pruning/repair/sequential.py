"""Layer after layer: weights that give the whole network's outputs from inputs in the corrected smaller network.

With ``x'`` what a layer reads in the smaller network whose earlier layers are corrected already, and ``y`` its output
in the whole network, ``W' = E[y x'^T] (E[x' x'^T] + ridge d I)^-1``. What earlier layers still get wrong is corrected
as well. Where all samples fit into one batch, one pass does it: each layer is fitted when the pass reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eff.batch import SplitBatch, batch_size, call_model, take
from lightning_eff.pruning.repair.calibration import Seen, calibration_inputs, exact_products, watched
from lightning_eff.pruning.repair.consumers import (
    computes_plainly,
    layouts_of,
    warn_of_few_rows,
    warn_of_skipped,
)
from lightning_eff.pruning.repair.layout import Layout
from lightning_eff.pruning.repair.least_squares import Penalty, about_zero, ridge_fit, solve_type, summed_type
from lightning_eff.pruning.repair.moments import Solution, fits_bias, solution
from lightning_eff.pruning.repair.scatter import Scatter
from lightning_eff.pruning.repair.settings import Repair
from lightning_eff.pruning.samples import Samples
from lightning_eff.surgery.state import quiet_model
from lightning_eff.surgery.trial import Trial


def fit_in_order(
    trial: Trial,
    layers: Mapping[str, tuple[Tensor, Tensor]],
    batches: Sequence[Any],
    options: Repair,
    *,
    split_batch: SplitBatch | None,
    seed: int,
) -> dict[str, float]:
    """Correct ``layers`` in the order in which the network runs them; return relative errors by path.

    Args:
        trial: the smaller network; its stand-ins are written to.
        layers: kept input and output positions of the layers to correct.
        batches: raw batches on the model's device.
        options: ridge, samples, positions, memory.
        split_batch: ``batch -> (inputs, target)``, for batches of another form.
        seed: of the positions.

    Raises:
        ValueError: there is not a single sample.
        RepairError: a layer cannot be solved.
    """
    model = trial.model
    inputs = list(calibration_inputs(batches, split_batch, options.samples))
    with quiet_model(model), torch.no_grad(), exact_products():
        with trial.lifted():
            graph, memory = trial.dense_graph, options.max_memory_mb
            layouts, skipped = layouts_of(model, graph, list(layers), "kernel", memory, together=False)
            scout = _Scout(model, layouts, _first_two(inputs[0]), options.positions, seed)
        skipped.update(scout.skipped)
        skipped.update({path: "it was not called" for path in layouts if path not in {**scout.calls, **skipped}})
        warn_of_skipped(skipped)
        samples = sum(map(batch_size, inputs))
        if 2 * scout.peak * samples <= memory * 2**20:
            inputs = _joined(batches, split_batch, samples)
        walk = _Walk(trial, layers, layouts, inputs, options, seed)
        for paths in _blocks(scout, samples, memory * 2**20):
            walk.fit(paths, scout.calls)
    warn_of_few_rows(walk.few)
    return walk.errors


class _Scout:
    """What a pass over two samples tells: order of the layers, how often each is called, bytes a sample."""

    def __init__(self, model: nn.Module, layouts: Mapping[str, Layout], inputs: Any, positions: int, seed: int) -> None:
        self.calls: dict[str, int] = {}
        self.targets: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        self.peak = 0.0

        def receive(path: str, seen: Seen) -> None:
            assert seen.output is not None
            if path in self.skipped:
                return
            if path not in self.calls and not computes_plainly(seen):
                self.skipped[path] = "its output is not what its weight gives (a forward of its own)"
                return
            self.calls[path] = self.calls.get(path, 0) + 1
            samples = len(seen.x)
            width = seen.layout.outputs if seen.layout.mode == "kernel" else seen.layout.inputs
            self.targets[path] = self.targets.get(path, 0.0) + 4.0 * width * seen.at.numel() / samples
            self.peak = max(self.peak, (seen.x.nbytes + seen.output.nbytes) / samples)

        with watched(model, layouts, receive, positions=positions, seed=seed):
            call_model(model, inputs)


def _first_two(inputs: Any) -> Any:
    """The first two samples."""
    return take(inputs, slice(0, 2))


def _joined(batches: Sequence[Any], split_batch: SplitBatch | None, samples: int) -> list[Any]:
    """One batch of all samples where they fit together, else batches as they were."""
    collected = Samples.collect(batches, samples, split_batch, groups=1)
    return [inputs for group in collected.groups for inputs, _ in group]


def _blocks(scout: _Scout, samples: int, limit: float) -> list[list[str]]:
    """Layers in order, as many together as their outputs fit into memory."""
    blocks: list[list[str]] = []
    held = limit + 1
    for path in scout.calls:
        needed = scout.targets[path] * samples
        if held + needed > limit:
            blocks.append([])
            held = 0.0
        blocks[-1].append(path)
        held += needed
    return blocks


class _Reached(Exception):
    """A forward pass has come as far as it is needed."""


class _Walk:
    """Fits layers of an open trial in order."""

    def __init__(
        self,
        trial: Trial,
        layers: Mapping[str, tuple[Tensor, Tensor]],
        layouts: Mapping[str, Layout],
        inputs: Sequence[Any],
        options: Repair,
        seed: int,
    ) -> None:
        self.trial, self.layers, self.layouts = trial, layers, layouts
        self.inputs, self.options, self.seed = inputs, options, seed
        self.errors: dict[str, float] = {}
        self.few: list[str] = []

    def fit(self, paths: Sequence[str], calls: Mapping[str, int]) -> None:
        """Fit consecutive layers."""
        with self.trial.lifted():
            targets = self._targets(paths)
        uneven = [path for path in paths if len(targets[path]) != calls[path] * len(self.inputs)]
        warn_of_skipped(dict.fromkeys(uneven, "it is not called equally often on every batch"))
        paths = [path for path in paths if path not in uneven]
        at_once = len(self.inputs) == 1
        with self.trial:
            for once, run in groupby(paths, key=lambda path: at_once and calls[path] == 1):
                if once:
                    self._fit_when_reached(list(run), targets)
                    continue
                for path in run:
                    # a layer that is called again reads what it gave itself: its first calls are fitted before
                    for number in sorted({1, calls[path]}):
                        self._fit_after_passes(path, targets[path], number, calls[path])

    def _targets(self, paths: Sequence[str]) -> dict[str, list[Tensor]]:
        """What each call of the layers gives in the whole network; of layers fitted by channel, what it reads."""
        found: dict[str, list[Tensor]] = {path: [] for path in paths}

        def receive(path: str, seen: Seen) -> None:
            if seen.layout.mode == "kernel":
                found[path].append(seen.output_rows()[:, self.layers[path][1].to(seen.x.device)])
            else:
                found[path].append(torch.cat(list(seen.rows()), 1).transpose(0, 1).flatten(1))

        layouts = {path: self.layouts[path] for path in paths}
        with self._watched(layouts, receive):
            for inputs in self.inputs:
                call_model(self.trial.model, inputs)
        return found

    def _fit_when_reached(self, paths: Sequence[str], targets: Mapping[str, list[Tensor]]) -> None:
        """Fit layers in one pass over one batch, each just before it runs."""
        sums = {path: self._sums(path) for path in paths}

        def receive(path: str, seen: Seen) -> None:
            sums[path].add(seen, targets[path][0])
            self._write(path, sums.pop(path))
            if not sums:
                raise _Reached

        with self._watched({path: one.smaller for path, one in sums.items()}, receive, before=True):
            self._run(self.inputs[0])

    def _fit_after_passes(self, path: str, targets: Sequence[Tensor], number: int, calls: int) -> None:
        """Fit a layer to the first ``number`` of its calls in every batch."""
        sums = self._sums(path)
        done = 0

        def receive(path: str, seen: Seen) -> None:
            nonlocal done
            sums.add(seen, targets[calls * (done // number) + done % number])
            done += 1
            if done % number == 0:
                raise _Reached

        with self._watched({path: sums.smaller}, receive, before=True):
            for inputs in self.inputs:
                self._run(inputs)
        self._write(path, sums)

    def _run(self, inputs: Any) -> None:
        with suppress(_Reached):
            call_model(self.trial.model, inputs)

    def _sums(self, path: str) -> _Sums:
        return _Sums(self.trial, path, self.layouts[path], self.layers[path])

    def _watched(self, layouts: Mapping[str, Layout], receive: Any, before: bool = False) -> Any:
        positions, seed = self.options.positions, self.seed
        return watched(self.trial.model, layouts, receive, positions=positions, seed=seed, before=before)

    def _write(self, path: str, sums: _Sums) -> None:
        found = sums.solution(self.options)
        self.errors[path] = found.relative_error
        if sums.count < sums.smaller.columns:
            self.few.append(path)
        write(self.trial, path, found)


class _Sums:
    """Sums over the rows that one layer of the smaller network reads, and over the outputs it should give."""

    def __init__(self, trial: Trial, path: str, layout: Layout, keep: tuple[Tensor, Tensor]) -> None:
        self.path, self.dense, self.smaller = path, layout, layout.cut(*keep)
        with trial.lifted():
            module = trial.model.get_submodule(path)
            self.weight = module.get_parameter("weight").detach()
            bias = module._parameters.get("bias")
        device, kept = self.weight.device, keep[1].nonzero().flatten()
        self.bias = None if bias is None else bias.detach()[kept.to(device)]
        self.summed = summed = summed_type(self.weight)
        if layout.mode == "channel":
            rows = layout.kept_rows(keep[1]).nonzero().flatten().to(device)
            self.matrix = layout.matrix(self.weight)[:, rows].to(summed)
        kind = solve_type(self.smaller.columns, self.summed)
        self.inputs, self.outputs = Scatter(kind), Scatter(kind)
        self.energy: Tensor | None = None

    @property
    def count(self) -> float:
        """Rows so far."""
        return self.inputs.count

    def add(self, seen: Seen, targets: Tensor) -> None:
        """Add one call, with what it gives (or, by channel, reads) in the whole network at the same positions."""
        first = 0
        for x in seen.rows():
            y = self._wanted(targets[first : first + x.shape[1]].to(x))
            first += x.shape[1]
            self.inputs.add(x, x)
            self.outputs.add(y, x)
            energy = y.double().square().sum(1)
            self.energy = energy if self.energy is None else self.energy + energy

    def _wanted(self, targets: Tensor) -> Tensor:
        """Outputs without bias ``[J, n, R]``."""
        if self.dense.mode == "kernel" and self.bias is not None:
            targets = targets - self.bias
        blocks = targets.reshape(len(targets), self.dense.blocks, -1).transpose(0, 1)
        return blocks if self.dense.mode == "kernel" else blocks @ self.matrix.to(blocks).transpose(1, 2)

    def solution(self, options: Repair) -> Solution:
        """Solve for the layer's weights."""
        assert self.energy is not None
        output_mean, mean = self.outputs.means
        gram, cross, energy = self.inputs.covariance(), self.outputs.covariance(), self.energy / self.count
        centre = fits_bias(self.dense, self.bias, options.fit_bias)
        if centre:
            energy = energy - output_mean.square()
        else:
            gram, cross = about_zero(gram, mean, mean), about_zero(cross, output_mean, mean)
        scale = max(0.0, float(gram.diagonal(dim1=-2, dim2=-1).mean()))
        penalty = Penalty(options.ridge, scale, self.summed)
        fit = ridge_fit(gram, cross, float(energy.sum()), penalty, self.path)
        means = (mean, output_mean) if centre else None
        return solution(self.smaller, fit.weights, self.weight, self.bias, means, fit.relative_error)


def write(trial: Trial, path: str, found: Solution) -> None:
    """Write corrected weights into the stand-ins of a trial."""
    for name, value in (("weight", found.weight), ("bias", found.bias)):
        stand_in = trial.tensor(path, name)
        if value is not None and stand_in is not None:
            with torch.no_grad():
                stand_in.copy_(value)
