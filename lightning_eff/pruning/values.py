"""What a network is worth on a batch: one number per sample, higher is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# (outputs, target) -> [B]. Any, not Tensor: jsonargparse would look for classes derived from Tensor.
ValueFunction = Callable[[Any, Any], Any]
Value = Literal["accuracy", "neg_loss"] | ValueFunction


class Accuracy:
    """Share of right predictions of each sample, in [0, 1].

    Args:
        output: where the logits are when the model returns a dict (key) or a tuple or list (number); None for a tensor,
            or for a list of logits of equal shape, as of a network with early exits, which count equally.
    """

    def __init__(self, output: str | int | None = None) -> None:
        self.output = output

    def __call__(self, outputs: Any, target: Tensor) -> Tensor:
        """Logits ``[B, K, ...]`` and labels ``[B, ...]`` -> ``[B]``."""
        if self.output is None and equal_outputs(outputs):
            return torch.stack([self(logits, target) for logits in outputs]).mean(0)
        logits = _logits(outputs, self.output)
        if logits.ndim < 2 or logits.select(1, 0).shape != target.shape:
            raise ValueError(
                f"expected logits [B, K, ...] and labels [B, ...], got {list(logits.shape)} and {list(target.shape)}: "
                "pass value=, a callable (outputs, target) -> [B]"
            )
        return (logits.argmax(1) == target).double().reshape(len(target), -1).mean(1)


class NegativeLoss:
    """Minus the cross-entropy of each sample, in nats.

    Args:
        output: where the logits are, as of :class:`Accuracy`.
    """

    def __init__(self, output: str | int | None = None) -> None:
        self.output = output

    def __call__(self, outputs: Any, target: Tensor) -> Tensor:
        """Logits ``[B, K, ...]`` and labels ``[B, ...]`` -> ``[B]``."""
        if self.output is None and equal_outputs(outputs):
            return torch.stack([self(logits, target) for logits in outputs]).mean(0)
        loss = F.cross_entropy(_logits(outputs, self.output).float(), target, reduction="none")
        return -loss.double().reshape(len(loss), -1).mean(1)


def equal_outputs(outputs: Any) -> bool:
    """Whether a network returns a list of tensors of one shape: several answers to the same question."""
    if not isinstance(outputs, list) or not outputs:
        return False
    return all(isinstance(one, Tensor) and one.shape == outputs[0].shape for one in outputs)


def _logits(outputs: Any, output: str | int | None) -> Tensor:
    logits = outputs if output is None else outputs[output]
    if not isinstance(logits, Tensor):
        keys = f" with {sorted(map(str, outputs))}" if isinstance(outputs, dict) else ""
        raise TypeError(
            f"expected the model to return logits, got a {type(logits).__name__}{keys}: pass "
            "value=Accuracy(output=...) or NegativeLoss(output=...) with the key or position of the logits, or a "
            "callable (outputs, target) -> [B]"
        )
    return logits


def value_function(value: Value) -> ValueFunction:
    """Return the function behind a short name; a callable is checked on every batch to give one value per sample."""
    if value == "accuracy":
        return Accuracy()
    if value == "neg_loss":
        return NegativeLoss()
    if callable(value):
        return value
    raise ValueError(f'expected value "accuracy", "neg_loss" or a callable (outputs, target) -> [B], got {value!r}')


def per_sample(function: ValueFunction, outputs: Any, target: Any, batch: int) -> Tensor:
    """Evaluate ``function`` and check that it gives ``[B]``: float64."""
    values = function(outputs, target)
    if not isinstance(values, Tensor) or values.shape != (batch,):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"expected the value function to return one value per sample [{batch}], got {got}")
    return values.detach().to(torch.float64)
