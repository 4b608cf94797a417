"""Functions nobody wrote a rule for: the gradient of each sample by running the function once more, for it alone.

That is one `vmap` of the one function, never of the whole model; where `vmap` cannot run it (recurrent layers), a loop,
which is told once. Each sample goes back once for all parameters and all outputs of the call together.
Before a function is recorded in this way it must show that it treats samples one by one: what it gives for the first
and for the last sample alone must be what it gave for them in the batch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils import _pytree as pytree

from lightning_eff.privacy.engine.derived import DerivingRecorder
from lightning_eff.privacy.engine.recording import FALLBACKS, RULES, KeptInput, Recorder
from lightning_eff.privacy.engine.uses import CHUNK_ELEMENTS, LayerUse, block, slices, square_norm, weighted_sum, wide

logger = logging.getLogger(__name__)
_told: set[str] = set()


def record_any(recorder: Recorder, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Record a function of parameters, constants and tensors that have the samples first.

    NotImplemented where it does not treat samples one by one; its parameters then get an ordinary gradient.
    """
    name = resolve_name(function) or getattr(function, "__name__", str(function))
    if name.endswith("_") and not name.endswith("__"):
        return NotImplemented  # it cannot be run once more
    call = Call(recorder, function, args, kwargs)
    output = function(*call.args, **call.kwargs)
    # a constant may hold something of each sample, for example the zeros a state begins with
    for spread in (False, True):
        if call.lay_out(spread) and call.agrees_with(output):
            if name not in _told:
                _told.add(name)
                logger.info("%s has no rule of its own: its per-sample gradients come from running it again", name)
            return call.record(output)
    return NotImplemented


def record_recurrent(function: Callable[..., Any], recorder: Recorder, *args: Any) -> Any:
    """Record a recurrent layer: samples lie along dimension 1 of its states.

    Raises:
        ValueError: the input is a packed sequence, or has dropout between layers.
    """
    name = resolve_name(function)
    if len(args) != 9 or isinstance(args[3], list | tuple):
        raise ValueError(
            f"{name} got packed sequences, which have no dimension of samples: give it padded ones "
            "[batch, length, features]"
        )
    if args[5] and args[6] and args[4] > 1:
        raise ValueError(f"{name} with dropout between its layers cannot be run again for each sample: set dropout=0")
    call = Call(recorder, function, args, {}, loop=True)
    output = function(*call.args)
    first = 0 if args[8] else 1
    call.dims = [None if kept is None else (1 if index else first) for index, kept in enumerate(call.tensors)]
    call.output_dims = [first, *[1] * (len(output) - 1)]
    if not call.fits() or not call.agrees_with(output):
        raise ValueError(
            f"{name} got an input of shape {list(args[0].shape)} with batch_first={args[8]} in a batch of "
            f"{recorder.samples} samples: the samples must lie along dimension {first}"
        )
    return call.record(output)


