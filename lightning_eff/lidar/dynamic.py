"""Lines of single frames: by their own values, by those of the frame before, or predicted from the image.

Shapes: `n` candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from lightning_eff.lidar.choosing import choose
from lightning_eff.lidar.frames import Frame
from lightning_eff.lidar.game import FrameGame
from lightning_eff.lidar.predictor import thumbnail
from lightning_eff.lidar.records import FrameId
from lightning_eff.lidar.report import in_order
from lightning_eff.lidar.settings import Dynamic
from lightning_eff.lidar.study import LineStudy
from lightning_eff.lidar.values import LineEstimation


def lines_by_frame(
    study: LineStudy, dynamic: Dynamic, frames: Iterable[Frame], shared: Callable[[int], list[int]]
) -> dict[FrameId, dict[int, list[int]]]:
    """For every frame, those of all processes, its own lines for every k of the study.

    Args:
        study: has selected lines; values of frames that it knows are not estimated again.
        dynamic: where a frame's values come from.
        frames: of this process.
        shared: lines for k where there are no values to go by.

    Raises:
        ValueError: a frame has no sequence, and `dynamic` goes by the frame before.
    """
    sizes = list(study.settings.k)
    if dynamic.source == "predictor":
        mine = {frame.id: predicted_lines(study, frame.rgb, sizes) for frame in frames}
        return {id_: lines for part in study.gather(mine) for id_, lines in part.items()}
    values: dict[FrameId, tuple[str | None, Tensor | None]] = {}
    known = study.known().per_frame
    for frame in frames:
        if dynamic.source == "previous" and frame.sequence is None:
            raise ValueError(
                f'Dynamic("previous") needs to know which frames follow each other, frame {frame.id!r} has no '
                "sequence: add `sequence` (and `sample_id`s in the drive's order) to the batches"
            )
        if frame.id not in values:
            own = known.get(frame.id)
            values[frame.id] = frame.sequence, values_of(study, frame) if own is None else own
    every = {id_: entry for part in study.gather(values) for id_, entry in part.items()}
    chosen: dict[FrameId, dict[int, list[int]]] = {}
    before: dict[str | None, Tensor] = {}
    for id_ in in_order(every):
        sequence, own = every[id_]
        used = own if dynamic.source == "oracle" else before.get(sequence)
        if sequence is not None and own is not None:
            before[sequence] = own
        chosen[id_] = {k: shared(k) for k in sizes} if used is None else _chosen(study, used, sizes)
    return chosen


def predicted_lines(study: LineStudy, rgb: Tensor, sizes: Sequence[int]) -> dict[int, list[int]]:
    """Lines of one image `[3 or 1, H, W]` for every size; RuntimeError before the predictor is trained."""
    if study.predictor is None:
        raise RuntimeError("the predictor is not trained yet: finish a fit first")
    return _chosen(study, study.predictor(thumbnail(rgb)[None])[0].double(), sizes)


def values_of(study: LineStudy, frame: Frame) -> Tensor | None:
    """Values of one more frame, `[n]`, at the full budget, or more where it pools frames; None without truth."""
    assert study.estimation is not None
    if not study.completion.options.has_truth(frame):
        return None
    asked = study.settings
    budget, count = study.estimation.budget, study.expected
    if study.estimation.pooled:  # one frame has nothing to be pooled with: as many as solve it alone
        budget, count = max(budget, 4 * len(study.lines) + 6), 1
    options = replace(asked.estimation, rounds=1, budget=budget)
    single = LineEstimation(study.lines, count, options, study.estimation.metric)
    single.advance(FrameGame(frame, study.lines, study.completion))
    return single.result().values


def _chosen(study: LineStudy, values: Tensor, sizes: Sequence[int]) -> dict[int, list[int]]:
    return {k: choice.lines for k, choice in choose(values, sizes, study.lines, study.settings.spread).items()}
