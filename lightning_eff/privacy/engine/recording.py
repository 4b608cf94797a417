"""See every call of a layer in a user's step, without touching the module.

A :class:`Recorder` is a torch function mode. Where a function that has a rule gets a trainable parameter, the rule runs
it with the parameter detached, so that autograd never makes the summed weight gradient, and taps the output: the
output's gradient goes to a :class:`LayerUse` on its way back. Parameters are found by identity, so functional use, tied
weights and layers called twice are seen, and deep copies of the module stay unaffected.

A rule has the signature of the function it stands for, preceded by the recorder::

    @rule(torch.nn.functional.linear)
    def record_linear(recorder, input, weight, bias=None):
        output = F.linear(input, recorder.detached(weight), recorder.detached(bias))
        return recorder.tap(output, LinearUse(...))

It returns NotImplemented to leave a call alone. A trainable parameter that goes into a function without rule, or into a
view of which a function without rule is made, gets an ordinary gradient; the engine then refuses it by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from lightning_eff.privacy.engine.tuning import Tuner
from lightning_eff.privacy.engine.uses import KeptInput, LayerUse, Part
from lightning_eff.privacy.selection.selected import Selection

__all__ = ["FALLBACKS", "RULES", "KeptInput", "Recorder", "rule"]

RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
# tried in order for functions without a rule that get a trainable parameter: (recorder, function, args, kwargs) ->
# output or NotImplemented
FALLBACKS: list[Callable[..., Any]] = []
# called with the arguments of a function before it runs, trainable parameters or not; they raise what is wrong with it
GUARDS: dict[Callable[..., Any], Callable[..., None]] = {}

_Rule = TypeVar("_Rule", bound=Callable[..., Any])


def rule(*functions: Callable[..., Any]) -> Callable[[_Rule], _Rule]:
    """Let the decorated rule stand for ``functions`` while a recorder is active."""

    def register(handler: _Rule) -> _Rule:
        RULES.update(dict.fromkeys(functions, handler))
        return handler

    return register


class Recorder(TorchFunctionMode):
    """Records the calls of layers in one forward pass.

    Args:
        names: name of every trainable parameter by ``id``.
        selections: what of each parameter is active; a name that is missing is wholly active.
        samples: n, the number of samples of the physical batch.
        tuner: chooses among equivalent computations, for uses that have the choice.
        on_gradient: called with a use once it has received its gradient.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        selections: Mapping[str, Selection],
        samples: int,
        tuner: Tuner,
        on_gradient: Callable[[LayerUse], None],
    ) -> None:
        super().__init__()
        self.samples = samples
        self.tuner = tuner
        self.seen: set[str] = set()
        self.times_used: Counter[str] = Counter()
        # what goes back while the step still runs is the step's own affair, such as gradients for adversarial samples
        self.counts = True
        self._names = names
        self._selections = selections
        self._on_gradient = on_gradient
        # gives outputs of layers whose input needs no gradient a place in the graph
        self._anchor = torch.zeros((), requires_grad=True)

    def __enter__(self) -> Recorder:
        self.counts = False
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        self.counts = True
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Hand calls with a trainable parameter to their rule; this mode is off while the rule runs."""
        kwargs = kwargs or {}
        handler = RULES.get(func)
        if (handler is None and not FALLBACKS) or not torch.is_grad_enabled() or not self._trains(args, kwargs):
            return func(*args, **kwargs)
        if handler is not None:
            output = handler(self, *args, **kwargs)
            if output is not NotImplemented:
                return output
        for fallback in FALLBACKS:
            output = fallback(self, func, args, kwargs)
            if output is not NotImplemented:
                return output
        return func(*args, **kwargs)

    def name_of(self, tensor: Any) -> str | None:
        """Return the name of a trainable parameter; None for everything else."""
        return self._names.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def part(self, tensor: Any) -> Part | None:
        """Return name and selection of a trainable parameter; None for everything else and where nothing is active."""
        name = self.name_of(tensor)
        if name is None:
            return None
        self.seen.add(name)
        selection = self._selections.get(name)
        if selection is None:
            return Part(name, Selection.all(tensor.shape))
        return None if selection.is_empty else Part(name, selection)

    def detached(self, tensor: Any) -> Any:
        """Return a trainable parameter without its graph, anything else as it is."""
        return tensor if self.name_of(tensor) is None else tensor.detach()

    def tap(self, output: Tensor, use: LayerUse) -> Tensor:
        """Let ``use`` receive the gradient of ``output``; a use of which nothing is active is not recorded.

        Args:
            output: the layer's output, made with detached parameters. Where the use is not recorded and the input needs
                no gradient either, backward stops here.
            use: the call.

        Returns:
            The output to hand to the user.
        """
        if not use.selections:
            return output
        self.times_used.update(use.selections.keys())
        tapped: Tensor = _Tap.apply(self._anchor, output, use, self)
        return tapped

    def split(self, tensor: Tensor, what: str) -> Tensor:
        """View ``[k * n, ...]`` as ``[n, k, ...]``: samples first, then what belongs to one sample.

        Raises:
            ValueError: the first dimension is no multiple of n; names ``what``.
        """
        if tensor.ndim == 0 or tensor.size(0) % self.samples or not tensor.size(0):
            raise ValueError(
                f"{what} got an input of shape {list(tensor.shape)} in a batch of {self.samples} samples: per-sample "
                "gradients need the samples in its first dimension (as many, or a multiple of it, one sample after "
                "the other)"
            )
        return tensor.view(self.samples, tensor.size(0) // self.samples, *tensor.shape[1:])

    def cast(self, tensor: Tensor) -> Tensor:
        """Cast an input as autocast would do it in a matrix product or convolution, once, so that one copy is kept."""
        kind = tensor.device.type
        if tensor.dtype == torch.float32 and torch.is_autocast_enabled(kind):
            return tensor.to(torch.get_autocast_dtype(kind))
        return tensor

    def receive(self, use: LayerUse, gradient: Tensor) -> None:
        """Hand a use the gradient of its output."""
        use.receive(gradient)
        self._on_gradient(use)

    def _trains(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
        for argument in (*args, *kwargs.values()):
            if id(argument) in self._names:
                return True
            if isinstance(argument, list | tuple) and any(id(item) in self._names for item in argument):
                return True
        return False


class _Tap(torch.autograd.Function):
    """The identity; the gradient goes to a use as it passes."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor, use: LayerUse, recorder: Recorder) -> Tensor:
        ctx.recorder, ctx.use = recorder, use
        # what a function returns unchanged becomes a view, and views of functions cannot be changed in place, as
        # nn.ReLU(inplace=True) does; a detached tensor can
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, None, None]:
        if ctx.recorder.counts:
            if ctx.use is None:
                raise RuntimeError("backward ran twice through one recorded forward pass: run the step again instead")
            use, ctx.use = ctx.use, None
            # who runs backward within autocast must not get norms in half precision
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                ctx.recorder.receive(use, gradient)
        return None, gradient if ctx.needs_input_grad[1] else None, None, None
