"""The per-sample engine: norms of each sample's gradient and their clipped sum, one forward and one backward pass.

Nothing is hooked into the module and no gradient is written to its parameters. See ``recording.py`` for how layers are
seen and ``uses.py`` for what each of them computes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_eff.arguments import check_choice, check_number
from lightning_eff.privacy.engine.derived import DerivingRecorder, constants_of
from lightning_eff.privacy.engine.tuning import Tuner
from lightning_eff.privacy.engine.uses import CHUNK_ELEMENTS, LayerUse, slices, square_norm
from lightning_eff.privacy.selection.selected import Selection

Clipping = Literal["flat", "automatic", "per_layer"]


class PerSampleEngine:
    """Compute per-sample gradient norms and the clipped sum of a physical batch.

    Example:
        >>> engine = PerSampleEngine(model)
        >>> with engine.record(len(x)):
        ...     loss = nn.functional.cross_entropy(model(x), y)
        >>> engine.backward(loss)
        >>> gradient = engine.clipped_sum(max_norm=1.0)

    Samples are read from the first dimension of each layer's input: n of them, or k * n rows of which k after the
    other belong to one sample. The loss is the mean over the n samples, and no sample's term may depend on another
    sample.

    Args:
        module: any module; trainable are the parameters with ``requires_grad`` when :meth:`record` is entered.
        memory_budget_mb: megabytes (2**20 bytes) that per-sample gradients may take until they are summed; 0 keeps
            none, which takes more time.
        tune: choose among equivalent computations by timing them, once for each layer shape. The choice changes
            rounding, so False, which goes by the number of operations, makes runs repeatable bit for bit.

    Raises:
        ValueError: ``memory_budget_mb`` is negative.
    """

    def __init__(self, module: nn.Module, *, memory_budget_mb: float = 256, tune: bool = True) -> None:
        check_number("memory_budget_mb", memory_budget_mb, least=0)
        self.module = module
        self._tuner = Tuner(int(memory_budget_mb * 2**20), timed=tune)
        self._selections: dict[str, Selection] = {}
        self._told_unused: set[str] = set()
        self._batch: _Batch | None = None

    def select(self, selections: Mapping[str, Selection] | None) -> None:
        """Say which coordinates take part from the next :meth:`record` on.

        Args:
            selections: by parameter name, on the parameters' device; a name that is missing is wholly active, None
                makes everything active.

        Raises:
            ValueError: a name is no parameter of the module, or a shape is another one.
        """
        selections = dict(selections or {})
        shapes = {name: parameter.shape for name, parameter in self.module.named_parameters()}
        wrong = {name: list(s.shape) for name, s in selections.items() if shapes.get(name) != s.shape}
        if wrong:
            expected = {name: list(shapes[name]) if name in shapes else "no such parameter" for name in wrong}
            raise ValueError(f"expected selections of shape {expected}, got {wrong}")
        self._selections = selections

    @contextmanager
    def record(self, samples: int) -> Iterator[None]:
        """Record the layers that are called inside; begins a new physical batch and drops what the last one left.

        Args:
            samples: n, the number of samples the step inside works on, >= 1.

        Raises:
            ValueError: ``samples`` is less than one, or the module has nothing to train.
        """
        if samples < 1:
            raise ValueError(f"expected at least one sample, got {samples}: an empty batch has no gradient to record")
        self.reset()
        parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError(f"nothing to train: no parameter of {type(self.module).__name__} has requires_grad")
        self._batch = _Batch(parameters, self._selections, samples, self._tuner, constants_of(self.module))
        with self._batch.recorder:
            yield

    def backward(self, loss: Tensor) -> None:
        """Run ``(n * loss).backward()``; nothing where no active parameter is behind the loss.

        Args:
            loss: scalar, the mean over the n samples.
        """
        batch = self._recorded()
        if loss.requires_grad:
            batch.recorder.counts = True
            (batch.recorder.samples * loss).backward()  # type: ignore[no-untyped-call]
        batch.went_back = True

    def norms(self) -> Tensor:
        """Return the norm of each sample's gradient over all active coordinates, ``[n]``, float32 or wider."""
        return self._finished().norms()

    def layer_norms(self) -> dict[str, Tensor]:
        """Return the norms by layer, ``[n]`` each; a layer is the parameters of one submodule, ``""`` for the root."""
        return self._finished().layer_norms()

    def leave_out(self, samples: Tensor) -> None:
        """Let samples of the recorded batch contribute zero to its sum; their norms stay.

        Args:
            samples: indices, ``[m]`` int64.
        """
        batch = self._finished()
        kept = torch.ones(batch.recorder.samples, dtype=torch.bool, device=samples.device)
        kept[samples] = False
        batch.finite = kept if batch.finite is None else batch.finite & kept

    def clipped_sum(self, max_norm: float, clipping: Clipping = "flat") -> dict[str, Tensor]:
        """Clip each sample's gradient to ``max_norm``, sum, and let go of everything that was recorded.

        Args:
            max_norm: C > 0; removing one sample changes the result by at most C in Euclidean norm.
            clipping: ``"flat"``: factor ``min(1, C / (norm + 1e-6))``; ``"automatic"``: ``C / (norm + 0.01)``;
                ``"per_layer"``: flat for each of L layers by itself, with ``C / sqrt(L)``.

        Returns:
            By parameter name the block of the sum (``Selection.block_shape``), float32 or wider, zero where the mask
            is False; every trainable parameter is there, also one of which nothing is active or that was not used. An
            sample whose gradient is not finite contributes zero, with a warning.

        Raises:
            ValueError: ``max_norm`` is not positive and finite, or ``clipping`` is another word.
            RuntimeError: nothing was recorded, or the sum was taken before; a parameter got a gradient on a way that
                is not recorded.
        """
        check_number("max_norm", max_norm, above=0)
        check_choice("clipping", clipping, ("flat", "automatic", "per_layer"))
        batch = self._finished()
        if batch.summed:
            raise RuntimeError("the sum of this batch was taken before and its tensors are gone: record it again")
        batch.summed = True
        factors = batch.factors(max_norm, clipping)
        sums: dict[str, Tensor] = {}
        with batch.full_precision():
            while batch.received:
                use = batch.received.pop()
                for name, added in use.clipped_sums({name: factors[name] for name in use.selections}).items():
                    sums[name] = sums[name] + added if name in sums else added
        return {name: sums[name] if name in sums else batch.zeros(name) for name in batch.parameters}

    def reset(self) -> None:
        """Let go of everything that was recorded."""
        if self._batch is not None:
            # the recorder points back at the batch: without this, tensors would wait for the garbage collector
            self._batch.received.clear()
        self._batch = None
        self._tuner.start_batch()

    @property
    def unused(self) -> list[str]:
        """Names of trainable parameters that the recorded step did not use; their gradient is zero."""
        return self._recorded().unused

    def _recorded(self) -> _Batch:
        if self._batch is None:
            raise RuntimeError("nothing was recorded: run the step inside of `with engine.record(n):` first")
        return self._batch

    def _finished(self) -> _Batch:
        batch = self._recorded()
        if batch.total is None:
            with batch.full_precision():
                batch.finish()
            self._tell_unused(batch.unused)
            if batch.finite is not None:
                warnings.warn(
                    "a per-sample gradient is not finite: it contributes zero. Look at the learning rate and the data",
                    stacklevel=3,
                )
        return batch

    def _tell_unused(self, names: list[str]) -> None:
        new = [name for name in names if name not in self._told_unused]
        if new:
            self._told_unused.update(new)
            warnings.warn(
                f"{new} did not take part in the step: their gradient counts as zero. Set requires_grad to False where "
                "that is meant",
                stacklevel=4,
            )


