"""Does a sample's gradient depend on the other samples of its batch? Then clipping bounds nothing.

Class-weighted means, ``ignore_index`` with a mean over what is left, contrastive losses, statistics over the batch: all
of them change a sample's gradient with its neighbours. The check compares each sample inside of the batch with the
same sample alone. A step that draws random numbers is compared with itself instead: the same numbers, as many
samples, but others in the place of half of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_eff.batch import LossFunction
from lightning_eff.privacy.batches import number_of_samples, some_samples
from lightning_eff.privacy.engine import PerSampleEngine
from lightning_eff.reporting import Column, Report, Table
from lightning_eff.surgery.state import Generators, untouched_generators

# exchanges of half of the samples, each with other random numbers
_TURNS = 8
# with fewer samples, chance alone makes medians differ as much as a sum in the place of a mean does
_ENOUGH = 8


@dataclass(frozen=True)
class IsolationReport(Report):
    """What the comparison found: a sentence, and the table ``isolation`` with a row a sample.

    Args:
        inside: norm of each sample's gradient inside of the batch.
        alone: norm of each sample's gradient as a batch of one; with ``exchanged``, among other neighbours.
        sum_difference: norm of the sum over the batch minus the sum over single samples, relative to the larger one.
        tolerance: largest relative difference that counts as rounding.
        random: the step gives something else every time, also with the same random numbers, so nothing can be told.
        exchanged: the step draws random numbers, so that the neighbours of a sample were exchanged, not left out.
    """

    inside: tuple[float, ...]
    alone: tuple[float, ...]
    sum_difference: float
    tolerance: float
    random: bool = False
    exchanged: bool = False

    @property
    def differences(self) -> tuple[float, ...]:
        """Relative difference of both norms, by sample."""
        floor = max((*self.inside, *self.alone, 0.0)) * 1e-6
        return tuple(
            abs(inside - alone) / larger if (larger := max(inside, alone)) > floor else 0.0
            for inside, alone in zip(self.inside, self.alone, strict=True)
        )

    @property
    def isolated(self) -> bool:
        """Whether every sample has the gradient it has alone."""
        return not self.random and all(
            difference <= self.tolerance for difference in (*self.differences, self.sum_difference)
        )

    @property
    def worst_ratio(self) -> float:
        """Norm inside of the batch divided by norm alone, of the sample where both differ most."""
        worst = max(range(len(self.inside)), key=lambda i: self.differences[i])
        return self.inside[worst] / self.alone[worst] if self.alone[worst] else float("inf")

    @property
    def is_a_sum(self) -> bool:
        """Whether every sample counts inside as often as there are samples."""
        ratios = [
            inside / (alone * len(self.inside)) for inside, alone in zip(self.inside, self.alone, strict=True) if alone
        ]
        return not (self.random or self.exchanged) and bool(ratios) and all(abs(r - 1) <= 0.05 for r in ratios)

    def preface(self) -> list[str]:
        """Return the outcome."""
        return [self.outcome]

    def tables(self) -> dict[str, Table]:
        """Return both norms of each sample's gradient and how they differ."""
        other = "norm again" if self.random else "norm among others" if self.exchanged else "norm alone"
        norms = [Column("norm in the batch", ".4g"), Column(other, ".4g")]
        rows = enumerate(zip(self.inside, self.alone, self.differences, strict=True))
        caption = (
            f"difference: relative to the larger norm; up to {self.tolerance:g} is rounding. The sums over samples "
            f"differ by {self.sum_difference:.2g}."
        )
        return {
            "isolation": Table(
                "Gradients of samples",
                ["sample", *norms, Column("difference", ".2g")],
                [(n, *row) for n, row in rows],
                caption,
            )
        }

    @property
    def outcome(self) -> str:
        """What was found, and the reason, in a sentence."""
        if self.random:
            return (
                "the training step gives another gradient every time it runs, also where the random generators of "
                "Python, NumPy and torch start from the same seed, so it cannot be checked whether samples depend on "
                "each other: draw from those generators alone, and keep nothing of a batch for the next one; or make "
                "sure that no samples are mixed and no statistics are taken over the batch, and set "
                "isolation_check='off'"
            )
        if self.isolated and self.exchanged:
            return f"each of {len(self.inside)} samples keeps its gradient among other neighbours"
        if self.isolated:
            return f"each of {len(self.inside)} samples has the gradient it has alone"
        if self.is_a_sum:
            return (
                f"a sample's gradient inside of a batch of {len(self.inside)} is {self.worst_ratio:.3g} times its "
                "gradient alone: this looks like a sum over the samples, take the mean. The loss must be the plain "
                'mean over samples, loss.mean() or reduction="mean"'
            )
        return (
            f"a sample's gradient depends on the other samples of its batch: its norm inside is "
            f"{self.worst_ratio:.3g} times its norm {'among others' if self.exchanged else 'alone'}, and the sum "
            f"differs by {self.sum_difference:.2g}. Clipping then does not bound what one sample can change. The loss "
            "must be the plain mean over samples, and every layer must have the samples in its first dimension: no "
            'class weights with a mean (but F.cross_entropy(outputs, targets, weight=w, reduction="none").mean()), no '
            "mean over what ignore_index leaves, no contrastive terms, no statistics of the batch, no mixing of "
            "samples, no sequence-first layers"
        )


