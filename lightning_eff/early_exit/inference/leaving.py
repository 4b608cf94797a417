"""Who leaves where: the decisions of one batch, shared by all engines.

Rows are positions in the batch as it stands, which shrinks as samples leave; samples are positions in the batch as it
came. Shapes: ``B`` samples, ``n`` rows, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_eff.batch import take
from lightning_eff.early_exit.inference.policies import Policy, State, score


@dataclass(frozen=True)
class ExitOutput:
    """Answer to a batch.

    Attributes:
        logits: ``[B, C]``, of the output each sample left at, not tempered.
        exit_index: ``[B]`` int64, that output; the backbone's own is the last.
        confidence: ``[B]`` float32, score of the policy there.
    """

    logits: Tensor
    exit_index: Tensor
    confidence: Tensor

    @classmethod
    def empty(cls, num_classes: int, device: torch.device) -> ExitOutput:
        """Return the answer to a batch of no samples."""
        return cls(
            torch.zeros(0, num_classes, device=device),
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.zeros(0, device=device),
        )

    def to(self, device: torch.device | str, **options: Any) -> ExitOutput:
        """Return it on another device; Trainers move what ``predict_step`` returns by this."""
        return ExitOutput(*(tensor.to(device, **options) for tensor in (self.logits, self.exit_index, self.confidence)))


class AllLeft(Exception):
    """The last samples have left: what comes behind the exit need not run."""


@dataclass(frozen=True)
class Rule:
    """When samples leave.

    Args:
        policy: how outputs are scored.
        thresholds: scores from which samples leave, one an exit; +inf disables an exit.
        temperatures: divide the logits before they are scored, one an output.
        compact_min_fraction: where fewer rows than this fraction leave, they stay in the batch until a later exit,
            which saves a copy of the features; answers are the same.
    """

    policy: Policy
    thresholds: Sequence[float]
    temperatures: Sequence[float]
    compact_min_fraction: float = 0.0

    def enabled(self, exit_index: int) -> bool:
        """Whether the exit is looked at."""
        return self.thresholds[exit_index] != math.inf

    def score(self, logits: Tensor, exit_index: int, state: State) -> tuple[Tensor, State]:
        """Scores ``[B]`` of an output."""
        return score(self.policy, logits, exit_index, state, self.temperatures[exit_index])


class Leaving:
    """Follow one batch through the exits.

    Args:
        rule: when samples leave.
        heads: classifier of each exit.
        batch: samples ``B`` >= 1.
    """

    def __init__(self, rule: Rule, heads: nn.ModuleList, batch: int) -> None:
        self.rule, self.batch = rule, batch
        self.heads = [*heads._modules.values()]  # a ModuleList looks its members up by text
        self.rows: Tensor | None = None  # sample of each row; None while all are there
        self.done: Tensor | None = None  # rows that have left but are still carried along
        self.state: State = None
        self._left: list[tuple[int, Tensor | None, Tensor, Tensor]] = []  # exit, samples, logits, scores

    def at(self, exit_index: int, feature: Tensor) -> Tensor | None:
        """Let rows leave at an exit.

        Args:
            exit_index: an enabled exit, later than the ones before.
            feature: ``[n, ...]``, batch first.

        Returns:
            Rows that go on, ``[n']`` int64; None if all of them do.

        Raises:
            AllLeft: none does.
        """
        head = self.heads[exit_index]
        assert head is not None
        logits = head(feature)
        scores, self.state = self.rule.score(logits, exit_index, self.state)
        return self.leave(exit_index, logits, scores)

    def leave(self, exit_index: int, logits: Tensor, scores: Tensor) -> Tensor | None:
        """Let rows leave whose scores ``[n]`` reach the threshold; as :meth:`at`."""
        self._check(logits)
        threshold = self.rule.thresholds[exit_index]
        if self.batch == 1:  # one number is read, no index is made
            if scores.item() < threshold:
                return None
            self._left.append((exit_index, None, logits, scores))
            raise AllLeft
        fire = scores >= threshold
        if self.done is not None:
            fire &= ~self.done
        gone = fire.nonzero().squeeze(1)
        count, rows = len(gone), len(fire)
        if count == 0:
            return None
        if count == rows:
            self._left.append((exit_index, self.rows, logits, scores))
            raise AllLeft
        self._left.append((exit_index, gone if self.rows is None else self.rows[gone], logits[gone], scores[gone]))
        out = fire if self.done is None else fire | self.done
        stay = (~out).nonzero().squeeze(1)
        if len(stay) == 0:
            raise AllLeft
        if rows - len(stay) < self.rule.compact_min_fraction * rows:
            self.done = out
            return None
        self.keep(stay)
        return stay

    def keep(self, stay: Tensor) -> None:
        """Drop all rows but ``stay``."""
        self.done = None
        self.rows = stay if self.rows is None else self.rows[stay]
        if self.state is not None:
            self.state = take(self.state, stay)

    def _check(self, logits: Tensor) -> None:
        """Raise where something of the whole batch went around an exit and met the samples that are left."""
        expected = self.batch if self.rows is None else len(self.rows)
        if len(logits) != expected:
            raise RuntimeError(
                f"{len(logits)} rows came where {expected} samples are left: a tensor of the whole batch went around "
                "an exit. Build the exits with an example that has all inputs of the backbone"
            )

    def finish(self, logits: Tensor | None) -> ExitOutput:
        """Put the answers together.

        Args:
            logits: ``[n, C]`` of the backbone's own output, None if all left before it.
        """
        last = len(self.heads)
        if logits is not None:
            self._check(logits)
            scores, _ = self.rule.score(logits, last, self.state)
            rows = self.rows
            if self.done is not None:
                stay = (~self.done).nonzero().squeeze(1)
                rows = stay if rows is None else rows[stay]
                logits, scores = logits[stay], scores[stay]
            self._left.append((last, rows, logits, scores))
        if len(self._left) == 1:
            exit_index, _, logits, scores = self._left[0]
            return ExitOutput(logits, torch.full_like(scores, exit_index, dtype=torch.int64), scores)
        samples = torch.cat([rows for _, rows, _, _ in self._left if rows is not None])
        where = torch.cat([torch.full_like(s, k, dtype=torch.int64) for k, _, _, s in self._left])
        order = torch.empty_like(samples)
        order[samples] = torch.arange(len(samples), device=samples.device)
        return ExitOutput(
            torch.cat([logits for _, _, logits, _ in self._left])[order],
            where[order],
            torch.cat([scores for _, _, _, scores in self._left])[order],
        )


def select_from_all(rule: Rule, outputs: Sequence[Tensor]) -> ExitOutput:
    """Choose, from the logits of all outputs, where each sample would have left: what every engine must equal.

    Args:
        rule: when samples leave.
        outputs: ``K`` tensors ``[B, C]``.
    """
    last = len(outputs) - 1
    state: Any = None
    where = torch.full((len(outputs[0]),), last, dtype=torch.int64, device=outputs[0].device)
    logits, confidence = outputs[last], torch.zeros(len(outputs[0]), device=outputs[0].device)
    here = torch.zeros_like(where, dtype=torch.bool)  # has left
    for k, output in enumerate(outputs):
        if k < last and not rule.enabled(k):
            continue
        scores, state = rule.score(output, k, state)
        fire = ~here & ((scores >= rule.thresholds[k]) if k < last else torch.ones_like(here))
        where = where.masked_fill(fire, k)
        logits = torch.where(fire[:, None], output, logits)
        confidence = torch.where(fire, scores, confidence)
        here |= fire
    return ExitOutput(logits, where, confidence)
