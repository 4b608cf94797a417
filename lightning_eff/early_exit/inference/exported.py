"""Run a network that :func:`~lightning_eff.early_exit.inference.export.export_early_exit` has written.

A ``.pt2`` file holds one program, which other runtimes of ``torch.export`` can run too: it returns logits, exit and
confidence. A ``.zip`` file holds a program a stage, between which this module lets samples leave, and
``early_exit.json``, which tells how. Shapes: ``B`` batch, ``C`` classes, ``E`` exits.
"""

from __future__ import annotations

import io
import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_eff.batch import batch_size
from lightning_eff.documents import reading
from lightning_eff.early_exit.attaching.features import BatchDim, select
from lightning_eff.early_exit.inference.leaving import ExitOutput
from lightning_eff.early_exit.inference.stream import Departures

MANIFEST = "early_exit.json"
VERSION = 1


def load_early_exit(path: str | Path) -> ExportedNetwork:
    """Load what :func:`~lightning_eff.early_exit.inference.export.export_early_exit` has written.

    Returns:
        A callable that takes what the backbone took and returns :class:`ExitOutput`.

    Raises:
        ValueError: the file holds something else.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"expected a file that export_early_exit has written, got {path}: it is no archive")
    with reading(f"{path} holds no exported network"):
        with zipfile.ZipFile(path) as archive:
            if MANIFEST in archive.namelist():
                return _InStages(json.loads(archive.read(MANIFEST)), archive)
            if not any(name.endswith(MANIFEST) for name in archive.namelist()):  # a checkpoint, another program
                raise ValueError(f"expected a file that export_early_exit has written, got one without {MANIFEST}")
        extra = {MANIFEST: ""}
        program = torch.export.load(path, extra_files=extra)
        return _InOne(json.loads(extra[MANIFEST]), program)


class ExportedNetwork(ABC):
    """A network as it was when it was written, called as its backbone was.

    Attributes:
        manifest: what was written beside the programs: exits, policy, thresholds (as scores), temperatures.
    """

    def __init__(self, manifest: dict[str, Any]) -> None:
        if manifest["version"] > VERSION:
            raise ValueError(f"the file has version {manifest['version']}, this package reads up to {VERSION}")
        self.manifest = manifest

    @torch.inference_mode()
    def __call__(self, *args: Any, **kwargs: Any) -> ExitOutput:
        """Answer a batch, of any size."""
        if batch_size((args, kwargs)) == 0:
            return Departures().in_order(self.manifest["num_classes"], torch.device(self.manifest["device"]))
        return self._answer(args, kwargs)

    @abstractmethod
    def _answer(self, args: Sequence[Any], kwargs: dict[str, Any]) -> ExitOutput: ...


class _InOne(ExportedNetwork):
    def __init__(self, manifest: dict[str, Any], program: torch.export.ExportedProgram) -> None:
        super().__init__(manifest)
        self._run = program.module()

    def _answer(self, args: Sequence[Any], kwargs: dict[str, Any]) -> ExitOutput:
        return ExitOutput(*self._run(*args, **kwargs))


class _InStages(ExportedNetwork):
    """Each stage takes carried tensors and policy state; it returns logits and scores of its output, and both again."""

    def __init__(self, manifest: dict[str, Any], archive: zipfile.ZipFile) -> None:
        super().__init__(manifest)
        programs = [torch.export.load(io.BytesIO(archive.read(stage["file"]))) for stage in manifest["stages"]]
        # later stages get what earlier ones return, also one sample, which guards may shut out though all goes well
        self._stages = [program.module(check_guards=k == 0) for k, program in enumerate(programs)]
        self._carried = [
            [None if where is None else BatchDim(*where) for where in stage["carried"]] for stage in manifest["stages"]
        ]

    def _answer(self, args: Sequence[Any], kwargs: dict[str, Any]) -> ExitOutput:
        departures, last = Departures(), len(self._stages) - 1
        samples = departures.expect(batch_size((args, kwargs)), torch.device(self.manifest["device"]))
        logits, scores, live, state = self._stages[0](*args, **kwargs)
        for k in range(last + 1):
            if k:
                logits, scores, live, state = self._stages[k](live, state)
            threshold = None if k == last else self.manifest["thresholds"][k]
            if k == last:
                departures.add(samples, logits, k, scores)
            elif threshold is not None:
                fire = scores >= float(threshold)
                gone = fire.nonzero().squeeze(1)
                if len(gone):
                    departures.add(samples[gone], logits[gone], k, scores[gone])
                    stay = (~fire).nonzero().squeeze(1)
                    if not len(stay):
                        break
                    samples, state = samples[stay], [leaf[stay] for leaf in state]
                    live = _select(live, self._carried[k + 1], stay)
        return departures.in_order(self.manifest["num_classes"], samples.device)


def _select(live: Sequence[Tensor], carried: Sequence[BatchDim | None], rows: Tensor) -> list[Tensor]:
    return [t if where is None else select(t, where, rows) for t, where in zip(live, carried, strict=True)]
