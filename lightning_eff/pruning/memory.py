"""Scores on disk until a step is done, so that an interrupted scoring goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_eff.documents import reading, write_text
from lightning_eff.pruning.report import Scores
from lightning_eff.pruning.samples import Samples


class ScoreMemory:
    """``memory(name, compute)`` returns stored scores of a group, or computes and stores them.

    Args:
        dirpath: where to keep them; None keeps nothing.
        step: of the schedule.
        fingerprint: of the game; scores stored under another one are computed anew.
    """

    def __init__(self, dirpath: Path | None, step: int, fingerprint: str) -> None:
        self._dirpath = dirpath
        self._step = step
        self._fingerprint = fingerprint

    def __call__(self, name: str, compute: Callable[[], Scores]) -> Scores:
        """Return the scores of the group ``name``."""
        if self._dirpath is None:
            return compute()
        path = self._dirpath / "scores" / f"step{self._step}-{name}.json"
        if path.exists():
            with reading(f"{path} holds no scores, delete it"):
                stored = json.loads(path.read_text(encoding="utf-8"))
                if stored["fingerprint"] == self._fingerprint:
                    return Scores.from_dict(stored["scores"])
        scores = compute()
        write_text(path, json.dumps({"fingerprint": self._fingerprint, "scores": scores.to_dict()}))
        return scores


def forget(dirpath: Path, step: int) -> None:
    """Delete the scores of a step that is done."""
    for path in (dirpath / "scores").glob(f"step{step}-*"):
        path.unlink()


def fingerprint(model: nn.Module, samples: Samples, settings: tuple[Any, ...]) -> str:
    """Hash what scores depend on: weights, samples with their targets, settings."""
    return digest((settings, samples.counts.tolist()), *model.state_dict().values(), list(samples.groups))


def digest(*trees: Any) -> str:
    """Hash trees: tensors by their content, everything else by how it prints."""
    found = hashlib.sha256()
    for leaf in pytree.tree_leaves(list(trees)):
        if isinstance(leaf, Tensor):
            found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def function_bytes(function: Any) -> bytes | None:
    """What tells one function from another; None for a lambda, whose results are never taken up again."""
    try:
        return pickle.dumps(function)
    except Exception:
        return None
