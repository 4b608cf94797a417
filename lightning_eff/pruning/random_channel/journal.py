"""Candidates on disk as they come, so that a search that was interrupted goes on where it stopped."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_eff.documents import reading, write_text
from lightning_eff.pruning.random_channel.candidates import Candidate, candidate_columns
from lightning_eff.reporting import Table


class Journal:
    """A CSV file with a line for each candidate, and beside it a JSON file with the fingerprint of the search.

    What another search wrote is not taken up: it is kept as ``<name>.previous``, with a warning.

    Args:
        path: of the CSV file; None writes nothing.
        fingerprint: of everything that the scores depend on.
        groups: names of the prunable groups.
        rank: of this process; those above 0 write files of their own beside ``path``.

    Attributes:
        known: candidates found on disk, by stage and number.
    """

    def __init__(self, path: str | Path | None, fingerprint: str, groups: Sequence[str], rank: int = 0) -> None:
        self.path = None if path is None else Path(path)
        self.known: dict[tuple[str, int], Candidate] = {}
        self._own = self.path
        self._groups = groups
        if self.path is None:
            return
        if rank:
            self._own = self.path.with_name(f"{self.path.stem}.rank{rank}{self.path.suffix}")
        for part in sorted({self.path, *self.path.parent.glob(f"{self.path.stem}.rank*{self.path.suffix}")}):
            if part.exists() and fingerprint_of(part) == fingerprint:
                self.known |= {(c.stage, c.number): c for c in _read(part)}
        assert self._own is not None
        mine = _read(self._own) if self._own.exists() and fingerprint_of(self._own) == fingerprint else []
        if self._own.exists() and fingerprint_of(self._own) != fingerprint:
            previous = self._own.replace(self._own.with_name(f"{self._own.name}.previous"))
            warnings.warn(
                f"{self._own} is of another search (other network, data or options): it was renamed to "
                f"{previous.name}, and this search starts from the beginning",
                stacklevel=3,
            )
        write_text(_beside(self._own), json.dumps({"fingerprint": fingerprint}))
        self._write(mine)

    def add(self, candidate: Candidate) -> None:
        """Append one line."""
        if self._own is not None:
            with self._own.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(candidate.row())

    def replace(self, candidates: Iterable[Candidate]) -> None:
        """Write all candidates, those of other processes too, in place of what is there."""
        if self._own is not None and self._own == self.path:
            self._write(candidates)

    def forget_parts(self) -> None:
        """Delete the file of a process above rank 0, whose candidates the whole file holds by now."""
        if self._own is not None and self._own != self.path:
            self._own.unlink(missing_ok=True)
            _beside(self._own).unlink(missing_ok=True)

    def _write(self, candidates: Iterable[Candidate]) -> None:
        assert self._own is not None
        table = Table("Candidates", candidate_columns(self._groups), [candidate.row() for candidate in candidates])
        table.to_csv(self._own)


def fingerprint_of(path: Path) -> str | None:
    """The fingerprint of the search that writes to ``path``; None where there is none."""
    beside = _beside(path)
    if not beside.exists():
        return None
    with reading(f"{beside} holds no fingerprint of a search, delete it and the candidates beside it"):
        return str(json.loads(beside.read_text(encoding="utf-8"))["fingerprint"])


def _beside(path: Path) -> Path:
    return path.with_suffix(".fingerprint.json")


def _read(path: Path) -> list[Candidate]:
    """Candidates of a journal; the line that a process was writing when it died is left out."""
    with reading(f"{path} holds no candidates of a search, delete it"):
        whole, end, _ = path.read_bytes().rpartition(b"\n")  # a letter of several bytes may have been cut, too
        records = csv.DictReader(io.StringIO((whole + end).decode(), newline=""), strict=True)
        return [Candidate.from_record(record) for record in records]
