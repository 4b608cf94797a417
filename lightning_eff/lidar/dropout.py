"""Leave random lines out of the training batches, so that a network learns to do with any of them.

A network trained on all lines alone answers a subset badly, and line values measured with it say more of that than of
the lines. Shapes: ``B`` batch, ``H``, ``W`` height and width.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_eff.arguments import check_choice, check_number, check_whole
from lightning_eff.batch import SplitBatch
from lightning_eff.lidar.batches import NO_LINE, LidarKeys, check_lines

Mode = Literal["uniform", "block"]


class LineDropout(Callback):
    """Keep a random number of random lines in a share of the frames of every training batch.

    A batch that is a dict, read by a :class:`~lightning_eff.lidar.batches.LidarKeys`, gets new tensors of sparse depth
    and of lines, and keeps its others. In any other batch those two tensors are changed in place, so they must not be
    those of the data set itself.

    What is dropped depends on seed, epoch, number of the batch and process alone: a run that is resumed drops what an
    unbroken one drops. The random generators of the run are not touched.

    Args:
        p: probability that a frame loses lines, in [0, 1].
        min_lines: fewest lines kept, >= 0.
        max_lines: most lines kept, >= ``min_lines``; None means all that the frame shows. The number is drawn evenly.
        mode: which lines are kept: ``"uniform"`` any, ``"block"`` neighbours, counted round from the lowest to the
            highest, so that either those kept or those dropped are one block.
        split_batch: ``batch -> (inputs, target)`` with inputs a dict that has ``sparse`` and ``line_idx``; a
            ``LidarKeys`` renames keys.
        seed: of all draws, >= 0.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        p: float = 0.75,
        min_lines: int = 0,
        max_lines: int | None = None,
        mode: Mode = "uniform",
        split_batch: SplitBatch | None = None,
        seed: int = 0,
    ) -> None:
        _check(p, min_lines, max_lines, mode)
        check_whole("seed", seed, 0)
        self.p, self.min_lines, self.max_lines, self.mode = p, min_lines, max_lines, mode
        self.split_batch, self.seed = split_batch or LidarKeys(), seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Drop lines from the batch that ``training_step`` is about to see."""
        key = [self.seed, trainer.current_epoch, batch_idx, trainer.global_rank]
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
        options = generator, self.p, self.min_lines, self.max_lines, self.mode
        split = self.split_batch
        if isinstance(split, LidarKeys) and isinstance(batch, MutableMapping):
            inputs = split.inputs(batch)
            kept = drop_lines(inputs["sparse"], inputs["line_idx"], *options)
            batch[split.sparse], batch[split.line_idx] = kept
            return
        inputs, target = split(batch)
        sparse, line_idx = inputs["sparse"], inputs["line_idx"]
        if isinstance(target, Tensor) and target.data_ptr() == sparse.data_ptr():
            raise ValueError(
                "expected sparse depth and ground truth to be two tensors, got the same one: dropping lines from a "
                "batch that is not a dict changes its tensors in place; clone one of them, or give dict batches"
            )
        kept = drop_lines(sparse, line_idx, *options)
        sparse.copy_(kept[0])
        line_idx.copy_(kept[1])


def drop_lines(
    sparse: Tensor,
    line_idx: Tensor,
    generator: torch.Generator,
    p: float = 0.75,
    min_lines: int = 0,
    max_lines: int | None = None,
    mode: Mode = "uniform",
) -> tuple[Tensor, Tensor]:
    """Keep a random number of random lines in a share of frames; see :class:`LineDropout` for the options.

    Args:
        sparse: ``[B, 1, H, W]`` in metres, 0 = none.
        line_idx: line of every pixel, integer ``[B, 1, H, W]``, 255 = none. A frame that loses lines also loses depth
            that belongs to none.
        generator: on the CPU; the only source of chance.
        p: probability that a frame loses lines, in [0, 1].
        min_lines: fewest lines kept, as far as the frame has them.
        max_lines: most lines kept, None for all that the frame has.
        mode: which lines are kept.

    Returns:
        Sparse depth and lines of what was kept: new tensors, 0 and 255 elsewhere.

    Raises:
        ValueError: an argument lies outside its range, ``line_idx`` is not integer or neither below 255 nor 255.
    """
    _check(p, min_lines, max_lines, mode)
    check_lines(line_idx, NO_LINE)
    lines = torch.where(sparse > 0, line_idx.long(), NO_LINE).flatten(1)
    shown = torch.zeros(len(lines), NO_LINE + 1, dtype=torch.bool, device=lines.device).scatter_(1, lines, True)
    kept = torch.ones(shown.shape, dtype=torch.bool)
    for frame, of_frame in zip(kept, shown[:, :NO_LINE].cpu(), strict=True):
        if torch.rand((), generator=generator) >= p:
            continue
        here = of_frame.nonzero().flatten()
        frame.zero_()
        if not len(here):
            continue
        most = len(here) if max_lines is None else min(max_lines, len(here))
        count = int(torch.randint(min(min_lines, most), most + 1, (), generator=generator))
        if mode == "uniform":
            order = torch.randperm(len(here), generator=generator)
        else:
            order = (torch.arange(len(here)) + torch.randint(len(here), (), generator=generator)) % len(here)
        frame[here[order[:count]]] = True
    stays = kept.to(lines.device).gather(1, lines).view(sparse.shape)
    return sparse.where(stays, 0), line_idx.where(stays, NO_LINE)


def _check(p: float, min_lines: int, max_lines: int | None, mode: str) -> None:
    check_number("p", p, least=0, most=1)
    check_whole("min_lines", min_lines, 0)
    if max_lines is not None:
        check_whole("max_lines", max_lines, 0)
        if max_lines < min_lines:
            raise ValueError(f"max_lines must be at least min_lines, got {max_lines} and {min_lines}")
    check_choice("mode", mode, ("uniform", "block"))