def check_sample_isolation(
    module: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    tol: float | None = None,
) -> IsolationReport:
    """Compare per-sample gradients inside of a batch with those of each sample alone.

    The module runs in the modes it is in, without dropout. Where its step draws random numbers all the same, each
    sample is compared with itself among other neighbours, with the same numbers. Parameters, modes and the global
    random generators stay as they are; buffers and metrics that the step itself changes do not: pass a copy where that
    matters.

    Args:
        module: the module; trainable are the parameters with ``requires_grad``.
        loss_fn: ``(model, batch) -> loss``, the mean over the batch.
        batch: at least two samples, of several classes if there are classes; each runs once by itself.
        tol: relative difference that counts as rounding; None is 1e-4, or 0.05 in half precision and under autocast.

    Returns:
        The report; its ``isolated`` tells whether, its ``outcome`` why.

    Raises:
        ValueError: the batch has less than two samples, the step does not work for one, or the engine refuses the
            module.
    """
    n = number_of_samples(batch)
    if n < 2:
        raise ValueError(f"expected at least two samples to compare, got {n}")
    compared = _Comparison(module, loss_fn, batch, n)
    try:
        with untouched_generators(), torch.enable_grad():
            return compared.report(tol)
    finally:
        compared.engine.reset()


class _Comparison:
    """Runs a step on a batch, on single samples, and on the batch with other samples in it."""

    def __init__(self, module: nn.Module, loss_fn: LossFunction, batch: Any, n: int) -> None:
        self.engine = PerSampleEngine(module, tune=False)
        self._module, self._loss_fn, self._batch, self._n = module, loss_fn, batch, n
        self._without_dropout = _NoDropout()

    def report(self, tol: float | None) -> IsolationReport:
        """Compare in the way that the step allows."""
        state = Generators()
        untouched = self._drawn()
        state.restore()
        norms, total = self._run(self._batch, self._n)
        draws = self._drawn() != untouched
        if tol is None:
            narrow = self._without_dropout.autocast or any(p.dtype in _HALF for p in self._module.parameters())
            tol = 0.05 if narrow else 1e-4
        state.restore()
        again = self._run(self._batch, self._n)[0]
        inside = tuple(norms.tolist())
        if not _close(again, norms, tol):
            return IsolationReport(inside, tuple(again.tolist()), 0.0, tol, random=True)
        if draws:
            report = self._exchanged(tol)
            if not report.isolated:
                return report
            if not _close(self._run(self._batch, self._n)[0], norms, tol):
                # other numbers, other gradients: of single samples only their size can be compared
                alone, _ = self._alone(total)
                inside_size, alone_size = median(inside), median(alone)
                alike = 2 * inside_size < self._n * alone_size and 2 * alone_size < self._n * inside_size
                if self._n >= _ENOUGH and not alike and inside_size != alone_size:
                    return IsolationReport(inside, alone, 0.0, tol)
                return report
        alone, left = self._alone(total)
        return IsolationReport(inside, alone, _relative(left, max(sum(inside), sum(alone))), tol)

    def _run(self, batch: Any, samples: int, left_out: list[int] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        with self._without_dropout, self.engine.record(samples):
            loss = self._loss_fn(self._module, batch)
        self.engine.backward(loss)
        # what is not finite contributes nothing
        norms = self.engine.norms()
        norms = torch.where(norms.isfinite(), norms, 0.0)
        if left_out is not None:
            self.engine.leave_out(torch.tensor(left_out, device=norms.device))
        # so large that nothing is clipped
        return norms, self.engine.clipped_sum(1e30)

    def _alone(self, total: dict[str, Tensor]) -> tuple[tuple[float, ...], dict[str, Tensor]]:
        """Norms of single samples, and what is left of a sum without them."""
        alone = []
        for i in range(self._n):
            try:
                norm, single = self._run(some_samples(self._batch, slice(i, i + 1)), 1)
            except Exception as error:
                raise ValueError(
                    f"the training step works for {self._n} samples and fails for one: {error}. A batch that is drawn "
                    "may hold a single sample, and a sample has a gradient of its own only where the step makes "
                    "sense for it alone"
                ) from error
            alone.append(float(norm))
            total = {name: value - single[name] for name, value in total.items()}
        return tuple(alone), total

    def _exchanged(self, tol: float) -> IsolationReport:
        """Compare the gradients of half of the samples while the others are exchanged."""
        inside, among = [0.0] * self._n, [0.0] * self._n
        worst, sums = [-1.0] * self._n, 0.0
        out: list[int] = []
        for turn in range(_TURNS):
            # every sample is kept in one of two turns
            kept = sorted(out) if turn % 2 else sorted(random.Random(turn).sample(range(self._n), self._n // 2))
            out = [i for i in range(self._n) if i not in kept]
            other = some_samples(self._batch, [i if i in kept else kept[turn % len(kept)] for i in range(self._n)])
            state = Generators()
            norms, total = self._run(self._batch, self._n, out)
            state.restore()
            other_norms, other_total = self._run(other, self._n, out)
            for i in kept:
                one, two = float(norms[i]), float(other_norms[i])
                difference = abs(one - two) / max(one, two, 1e-30)
                if difference > worst[i]:
                    inside[i], among[i], worst[i] = one, two, difference
            left = {name: value - other_total[name] for name, value in total.items()}
            sums = max(sums, _relative(left, float(norms[kept].sum())))
        return IsolationReport(tuple(inside), tuple(among), sums, tol, exchanged=True)

    def _drawn(self) -> tuple[float, ...]:
        """Next number of each generator, which tells whether somebody drew from it before."""
        devices = dict.fromkeys((torch.device("cpu"), next(self._module.parameters()).device))
        drawn = [float(torch.rand((), device=device)) for device in devices]
        return random.random(), float(np.random.rand()), *drawn


class _NoDropout(TorchFunctionMode):
    """Dropout drops nothing; remembers whether anything ran under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.autocast = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        self.autocast = self.autocast or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        if func in _DROPOUT:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


_HALF = (torch.float16, torch.bfloat16)
_DROPOUT = {
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    torch.dropout,
    torch.dropout_,
    torch.feature_dropout,
}


def _close(one: Tensor, other: Tensor, tol: float) -> bool:
    return torch.allclose(one, other, rtol=tol, atol=float(other.max()) * 1e-6, equal_nan=True)


def _relative(values: Mapping[str, Tensor], scale: float) -> float:
    norm = float(torch.stack([value.square().sum() for value in values.values()]).sum().sqrt())
    return norm / scale if scale else 0.0
