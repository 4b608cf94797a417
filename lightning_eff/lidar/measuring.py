"""A selection and what it is compared with, measured frame by frame on any of several processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_eff.lidar.contest import contestants
from lightning_eff.lidar.evaluation import LineEvaluation, measure_sets
from lightning_eff.lidar.frames import Frame, LinePixels
from lightning_eff.lidar.records import FrameId
from lightning_eff.lidar.study import LineStudy


class Measurement:
    """Errors of all contestants of a study on frames, each of which counts once.

    Args:
        study: has selected lines.
        own: lines that frames have for themselves, for every k; of every frame where the study selects by frame.

    Attributes:
        first: the frame that came first; None before any.
    """

    def __init__(self, study: LineStudy, own: Mapping[FrameId, Mapping[int, list[int]]] | None = None) -> None:
        self.own = {} if own is None else dict(own)
        self.first: Frame | None = None
        self._study = study
        self._contestants = contestants(study.known(), study.settings)
        self._errors: dict[FrameId, Tensor | None] = {}
        self._pixels: dict[FrameId, LinePixels] = {}

    def add(self, frame: Frame) -> None:
        """Measure a frame, unless it was measured here before; one without ground truth is left out."""
        self.first = self.first or frame
        if frame.id in self._errors:
            return
        sets: list[Sequence[int]] = []
        for one in self._contestants:
            sets.extend([self.own[frame.id][one.k or 0]] if one.sets is None else one.sets)
        study = self._study
        found = measure_sets(frame, sets, study.completion, study.settings.num_lines)
        self._errors[frame.id] = None if found is None else found[0]
        if found is not None:
            self._pixels[frame.id] = LinePixels.count([frame], study.settings.num_lines)

    def pixels(self) -> LinePixels:
        """Pixels of every line in the frames that all processes measured."""
        counted = {id_: one for part in self._study.gather(self._pixels) for id_, one in part.items()}
        none = LinePixels(torch.zeros(self._study.settings.num_lines, dtype=torch.int64))
        return sum(counted.values(), none)

    def evaluation(self, stage: str) -> LineEvaluation:
        """Put together what all processes measured.

        Args:
            stage: what the frames are of, for titles and names of files.
        """
        every = {id_: one for part in self._study.gather(self._errors) for id_, one in part.items()}
        known = {id_: one for id_, one in every.items() if one is not None}
        notes = []
        dynamic = self._study.settings.dynamic
        if dynamic is not None and dynamic.source == "oracle":
            notes.append("dynamic oracle: every frame's lines by its own ground truth, a bound and no method.")
        return LineEvaluation.of_frames(stage, self._contestants, known, skipped=len(every) - len(known), notes=notes)
