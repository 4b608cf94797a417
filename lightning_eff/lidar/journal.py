"""A file that keeps the value of every coalition as soon as it is known, so that a run that dies loses next to nothing.

One JSON object a line: the first says what the values are of; the others have `sample`, the frame's id, `frame`, a
digest of what it shows, `coalition`, the bits of its own lines in hexadecimal, and `error`.

The header tells weights and options, not the code of a network or metric: before what a file says of a frame is taken,
the network is asked for a few of its coalitions again.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_eff.documents import parsed, reading, write_text
from lightning_eff.lidar.frames import Frame
from lightning_eff.lidar.game import Completion, FrameGame
from lightning_eff.lidar.lines import LidarWarning
from lightning_eff.lidar.records import FrameId
from lightning_eff.shapley.coalitions import packed_keys

_CHUNK = 32  # coalitions that are written at a time
_TOLERANCE = 1e-4  # relative, of errors that one network gives at two times


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
        self._known: dict[str, dict[str, float]] = {}
        self._files: list[Path] = []
        self._unproved: set[str] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in sorted(path.parent.glob(f"{path.name}*")):
            if file.suffix != ".part":
                self._read(file)
        if not self._own.exists():
            self._append([self._header])

    @classmethod
    def in_folder(cls, dirpath: Path, header: Mapping[str, Any], process: int = 0) -> ValueJournal:
        """The journal of a folder whose errors are those of `header`, which gives the file its name."""
        name = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=4).hexdigest()
        return cls(dirpath / f"values-{name}.jsonl", header, process)

    def __len__(self) -> int:
        return sum(map(len, self._known.values()))

    def game(self, frame: Frame, candidates: Sequence[int], completion: Completion) -> FrameGame:
        """The game of a frame that asks the network for nothing the file knows, but to prove it."""
        return _RememberedGame(self, frame, candidates, completion)

    def recall(self, frame: str, keys: Sequence[str]) -> list[float | None]:
        """Errors of coalitions of a frame, told by its `fingerprint`, as far as they are known."""
        known = self._known.get(frame, {})
        return [known.get(key) for key in keys]

    def doubted(self, frame: str) -> list[str]:
        """Coalitions to ask the network for once more before the file's errors of a frame are taken: three at most.

        The first time a frame is asked for only: the smallest coalition, a middle one and the greatest.
        """
        if frame not in self._unproved:
            return []
        self._unproved.discard(frame)
        keys = sorted(self._known[frame], key=lambda key: (int(key or "0", 16).bit_count(), key))
        return [keys[place] for place in sorted({0, len(keys) // 2, len(keys) - 1})]

    def discard(self, why: str) -> None:
        """Take nothing more from the files, which are put aside under another name.

        Warns:
            LidarWarning: always, with the files and the reason.
        """
        aside = []
        for file in self._files:
            new = file.with_name(f"outdated-{file.name}")
            try:
                file.replace(new)
            except FileNotFoundError:  # another process was faster
                continue
            aside.append(str(new))
        names = ", ".join(map(str, self._files))
        warnings.warn(
            f"{names} holds errors of another network call or metric ({why}): nothing is taken from it, all is "
            f"evaluated anew (kept as {', '.join(aside) or 'another process names it'})",
            LidarWarning,
            stacklevel=2,
        )
        self._files, self._known, self._unproved = [], {}, set()

    def write(self, sample: FrameId, frame: str, keys: Sequence[str], errors: Sequence[float]) -> None:
        """Keep errors of coalitions, in the file at once."""
        pairs = list(zip(keys, errors, strict=True))
        self._append([{"sample": sample, "frame": frame, "coalition": key, "error": error} for key, error in pairs])
        self._known.setdefault(frame, {}).update(pairs)

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        if not self._own.exists() and lines[0] != self._header:  # it was put aside
            lines = [self._header, *lines]
        with self._own.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def _read(self, file: Path) -> None:
        content, _, broken = file.read_bytes().rpartition(b"\n")
        with reading(f"{file} holds no errors of coalitions, delete it"):
            whole = content.decode()
            lines = [
                parsed(dict[str, Any], json.loads(line), f"line {i}")
                for i, line in enumerate(whole.split("\n"), 1)
                if line
            ]
            known = [(line["frame"], _hexadecimal(line["coalition"]), line["error"]) for line in lines[1:]]
            parsed(list[tuple[str, str, float]], known, "frame, coalition and error of a line")
        if broken and file == self._own:  # a line cut off in the middle: go on behind the last whole one
            write_text(file, whole + "\n" if whole else "")
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
        self._files.append(file)
        for frame, coalition, error in known:
            self._known.setdefault(frame, {})[coalition] = error
            self._unproved.add(frame)


def _hexadecimal(key: str) -> str:
    bytes.fromhex(key)
    return key


def frame_fingerprint(frame: Frame) -> str:
    """The `fingerprint` of all that a frame shows."""
    return fingerprint(frame.rgb, frame.sparse, frame.line_idx, frame.gt)


def agree(one: float, other: float, precision: str, tolerance: float = _TOLERANCE) -> bool:
    """Whether two errors may be of the same network, asked in the same way.

    Args:
        one: error.
        other: error.
        precision: of the network; half of one rounds a hundred times as coarsely.
        tolerance: relative difference allowed.
    """
    relative = tolerance if precision == "32" else 100 * tolerance
    return math.isclose(one, other, rel_tol=relative, abs_tol=1e-9)


def fingerprint(*tensors: Tensor) -> str:
    """Sixteen hexadecimal digits that change with any entry of the tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_hash(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that change with any weight or buffer of a network."""
    digest = hashlib.blake2b(type(model).__qualname__.encode(), digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{list(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()


class _RememberedGame(FrameGame):
    """As `FrameGame`, with a memory."""

    def __init__(self, journal: ValueJournal, frame: Frame, candidates: Sequence[int], completion: Completion) -> None:
        super().__init__(frame, candidates, completion)
        self._journal, self._name = journal, frame_fingerprint(frame)

    def _errors(self, coalitions: Tensor) -> Tensor:
        # what is asked of the network itself: distinct coalitions, the empty and the full one among them
        keys = [key.hex() for key in packed_keys(coalitions.cpu())] if self.n_players else [""] * len(coalitions)
        self._prove(self._journal.doubted(self._name))
        known = self._journal.recall(self._name, keys)
        new = [place for place, error in enumerate(known) if error is None]
        for start in range(0, len(new), _CHUNK):
            part = new[start : start + _CHUNK]
            found = super()._errors(coalitions[part])
            self._journal.write(self.id, self._name, [keys[place] for place in part], found.tolist())
        self.evaluations += len(coalitions) - len(new)  # a run that goes on counts as one that did not break off
        errors = self._journal.recall(self._name, keys)
        return torch.tensor(errors, dtype=torch.float64)

    def _prove(self, keys: list[str]) -> None:
        """Discard what the journal knows unless the network still answers so for these coalitions."""
        if not keys:
            return
        told = self._journal.recall(self._name, keys)
        bits = [np.unpackbits(np.frombuffer(bytes.fromhex(key), np.uint8), count=self.n_players) for key in keys]
        coalitions = torch.from_numpy(np.stack(bits)).bool()
        before = self.evaluations
        found = super()._errors(coalitions).tolist()
        self.evaluations = before  # a run that goes on counts as one that did not break off
        for error, old, size in zip(found, told, coalitions.sum(1).tolist(), strict=True):
            if old is not None and not agree(error, old, self._completion.options.precision):
                self._journal.discard(
                    f"the error of frame {self.id!r} with {size} of {self.n_players} lines is {old:g} there and "
                    f"{error:g} now"
                )
                return
