"""Text files as bytes: windows at random places for training, windows side by side for validation.

Files are mapped into memory, so that they may be larger than it.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_eff.arguments import check_number, check_whole
from lightning_eff.data.loading import ResumableLoader, SplitDataModule, TrainerEpochSampler

#: Files that are mapped at a time by one process.
_OPEN_FILES = 64


class ByteTextDataModule(SplitDataModule):
    """Batches ``(inputs, targets)`` of bytes, both int64 ``[B, T]``, targets one byte further.

    The last bytes are for validation, which is also what ``test`` and ``predict`` see: windows side by side, as many as
    fill whole batches. Training windows begin anywhere in the rest, drawn anew in every epoch by seed, epoch and
    index alone, so that a run that was killed goes on with the windows it would have seen. An epoch has as many windows
    as the text has room for, in whole optimizer steps where batches are accumulated.

    Args:
        path: A file; a pattern such as ``src/**/*.py``, whose matches are taken in the order of their names; or a list
            of these. Several files are read as one text.
        seq_len: T, positions of a window, >= 1.
        batch_size: B, windows a batch, per process, >= 1.
        val_fraction: Share of the text for validation, in (0, 1).
        seed: Of the training windows, >= 0.
        num_workers: Processes that load, >= 0.

    Raises:
        ValueError: An argument lies outside its range, or, when the text is read, a part is shorter than a window.
        FileNotFoundError: When the text is read: there is no such file, or none that matches.
    """

    def __init__(
        self,
        path: str | list[str],
        seq_len: int = 256,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        check_whole("seq_len", seq_len, 1)
        check_number("val_fraction", val_fraction, above=0, below=1)
        self.paths = [str(path)] if isinstance(path, str | Path) else [str(one) for one in path]
        if not self.paths:
            raise ValueError("expected path to name a file, got an empty list")
        self.seq_len, self.val_fraction = seq_len, val_fraction

    def load(self) -> tuple[ByteWindows, ByteWindows, ByteWindows]:
        """Look at the files and split them."""
        text = ByteText(files_of(self.paths))
        held_out = int(len(text) * self.val_fraction)
        cut, shortest = len(text) - held_out, self.seq_len + 1
        if min(cut, held_out) < shortest:
            raise ValueError(
                f"a window takes seq_len + 1 = {shortest} bytes, but {self._named()} of {len(text)} bytes gives {cut} "
                f"to training and {held_out} to validation; use more text, a smaller seq_len or another val_fraction"
            )
        train = ByteWindows(text, range(cut - self.seq_len), self.seq_len)
        validation = ByteWindows(text, range(cut, len(text) - self.seq_len, self.seq_len), self.seq_len)
        return train, validation, validation

    def train_dataloader(self) -> DataLoader[Any]:
        """Windows at random places, split among the processes."""
        # Lightning ends an epoch with a step: one of fewer batches would make steps of unequal tokens
        step = self.batch_size * (self.trainer.accumulate_grad_batches if self.trainer else 1)
        sampler = WindowSampler(self.train_set, self.trainer, self.seed, self.seq_len, step)
        return ResumableLoader(self.train_set, sampler=sampler, **self._loading())

    def val_dataloader(self) -> DataLoader[Any]:
        """Windows side by side, in order."""
        # whole batches if there is one: under expert choice windows of a batch compete, and a rest may be too few
        processes = self.trainer.world_size if self.trainer else 1
        whole = math.ceil(len(self.val_set) / processes) >= self.batch_size  # type: ignore[arg-type]
        return DataLoader(self.val_set, **self._loading(), drop_last=whole)

    def test_dataloader(self) -> DataLoader[Any]:
        """Windows of validation."""
        return self.val_dataloader()

    def largest_byte(self) -> int:
        """Return the largest value in the text: a vocabulary must have more entries. Reads all of it."""
        return ByteText(files_of(self.paths)).largest()

    def _named(self) -> str:
        return f"the text {', '.join(self.paths)}"


def files_of(paths: Sequence[str]) -> list[str]:
    """Return the files, those that match a pattern in place of it, sorted by name.

    Raises:
        FileNotFoundError: There is no such file, or none that matches.
    """
    files = []
    for path in paths:
        found = [path]
        if glob.has_magic(path) and not Path(path).is_file():
            found = sorted(match for match in glob.glob(path, recursive=True) if Path(match).is_file())
        if not found or not Path(found[0]).is_file():
            raise FileNotFoundError(f"there is no text file {path} (looked in {Path.cwd()})")
        files += found
    return files


class ByteText:
    """Files as one sequence of bytes.

    Args:
        paths: The files, in order; empty ones are fine.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        # ends[i]: bytes of the files up to and with file i
        self.ends = np.cumsum([Path(path).stat().st_size for path in paths])
        self._maps: dict[int, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Return bytes from ``start`` on, int64 [length]."""
        out = np.empty(length, dtype=np.int64)
        done, file = 0, int(np.searchsorted(self.ends, start, side="right"))
        while done < length:
            before = int(self.ends[file - 1]) if file else 0
            begin, end = start + done - before, min(start + length, int(self.ends[file])) - before
            if end > begin:  # an empty file cannot be mapped
                out[done : done + end - begin] = self._mapped(file)[begin:end]
            done, file = done + max(0, end - begin), file + 1
        return out

    def largest(self) -> int:
        """Return the largest byte; 0 if there is none."""
        sizes = np.diff(self.ends, prepend=0)
        return max((int(self._mapped(file).max()) for file, size in enumerate(sizes) if size), default=0)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps out: pickled they would be all of the text."""
        return {**self.__dict__, "_maps": {}}

    def _mapped(self, file: int) -> NDArray[np.uint8]:
        if file not in self._maps:
            if len(self._maps) == _OPEN_FILES:
                del self._maps[next(iter(self._maps))]
            self._maps[file] = np.memmap(self.paths[file], dtype=np.uint8, mode="r")
        return self._maps[file]


class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text and what follows each of their bytes.

    Args:
        text: The bytes.
        starts: Where windows begin.
        seq_len: T, their length.
    """

    def __init__(self, text: ByteText, starts: range, seq_len: int) -> None:
        self.text, self.starts, self.seq_len = text, starts, seq_len

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return ``(inputs, targets)``, int64 ``[T]``."""
        window = torch.from_numpy(self.text.read(self.starts[index], self.seq_len + 1))
        return window[:-1], window[1:]


class WindowSampler(TrainerEpochSampler):
    """Windows drawn with replacement, as many an epoch as fit side by side, in whole steps of all processes.

    Args:
        dataset: A window for each place where one can begin.
        trainer: As of :class:`TrainerEpochSampler`.
        seed: Of the places, >= 0.
        seq_len: Length of a window.
        per_step: Windows that a process takes for an optimizer step.
    """

    def __init__(self, dataset: Dataset[Any], trainer: Trainer | None, seed: int, seq_len: int, per_step: int) -> None:
        super().__init__(dataset, trainer, seed)
        self.places = len(dataset)  # type: ignore[arg-type]
        together = per_step * self.num_replicas
        self.total_size = max(1, self.places // (seq_len * together)) * together
        self.num_samples = self.total_size // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        """Draw the windows of this process: the same ones whatever the number of processes, dealt out in turn."""
        drawn = np.random.default_rng([self.seed, self.epoch]).integers(self.places, size=self.total_size)
        return iter(drawn[self.rank : self.total_size : self.num_replicas].tolist())
