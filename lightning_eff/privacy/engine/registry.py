"""Every rule of the package, and the door for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lightning_eff.privacy.engine import (
    attention,
    convolution,
    embedding,
    expanded,
    fallback,
    linear,
    norms,
    statistics,
)
from lightning_eff.privacy.engine.recording import rule

__all__ = [
    "attention",
    "convolution",
    "embedding",
    "expanded",
    "fallback",
    "linear",
    "norms",
    "register_rule",
    "statistics",
]

_Rule = TypeVar("_Rule", bound=Callable[..., Any])


def register_rule(*functions: Callable[..., Any]) -> Callable[[_Rule], _Rule]:
    """Let the decorated function compute per-sample gradients for calls of ``functions``.

    The rule is called with the recorder and then the arguments of the call whenever one of the tensors is a trainable
    parameter. It runs the function with parameters detached and taps what it gives; how a sample's gradient is
    made from the output's gradient is told by a :class:`LayerUse`, mostly a :class:`GradientUse`::

        @register_rule(my_package.scale)
        def record_scale(recorder, input, weight):
            part = recorder.part(weight)
            output = my_package.scale(input, recorder.detached(weight))
            def compute(gradient):
                return {part.name: recorder.split(gradient * input, "scale").sum(1)}
            return recorder.tap(output, GradientUse([part], recorder.samples, compute))

    Args:
        functions: functions that torch lets be overridden: those of torch, and those that ask
            ``torch.overrides.has_torch_function``. A module has no rule of its own: its functions have.

    Raises:
        TypeError: something is no function.
    """
    for function in functions:
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"expected functions such as torch.nn.functional.linear, got {function!r}")
    return rule(*functions)