class Call:
    """A call of a function, and how to repeat it for one sample.

    Args:
        recorder: tells parameters from other tensors.
        function: what was called.
        args: its arguments; tensors may be in lists, tuples and dicts.
        kwargs: likewise.
        loop: go through the samples one after the other and do not try `vmap`.
    """

    def __init__(
        self,
        recorder: Recorder,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        loop: bool = False,
    ) -> None:
        self.recorder, self.function, self.loop = recorder, function, loop
        self._name = resolve_name(function) or getattr(function, "__name__", str(function))
        self._tapped: list[int] = []
        leaves, self._spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        self._leaves = [recorder.detached(leaf) for leaf in leaves]
        self.args, self.kwargs = pytree.tree_unflatten(self._leaves, self._spec)
        parts = [recorder.part(leaf) for leaf in leaves]
        self.parts = list({part.name: part for part in parts if part is not None}.values())
        self._names = [None if part is None else part.name for part in parts]
        self.parameters = {name: leaf for name, leaf in zip(self._names, self._leaves, strict=True) if name is not None}
        # tensors that may hold something of each sample
        self.tensors = [
            KeptInput(leaf, self._name) if isinstance(leaf, Tensor) and recorder.name_of(leaf) is None else None
            for leaf in leaves
        ]
        self._constant = [
            isinstance(leaf, Tensor) and isinstance(recorder, DerivingRecorder) and recorder.is_constant(leaf)
            for leaf in leaves
        ]
        self.dims: list[int | None] = []
        self.output_dims: list[int] = []
        # autograd runs where autocast is off
        kind = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
        enabled = torch.is_autocast_enabled(kind)
        self._autocast = (kind, torch.get_autocast_dtype(kind), enabled)

    def lay_out(self, spread: bool) -> bool:
        """Take the first dimension for that of the samples; ``spread``: of constants that are as long, too.

        Returns:
            Whether the shapes allow it.
        """
        self.dims, self.output_dims = [], [0]
        for kept, constant in zip(self.tensors, self._constant, strict=True):
            if kept is None:
                self.dims.append(None)
                continue
            shape = kept.get().shape
            leads = bool(shape) and shape[0] > 0 and shape[0] % self.recorder.samples == 0
            if not leads and not constant:
                return False
            self.dims.append(0 if leads and (spread or not constant) else None)
        return any(dim is not None for dim in self.dims)

    def fits(self) -> bool:
        """Whether every tensor can be cut into samples along its dimension."""
        return all(
            kept is None or dim is None or (dim < kept.get().ndim and kept.get().size(dim) % self.recorder.samples == 0)
            for kept, dim in zip(self.tensors, self.dims, strict=True)
        )

    def samples(self) -> list[Tensor]:
        """Return the tensors that hold something of each sample, samples first, ``[n, ...]``."""
        return [
            self._examples_first(kept.get(), dim)
            for kept, dim in zip(self.tensors, self.dims, strict=True)
            if kept is not None and dim is not None
        ]

    def repeat(self, parameters: Mapping[str, Tensor], example: Sequence[Tensor]) -> Any:
        """Run the function for one sample with some values of the parameters."""
        own = iter(example)
        leaves = [
            parameters[name] if name is not None else leaf if dim is None else next(own)
            for name, leaf, dim in zip(self._names, self._leaves, self.dims, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        kind, dtype, enabled = self._autocast
        with torch.autocast(kind, dtype, enabled) if enabled else torch.autocast(kind, enabled=False):
            return self.function(*args, **kwargs)

    @torch.no_grad()
    def agrees_with(self, output: Any) -> bool:
        """Whether the first and the last sample alone give what they gave in the batch."""
        outputs = _outputs(output)
        if outputs is None:
            return False
        dims = self.output_dims * len(outputs) if len(self.output_dims) == 1 else self.output_dims
        n = self.recorder.samples
        if any(o.ndim <= dim or not o.size(dim) or o.size(dim) % n for o, dim in zip(outputs, dims, strict=True)):
            return False
        self.output_dims = dims
        inputs = self.samples()
        for i in {0, n - 1}:
            try:
                alone = _outputs(self.repeat(self.parameters, [tensor[i] for tensor in inputs]))
            except RuntimeError:  # shapes that do not fit: the tensors are no rows of samples
                return False
            if alone is None or len(alone) != len(outputs):
                return False
            for one, all_, dim in zip(alone, outputs, dims, strict=True):
                if not _close(one, self._examples_first(all_, dim)[i]):
                    return False
        return True

    def record(self, output: Any) -> Any:
        """Tap all outputs that can have a gradient, as one tensor: a use then hears once of all of them."""
        outputs = _outputs(output)
        assert outputs is not None
        self._tapped = [which for which, tensor in enumerate(outputs) if tensor.is_floating_point()]
        if self.loop:
            self._tell_loop()
        if len(self._tapped) == 1:
            (which,) = self._tapped
            outputs[which] = self.recorder.tap(outputs[which], CallUse(self))
        elif self.parts and self._tapped:
            joined = self.recorder.tap(self._joined(outputs), CallUse(self))
            start = 0
            for which in self._tapped:
                one, dim = outputs[which], self.output_dims[which]
                shape = self._examples_first(one, dim).shape
                stop = start + shape[1:].numel()
                rows = joined[:, start:stop].view(shape).movedim(0, dim)
                outputs[which] = rows.reshape(one.shape).to(one.dtype).contiguous()
                start = stop
        return outputs[0] if isinstance(output, Tensor) else type(output)(outputs)

    def gradients(self, gradient: Tensor, samples: slice) -> dict[str, Tensor]:
        """Return by parameter the gradients of some samples, ``[m, *shape]``.

        Args:
            gradient: of the outputs, from :meth:`rows`.
            samples: which of them.
        """
        inputs = [tensor[samples] for tensor in self.samples()]

        def back(gradient: Tensor, *example: Tensor) -> dict[str, Tensor]:
            def run(parameters: dict[str, Tensor]) -> Tensor:
                outputs = _outputs(self.repeat(parameters, example))
                assert outputs is not None
                if len(self._tapped) == 1:
                    return outputs[self._tapped[0]]
                return torch.cat([outputs[which].flatten() for which in self._tapped])

            # kernels of recurrent layers keep what their backward needs only where the mode around vjp allows it
            with torch.enable_grad():
                found: dict[str, Tensor] = torch.func.vjp(run, self.parameters)[1](gradient)[0]
            return found

        rows = gradient[samples]
        if not self.loop:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop")
                    return torch.func.vmap(back)(rows, *inputs)
            except RuntimeError:
                self.loop = True
                self._tell_loop()
        found = [back(*row) for row in zip(rows, *inputs, strict=True)]
        return {name: torch.stack([one[name] for one in found]) for name in self.parameters}

    def rows(self, gradient: Tensor) -> Tensor:
        """Return the gradient of what was tapped, samples first."""
        if len(self._tapped) == 1:
            return self._examples_first(gradient, self.output_dims[self._tapped[0]])
        return gradient

    def _joined(self, outputs: Sequence[Tensor]) -> Tensor:
        """All tapped outputs side by side, ``[n, numbers of a sample]``."""
        parts = [self._examples_first(outputs[which], self.output_dims[which]).flatten(1) for which in self._tapped]
        return torch.cat(parts, 1)

    def _tell_loop(self) -> None:
        layers = sorted({part.name.rpartition(".")[0] or part.name for part in self.parts})
        key = f"loop {self._name} {layers}"
        if layers and key not in _told:
            _told.add(key)
            logger.warning(
                "per-sample gradients of %s (%s) are made in a loop, one sample after the other: a step takes about "
                "as long as with batches of one",
                ", ".join(layers),
                self._name,
            )

    def _examples_first(self, tensor: Tensor, dim: int) -> Tensor:
        n = self.recorder.samples
        return tensor.reshape(*tensor.shape[:dim], n, tensor.size(dim) // n, *tensor.shape[dim + 1 :]).movedim(dim, 0)


class CallUse(LayerUse):
    """The use of a function: of all its parameters through all its outputs.

    Per-sample gradients are made once and kept where the memory budget allows it.

    Args:
        call: the function and its arguments.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(call.parts, call.recorder.samples)
        self._call = call
        self._gradient: Tensor | None = None
        self._out: Tensor | None = None
        self._kept: dict[str, Tensor] | None = None
        self._asked_to_keep = False

    def receive(self, gradient: Tensor) -> None:
        """Keep it."""
        self._gradient = self._call.rows(gradient)

    def per_sample(self, name: str, samples: slice) -> Tensor:
        """Run the function again for some samples, or look up what was kept, ``[m, *block]``."""
        return self._blocks(samples)[name]

    def zero_samples(self, index: Tensor) -> None:
        """Remember whose gradients to make zero: what goes into the function may itself be infinite."""
        self._out = index

    def square_norms(self, names: Collection[str]) -> dict[str, Tensor]:
        """One run for all parameters."""
        parts = [self._blocks(part) for part in self._slices()]
        return {name: torch.cat([square_norm(part[name]) for part in parts]) for name in names}

    def clipped_sums(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One run for all parameters, none where they were kept."""
        sums: dict[str, Tensor] = {}
        for part in self._slices():
            for name, gradients in self._blocks(part).items():
                added = weighted_sum(factors[name][part], gradients)
                sums[name] = sums[name] + added if name in sums else added
        return sums

    def _slices(self) -> Any:
        size = max(parameter.numel() for parameter in self._call.parameters.values())
        return slices(self.samples, CHUNK_ELEMENTS // max(1, size))

    def _blocks(self, samples: slice) -> dict[str, Tensor]:
        if not self._asked_to_keep:
            self._asked_to_keep = True
            numbers = sum(chosen.block_shape.numel() for chosen in self.selections.values())
            bytes_each = max(4, *(one.element_size() for one in self._call.parameters.values()))
            if self._call.recorder.tuner.store(self.samples * numbers * bytes_each):
                parts = [self._made(part) for part in self._slices()]
                self._kept = {name: torch.cat([part[name] for part in parts]) for name in self.selections}
        if self._kept is None:
            blocks = self._made(samples)
        else:
            blocks = {name: kept[samples] for name, kept in self._kept.items()}
        if self._out is None:
            return blocks
        index = torch.arange(self.samples, device=self._out.device)[samples]
        out = torch.isin(index, self._out)
        return {name: torch.where(out.view(-1, *[1] * (b.ndim - 1)), 0.0, b) for name, b in blocks.items()}

    def _made(self, samples: slice) -> dict[str, Tensor]:
        assert self._gradient is not None
        found = self._call.gradients(self._gradient, samples)
        return {name: block(wide(found[name]), chosen) for name, chosen in self.selections.items()}


def _outputs(output: Any) -> list[Tensor] | None:
    """Return the tensors a function gave; None where it gave something else too."""
    outputs = [output] if isinstance(output, Tensor) else output
    if isinstance(outputs, list | tuple) and outputs and all(isinstance(tensor, Tensor) for tensor in outputs):
        return list(outputs)
    return None


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    tolerance = torch.finfo(one.dtype).eps ** 0.6
    scale = other.abs().nan_to_num(0.0, 0.0).amax() if other.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=float(tolerance * scale), equal_nan=True)


def _recurrent(function: Callable[..., Any]) -> Callable[..., Any]:
    def record(recorder: Recorder, *args: Any) -> Any:
        return record_recurrent(function, recorder, *args)

    return record


for _function in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
    RULES[_function] = _recurrent(_function)
FALLBACKS.append(record_any)