class _Batch:
    """What one physical batch leaves until its sum is taken."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        selections: Mapping[str, Selection],
        samples: int,
        tuner: Tuner,
        constants: list[Tensor],
    ) -> None:
        self.parameters = parameters
        self.selections = selections
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.recorder = DerivingRecorder(names, selections, samples, tuner, self.on_gradient, constants)
        self.received: list[LayerUse] = []
        self.squares: dict[str, Tensor] = {}
        self.total: Tensor | None = None
        self.finite: Tensor | None = None
        self.went_back = False
        self.summed = False
        self._gradients_before = {name: _fingerprint(parameter) for name, parameter in parameters.items()}

    @property
    def unused(self) -> list[str]:
        return [name for name in self.parameters if name not in self.recorder.seen]

    def full_precision(self) -> torch.autocast:
        """Keep autocast out: a norm in half precision can be too small."""
        return torch.autocast(next(iter(self.parameters.values())).device.type, enabled=False)

    def on_gradient(self, use: LayerUse) -> None:
        """Take the norms of a layer as soon as its gradient is there, so that it can let go of what they need."""
        if self.total is not None:
            raise RuntimeError("a gradient came after the norms were taken: run one backward pass, then ask for norms")
        self.received.append(use)
        names = [name for name in use.selections if self.recorder.times_used[name] == 1]
        if names:
            self.squares.update(use.square_norms(names))

    def finish(self) -> None:
        """Complete the squared norms, and take samples out whose gradient is not finite."""
        self._refuse_stray_gradients()
        if self.recorder.times_used and not (self.received or self.went_back):
            raise RuntimeError("no gradient has come back: call engine.backward(loss) before norms or sums")
        for name, times in self.recorder.times_used.items():
            uses = [use for use in self.received if name in use.selections]
            if times > 1 and uses:
                self.squares[name] = _norm_of_sum(uses, name, self.recorder.samples)
        if self.squares:
            self.total = torch.stack(list(self.squares.values())).sum(0)
        else:
            self.total = self.zeros(next(iter(self.parameters))).new_zeros(self.recorder.samples)
        finite = self.total.isfinite()
        if not finite.all():
            self.finite = finite
            index = finite.logical_not().nonzero().squeeze(1)
            for use in self.received:
                use.zero_samples(index)

    def norms(self) -> Tensor:
        assert self.total is not None
        return self.total.sqrt()

    def layer_norms(self) -> dict[str, Tensor]:
        layers: dict[str, Tensor] = {}
        for name, square in self.squares.items():
            layer = _layer(name)
            layers[layer] = layers[layer] + square if layer in layers else square
        return {layer: square.sqrt() for layer, square in layers.items()}

    def factors(self, max_norm: float, clipping: Clipping) -> dict[str, Tensor]:
        """Return the clip factors, ``[n]``, of each parameter."""
        if clipping == "per_layer":
            # counted from the selection alone: how many layers a sample used may depend on the sample
            layers = {
                _layer(name)
                for name in self.parameters
                if name not in self.selections or not self.selections[name].is_empty
            }
            share = max_norm / math.sqrt(max(1, len(layers)))
            by_layer = {layer: self._only_finite(_clip(norm, share)) for layer, norm in self.layer_norms().items()}
            return {name: by_layer[_layer(name)] for name in self.squares}
        norm = self.norms()
        factor = _clip(norm, max_norm) if clipping == "flat" else max_norm / (norm + 0.01)
        return dict.fromkeys(self.squares, self._only_finite(factor))

    def zeros(self, name: str) -> Tensor:
        """Return the block of a parameter that has no gradient."""
        parameter, chosen = self.parameters[name], self.selections.get(name)
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        shape = parameter.shape if chosen is None else chosen.block_shape
        return torch.zeros(shape, dtype=dtype, device=parameter.device)

    def _only_finite(self, factor: Tensor) -> Tensor:
        return factor if self.finite is None else torch.where(self.finite, factor, 0.0)

    def _refuse_stray_gradients(self) -> None:
        stray = [name for name, p in self.parameters.items() if _fingerprint(p) != self._gradients_before[name]]
        if stray:
            # what came is private and must not stay behind
            for name in stray:
                self.parameters[name].grad = None
            raise RuntimeError(
                f"{stray} got a gradient on a way that is not recorded, so it cannot be clipped: a penalty on weights "
                "in the loss, or an operation without a rule. Take it out (weight decay belongs into the optimizer), "
                "or tell the engine about the operation with register_rule"
            )


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _clip(norm: Tensor, max_norm: float) -> Tensor:
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _norm_of_sum(uses: list[LayerUse], name: str, samples: int) -> Tensor:
    """Return the squared norms, ``[n]``, of a parameter used several times: of the sum, never the sum of norms."""
    size = CHUNK_ELEMENTS // max(1, math.prod(uses[0].selections[name].block_shape))
    parts = []
    for part in slices(samples, size):
        gradient = uses[0].per_sample(name, part)
        for use in uses[1:]:
            gradient = gradient + use.per_sample(name, part)
        parts.append(square_norm(gradient))
    return torch.cat(parts)


def _fingerprint(parameter: nn.Parameter) -> tuple[int, int]:
    """Tell whether a gradient is another one than before: which tensor, and how often it was written to."""
    gradient = parameter.grad
    return (0, 0) if gradient is None else (id(gradient), gradient._version)
