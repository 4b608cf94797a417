"""Write a network with exits as programs that run without its Python classes, and that really stop.

Samples can leave inside of one program: rows are selected by indices that depend on the data. ``torch.export`` must
reason about how many there are and cannot where there may be none, hence spare rows that never leave are added to the
batch. Shapes: ``B`` batch, ``C`` classes, ``E`` exits.
"""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from lightning_eff.arguments import check_choice
from lightning_eff.batch import batch_size
from lightning_eff.early_exit.attaching.probe import samples
from lightning_eff.early_exit.inference.exported import MANIFEST, VERSION, ExportedNetwork, load_early_exit
from lightning_eff.early_exit.inference.graph_cut import CutError, brief, trace
from lightning_eff.early_exit.inference.leaving import select_from_all
from lightning_eff.early_exit.inference.policies import State
from lightning_eff.early_exit.inference.stages import TRACED, Stage, Stages
from lightning_eff.surgery.state import quiet_model

if TYPE_CHECKING:
    from lightning_eff.early_exit.network import MultiExitNetwork

__all__ = ["export_early_exit", "load_early_exit"]

SPARE = (1, 2)  # rows added to a batch; two also rule out a batch of one, which some operators treat apart
# of the largest logit, and distance of a score from a threshold at which it may fall on either side: kernels round
# differently for other batch sizes; the second is for types of 16 bits
TOLERANCES = 1e-4, 5e-2
_BATCH = Dim("B", min=1)
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_StageResult = tuple[Tensor | None, Tensor | None, list[Tensor], list[Tensor]]


def export_early_exit(
    network: MultiExitNetwork, path: str | Path, example: Any, mode: Literal["single", "stages"] = "single"
) -> Path:
    """Write ``network`` with its present thresholds; disabled exits are left out.

    The file is read back and compared with the network before it takes its place; nothing half-written is left.

    Args:
        network: built; left as it was.
        path: ends in ``.pt2`` for one program, in ``.zip`` for stages.
        example: inputs, one sample or more: a tensor, a tuple of arguments or a dict of keyword arguments. The file
            serves any batch size, but only these shapes otherwise.
        mode: ``"single"``, one program; where that fails, stages are written to the path with the ending ``.zip``, and
            a warning tells why. ``"stages"``, one program a stage; thresholds stand in its ``early_exit.json``.

    Returns:
        Path of the file, for :func:`load_early_exit`.

    Raises:
        ValueError: another ending or mode; as :class:`CutError`, the backbone cannot be exported at all.
        RuntimeError: what was written answers otherwise than the network.
    """
    if not hasattr(network, "stages"):
        raise TypeError(
            f"expected a MultiExitNetwork, got {type(network).__name__}; of an EarlyExitModule, its .network"
        )
    path = Path(path)
    endings = {"single": ".pt2", "stages": ".zip"}
    check_choice("mode", mode, endings)
    if path.suffix != endings[mode]:
        raise ValueError(f"expected a path that ends in {endings[mode]} for mode={mode!r}, got {path.name!r}")
    if isinstance(example, dict):
        inputs: Inputs = (), example
    else:
        inputs = (tuple(example) if isinstance(example, tuple | list) else (example,)), {}
    with quiet_model(network), torch.no_grad():
        stages = network.stages(inputs)
        if mode == "single":
            try:
                return _write(network, inputs, path, lambda file: _write_single(network, stages, inputs, file))
            except (CutError, RuntimeError) as error:
                path = path.with_suffix(".zip")
                warnings.warn(f"the network is written in stages to {path}, not as one program: {error}", stacklevel=2)
        return _write(network, inputs, path, lambda file: _write_stages(network, stages, inputs, file))


