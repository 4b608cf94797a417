"""A file that keeps the value of every coalition as soon as it is known, so that a run that dies loses next to nothing.

One JSON object a line: the first says what the values are of; the others have `sample`, the frame's id, `frame`, a
digest of what it shows, `coalition`, the bits of its own lines in hexadecimal, and `error`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_eff.lidar.frames import Frame
from lightning_eff.lidar.game import Completion, FrameGame
from lightning_eff.lidar.records import FrameId
from lightning_eff.shapley.coalitions import packed_keys

_CHUNK = 32  # coalitions that are written at a time


class ValueJournal:
    """Errors of coalitions, in memory and in a file.

    Args:
        path: the file; other processes write beside it, and what is there of them is read too.
        header: what the errors are of: plain Python.
        process: number of this process.

    Raises:
        ValueError: the file is of something else; the message names what differs.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any], process: int = 0) -> None:
        path = Path(path)
        self._own = path if process == 0 else path.with_name(f"{path.name}.{process}")
        self._header: dict[str, Any] = json.loads(json.dumps(header))
        self._known: dict[tuple[str, str], float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in sorted(path.parent.glob(f"{path.name}*")):
            self._read(file)
        if not self._own.exists():
            self._append([self._header])

    def __len__(self) -> int:
        return len(self._known)

    def game(self, frame: Frame, candidates: Sequence[int], completion: Completion) -> FrameGame:
        """The game of a frame that asks the network for nothing the file knows."""
        return _RememberedGame(self, frame, candidates, completion)

    def recall(self, frame: str, keys: Sequence[str]) -> list[float | None]:
        """Errors of coalitions of a frame, told by its `fingerprint`, as far as they are known."""
        return [self._known.get((frame, key)) for key in keys]

    def write(self, sample: FrameId, frame: str, keys: Sequence[str], errors: Sequence[float]) -> None:
        """Keep errors of coalitions, in the file at once."""
        pairs = list(zip(keys, errors, strict=True))
        self._append([{"sample": sample, "frame": frame, "coalition": key, "error": error} for key, error in pairs])
        self._known.update({(frame, key): error for key, error in pairs})

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with self._own.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def _read(self, file: Path) -> None:
        text = file.read_text(encoding="utf-8")
        whole, _, broken = text.rpartition("\n")
        if broken and file == self._own:  # a line cut off in the middle: go on behind the last whole one
            file.write_text(whole + "\n" if whole else "", encoding="utf-8")
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            if file == self._own:
                file.unlink()
            return
        different = [name for name in self._header if lines[0].get(name) != self._header[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"{file} holds errors of other coalitions: {name} is {lines[0].get(name)!r} there and "
                f"{self._header[name]!r} here; give another dirpath or delete the file"
            )
        self._known.update({(line["frame"], line["coalition"]): line["error"] for line in lines[1:]})


def fingerprint(*tensors: Tensor) -> str:
    """Sixteen hexadecimal digits that change with any entry of the tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class _RememberedGame(FrameGame):
    """As `FrameGame`, with a memory."""

    def __init__(self, journal: ValueJournal, frame: Frame, candidates: Sequence[int], completion: Completion) -> None:
        super().__init__(frame, candidates, completion)
        self._journal, self._name = journal, fingerprint(frame.rgb, frame.sparse, frame.line_idx, frame.gt)

    def _errors(self, coalitions: Tensor) -> Tensor:
        # what is asked of the network itself: distinct coalitions, the empty and the full one among them
        keys = [key.hex() for key in packed_keys(coalitions.cpu())] if self.n_players else [""] * len(coalitions)
        known = self._journal.recall(self._name, keys)
        new = [place for place, error in enumerate(known) if error is None]
        for start in range(0, len(new), _CHUNK):
            part = new[start : start + _CHUNK]
            found = super()._errors(coalitions[part])
            self._journal.write(self.id, self._name, [keys[place] for place in part], found.tolist())
        self.evaluations += len(coalitions) - len(new)  # a run that goes on counts as one that did not break off
        errors = self._journal.recall(self._name, keys)
        return torch.tensor(errors, dtype=torch.float64)
