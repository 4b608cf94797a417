"""Multi-head attention: its packed in-projection and its out-projection are linear layers.

torch runs it as one function, sequence first. The rule lets torch's own code run and steps in where that code uses a
parameter: with the samples put first there, the rule of linear layers does the rest. Masks, dropout and returned
weights are torch's own.

Shapes: ``L`` positions, ``B`` rows of samples (n, or k * n), ``E`` features.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_eff.privacy.engine.linear import record_linear
from lightning_eff.privacy.engine.recording import Recorder, rule
from lightning_eff.privacy.engine.uses import GradientUse, wide


@rule(functional.multi_head_attention_forward)
def record_attention(recorder: Recorder, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run torch's function and record what it does with parameters.

    Raises:
        ValueError: the query is not ``[L, B, E]``.
    """
    if query.ndim != 3:
        raise ValueError(
            f"attention got a query of shape {list(query.shape)}: per-sample gradients need the one of a batch, with "
            "three dimensions"
        )
    with _Inside(recorder, query.size(1)):
        return _forward(query, *args, **kwargs)


class _Inside(TorchFunctionMode):
    """Within the function: samples first where parameters are used."""

    def __init__(self, recorder: Recorder, rows: int) -> None:
        super().__init__()
        self._recorder, self._rows = recorder, rows

    def __torch_function__(
        self,
        func: Callable[..., Any],
        kinds: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return self._linear(*args, **kwargs)
        if func is Tensor.repeat and self._recorder.name_of(args[0]) is not None:
            return self._repeat(*args)
        return self._recorder.__torch_function__(func, kinds, args, kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        """Project ``[L, B, E]``, or ``[L * B, E]`` with the samples running fastest."""
        sequence = input if input.ndim == 3 else input.view(-1, self._rows, input.size(-1))
        projected = record_linear(self._recorder, sequence.transpose(0, 1), weight, bias).transpose(0, 1)
        if input.ndim == 2:
            return projected.reshape(input.size(0), -1)
        # three in one are copied by what follows; what is one alone is viewed
        return projected if weight.size(0) == 3 * weight.size(1) else projected.contiguous()

    def _repeat(self, tensor: Tensor, *sizes: int) -> Tensor:
        """Give every sample a copy ``[1, B, E]`` of the bias of keys or values ``[1, 1, E]``."""
        part = self._recorder.part(tensor)

        def compute(gradient: Tensor) -> dict[str, Tensor]:
            assert part is not None
            sums = self._recorder.split(wide(gradient).transpose(0, 1), "attention").sum(1)
            return {part.name: sums.unsqueeze(1)}

        return self._recorder.tap(tensor.detach().repeat(*sizes), GradientUse([part], self._recorder.samples, compute))


# torch's code, but for its question whether a mode stands for the whole function: the mode is wanted inside of it
_forward = types.FunctionType(
    functional.multi_head_attention_forward.__code__,
    {**functional.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    argdefs=functional.multi_head_attention_forward.__defaults__,
)
_forward.__kwdefaults__ = functional.multi_head_attention_forward.__kwdefaults__