def _write(network: MultiExitNetwork, inputs: Inputs, path: Path, write: Callable[[Path], None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        write(file)
        _check(load_early_exit(file), network, inputs)
        os.replace(file, path)
    return path


def _write_single(network: MultiExitNetwork, stages: Stages, inputs: Inputs, file: Path) -> None:
    args, kwargs, shapes = _example(stages, inputs)
    for spare in SPARE:
        try:
            program = trace(_OneProgram(network, stages, spare), args, kwargs, shapes)
        except CutError:
            if spare == SPARE[-1]:
                raise
        else:
            break
    torch.export.save(program, file, extra_files={MANIFEST: json.dumps(_manifest(network))})


def _write_stages(network: MultiExitNetwork, stages: Stages, inputs: Inputs, file: Path) -> None:
    args, kwargs, shapes = _example(stages, inputs)
    live, state = stages.inputs(args, kwargs), None
    written = []
    with zipfile.ZipFile(file, "w") as archive:
        for k, stage in enumerate(stages.stages):
            program = _StageProgram(network, stages, k, state)
            buffer, name = io.BytesIO(), f"stage{k}.pt2"
            torch.export.save(trace(program, args, kwargs, shapes), buffer)
            archive.writestr(name, buffer.getvalue())
            written.append({"file": name, "carried": [where and list(where) for where in stage.carried]})
            if k + 1 < len(stages):
                _, _, live, state = program.run(live, state)
                args, kwargs = (live, _leaves(state)), {}
                sizes = [where and {where.dim: _rows(where.factor)} for where in stages.batch_dims[k + 1]]
                shapes = (sizes, [{0: _BATCH} for _ in _leaves(state)]), {}
        archive.writestr(MANIFEST, json.dumps({**_manifest(network), "stages": written}, indent=1))


def _example(stages: Stages, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Inputs to trace with, and which of their dimensions are the batch."""
    leaves = stages.flatten(*samples(inputs, TRACED, distinct=True))
    assert leaves is not None
    args, kwargs = pytree.tree_unflatten(leaves, stages.inputs_spec)
    shapes = [{0: _BATCH} if batched else None for batched in stages.batched]
    return args, kwargs, pytree.tree_unflatten(shapes, stages.inputs_spec)


def _manifest(network: MultiExitNetwork) -> dict[str, Any]:
    rule = network.rule
    return {
        "version": VERSION,
        "exits": list(network.exits),
        "num_classes": network.num_classes,
        "policy": network.policy.name,
        # as scores; infinity is no number in JSON
        "thresholds": [
            None if score == math.inf else score if math.isfinite(score) else str(score) for score in rule.thresholds
        ],
        "temperatures": list(rule.temperatures),
        "device": str(network.score_thresholds.device),
    }


class _OneProgram(nn.Module):
    """The whole network.

    Args:
        network: its heads and rule.
        stages: its backbone.
        spare: rows that are added to the batch and never leave.
    """

    def __init__(self, network: MultiExitNetwork, stages: Stages, spare: int) -> None:
        super().__init__()
        self.backbone, self.heads = network.backbone, network.heads
        self.stages, self.rule, self.spare, self.output_of = stages, network.rule, spare, network.output_of
        self.forward = _called_as(network.backbone, self.run)

    def run(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, exit and confidence."""
        stages, rule, last = self.stages, self.rule, len(self.stages) - 1
        live, batch = self._with_spare_rows(stages.flatten(args, kwargs) or [])
        rows = torch.arange(batch + self.spare, device=live[0].device)
        answers: tuple[Tensor, Tensor, Tensor] | None = None
        state: State = None
        for k in range(last + 1):
            if k < last:
                feature, live = stages[k](*live)
                if not rule.enabled(k):
                    continue
                logits = self.heads[k](feature)
            else:
                logits = self.output_of(stages[k](*live))
            scores, state = rule.score(logits, k, state)
            here = logits, torch.full_like(rows, k), scores
            # everybody gets the answer of this output; who goes on will get a later one
            if answers is None:
                answers = here
            else:
                answers = tuple(old.index_copy(0, rows, new) for old, new in zip(answers, here, strict=True))  # type: ignore[assignment]
            if k < last:
                stay = ((scores < rule.thresholds[k]) | (rows >= batch)).nonzero().squeeze(1)
                left = stay.shape[0]
                torch._check(left >= self.spare)
                torch._check(left <= batch + self.spare)
                rows, live = rows[stay], stages.select(k + 1, live, stay)
                state = pytree.tree_map(lambda leaf: leaf if leaf is None else leaf[stay], state)  # noqa: B023
        assert answers is not None
        logits, exit_index, scores = answers
        return logits[:batch], exit_index[:batch], scores[:batch]

    def _with_spare_rows(self, leaves: Sequence[Any]) -> tuple[list[Tensor], int]:
        live, batch = [], 0
        for leaf, batched in zip(leaves, self.stages.batched, strict=True):
            if batched:
                batch = leaf.shape[0]
                leaf = torch.cat([leaf, leaf[:1].expand(self.spare, *leaf.shape[1:])])
            if isinstance(leaf, Tensor):
                live.append(leaf)
        return live, batch


class _StageProgram(nn.Module):
    """One stage, with the head behind it; it holds the parameters it needs and no others.

    Args:
        network: its heads and rule.
        stages: its backbone.
        k: number of the stage.
        state: what the policy remembers of samples that come in, in which structure.
    """

    def __init__(self, network: MultiExitNetwork, stages: Stages, k: int, state: State) -> None:
        super().__init__()
        self.part = _part(network.backbone, stages.stages[k])
        self.stages = replace(stages, backbone=self.part, stages=[stages.stages[k]], _bound=[])
        self.k, self.rule, self.output_of = k, network.rule, network.output_of
        self.enabled = k == len(stages) - 1 or self.rule.enabled(k)
        self.head = network.heads[k] if self.enabled and k < len(stages) - 1 else nn.Identity()
        self.state = pytree.tree_structure(state)
        self.forward = _called_as(network.backbone, self.first) if k == 0 else self.later

    def first(self, *args: Any, **kwargs: Any) -> _StageResult:
        """The first stage, called as the backbone."""
        leaves = self.stages.flatten(args, kwargs) or []
        logits, scores, live, state = self.run([leaf for leaf in leaves if isinstance(leaf, Tensor)], None)
        return logits, scores, live, _leaves(state)

    def later(self, live: list[Tensor], state: list[Tensor]) -> _StageResult:
        """A later stage; returns logits, scores, tensors to carry on, and the leaves of the state."""
        logits, scores, live, left = self.run(live, pytree.tree_unflatten(state, self.state) if state else None)
        return logits, scores, live, _leaves(left)

    def run(self, live: list[Tensor], state: State) -> tuple[Tensor | None, Tensor | None, list[Tensor], State]:
        """As :meth:`later`, with the state in its own structure."""
        if self.stages.stages[0].feature is None:
            logits, live = self.output_of(self.stages[0](*live)), []
        else:
            feature, live = self.stages[0](*live)
            if not self.enabled:
                return None, None, live, state
            logits = self.head(feature)
        scores, state = self.rule.score(logits, self.k, state)
        return logits, scores, live, state


def _called_as(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with the signature of a module: torch.export names inputs by it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    forward.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]
    return forward


def _part(backbone: nn.Module, stage: Stage) -> nn.Module:
    """Return a module with the parameters and buffers that one stage reads, under their names."""
    part = nn.Module()
    for source in stage.sources:
        if isinstance(source, Tensor):
            continue
        path, _, name = source.rpartition(".")
        place, owner = part, backbone.get_submodule(path)
        for step in filter(None, path.split(".")):
            if step not in place._modules:
                place.add_module(step, nn.Module())
            place = place.get_submodule(step)
        if name in owner._parameters:
            place.register_parameter(name, owner._parameters[name])
        else:
            place.register_buffer(name, owner._buffers[name])
    return part


def _rows(factor: int) -> Any:
    return _BATCH if factor == 1 else factor * _BATCH


def _leaves(state: State) -> list[Tensor]:
    return [] if state is None else pytree.tree_leaves(state)


def _check(loaded: ExportedNetwork, network: MultiExitNetwork, inputs: Inputs) -> None:
    """Compare a file that was read back with the network, at several batch sizes."""
    rule, last = network.rule, network.num_exits
    for size in sorted({1, 2, max(3, batch_size(inputs))}):
        args, kwargs = samples(inputs, size, distinct=True)
        outputs = torch.stack(network(*args, **kwargs))
        tolerance = TOLERANCES[outputs.element_size() < 4]
        outputs = outputs.float()
        try:
            got = loaded(*args, **kwargs)
        except Exception as error:  # runtimes fail in any way
            raise RuntimeError(f"the exported network fails for a batch of {size}: {brief(error)}") from error
        expected = select_from_all(rule, list(outputs))
        chosen = outputs[got.exit_index, torch.arange(size, device=outputs.device)]
        off = float((got.logits - chosen).abs().max() / chosen.abs().max().clamp(min=1e-12))
        scores, state = torch.zeros(last + 1, size, device=outputs.device), None
        for k in [k for k in range(last) if rule.enabled(k)]:
            scores[k], state = rule.score(outputs[k], k, state)
        for i in (got.exit_index != expected.exit_index).nonzero().flatten().tolist():
            first = int(min(got.exit_index[i], expected.exit_index[i]))
            if abs(float(scores[first, i]) - rule.thresholds[first]) > tolerance:
                off = math.inf
        if not off <= tolerance:
            raise RuntimeError(
                f"the exported network answers a batch of {size} otherwise than the network, relative error {off:.2g}"
            )
