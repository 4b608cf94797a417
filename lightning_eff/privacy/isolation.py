"""Does an example's gradient depend on the other examples of its batch? Then clipping bounds nothing.

Class-weighted means, ``ignore_index`` with a mean over what is left, contrastive losses, statistics over the batch: all
of them change an example's gradient with its neighbours. The check compares each example inside of the batch with the
same example alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_eff.privacy.batches import number_of_examples, some_examples
from lightning_eff.privacy.engine import PerSampleEngine
from lightning_eff.surgery.state import quiet_model, untouched_generators


@dataclass(frozen=True)
class IsolationReport:
    """What the comparison found.

    Args:
        inside: norm of each example's gradient inside of the batch.
        alone: norm of each example's gradient as a batch of one.
        sum_difference: norm of the sum over the batch minus the sum over single examples, relative to the larger one.
        tolerance: largest relative difference that counts as rounding.
        random: the step gives something else every time, also in evaluation mode, so nothing can be told.
    """

    inside: tuple[float, ...]
    alone: tuple[float, ...]
    sum_difference: float
    tolerance: float
    random: bool = False

    @property
    def differences(self) -> tuple[float, ...]:
        """Relative difference of both norms, by example."""
        floor = max((*self.inside, *self.alone, 0.0)) * 1e-6
        return tuple(
            abs(inside - alone) / larger if (larger := max(inside, alone)) > floor else 0.0
            for inside, alone in zip(self.inside, self.alone, strict=True)
        )

    @property
    def isolated(self) -> bool:
        """Whether every example has the gradient it has alone."""
        return not self.random and all(
            difference <= self.tolerance for difference in (*self.differences, self.sum_difference)
        )

    @property
    def worst_ratio(self) -> float:
        """Norm inside of the batch divided by norm alone, of the example where both differ most."""
        worst = max(range(len(self.inside)), key=lambda i: self.differences[i])
        return self.inside[worst] / self.alone[worst] if self.alone[worst] else float("inf")

    def __str__(self) -> str:
        if self.random:
            return (
                "the training step gives another gradient every time it runs, also in evaluation mode, so it cannot be "
                "checked whether examples depend on each other: make sure that they do not (no mixing of examples, no "
                "statistics over the batch) and set isolation_check='off'"
            )
        if self.isolated:
            return f"each of {len(self.inside)} examples has the gradient it has alone"
        return (
            f"an example's gradient depends on the other examples of its batch: its norm inside is "
            f"{self.worst_ratio:.3g} times its norm alone, and the sum differs by {self.sum_difference:.2g}. Clipping "
            "then does not bound what one example can change. The loss must be the plain mean over examples, and every "
            "layer must have the examples in its first dimension: no class weights with a mean, no mean over what "
            "ignore_index leaves, no contrastive terms, no statistics of the batch, no sequence-first layers"
        )


def check_sample_isolation(
    module: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    tol: float | None = None,
) -> IsolationReport:
    """Compare per-sample gradients inside of a batch with those of each example alone.

    The module runs in the modes it is in, without dropout; where its step is random all the same, in evaluation mode.
    Parameters, modes and the global random generators stay as they are; buffers and metrics that the step itself
    changes do not: pass a copy where that matters.

    Args:
        module: the module; trainable are the parameters with ``requires_grad``.
        loss_fn: takes module and batch, returns the loss: scalar, the mean over the examples.
        batch: at least two examples, of several classes if there are classes; each runs once by itself.
        tol: relative difference that counts as rounding; None is 1e-4, or 0.05 in half precision and under autocast.

    Returns:
        The report; its ``isolated`` tells the outcome and its text the reason.

    Raises:
        ValueError: the batch has less than two examples, or the engine refuses the module.
    """
    n = number_of_examples(batch)
    if n < 2:
        raise ValueError(f"expected at least two examples to compare, got {n}")
    engine = PerSampleEngine(module, tune=False)

    without_dropout = _NoDropout()

    def run(some: Any, examples: int) -> tuple[Tensor, dict[str, Tensor]]:
        with without_dropout, engine.record(examples):
            loss = loss_fn(module, some)
        engine.backward(loss)
        norms = engine.norms()
        # so large that nothing is clipped
        return norms, engine.clipped_sum(1e30)

    try:
        with ExitStack() as stack:
            stack.enter_context(untouched_generators())
            stack.enter_context(torch.enable_grad())
            norms, total = run(batch, n)
            if tol is None:
                narrow = without_dropout.autocast or any(p.dtype in _HALF for p in module.parameters())
                tol = 0.05 if narrow else 1e-4
            random = not _close(run(batch, n)[0], norms, tol)
            if random:
                stack.enter_context(quiet_model(module))
                norms, total = run(batch, n)
                random = not _close(run(batch, n)[0], norms, tol)
            alone = []
            for i in range(n):
                norm, single = run(some_examples(batch, slice(i, i + 1)), 1)
                alone.append(float(norm))
                total = {name: value - single[name] for name, value in total.items()}
    finally:
        engine.reset()
    inside = tuple(norms.tolist())
    scale = max(sum(inside), sum(alone))
    left = float(torch.stack([value.square().sum() for value in total.values()]).sum().sqrt())
    return IsolationReport(inside, tuple(alone), left / scale if scale else 0.0, tol, random)


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
