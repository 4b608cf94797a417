"""Normalisation layers: a sample's gradient is the sum over positions of normalised input times output gradient.

Layer, RMS, group and instance norm look at one sample only. Batch norm does so where its statistics are frozen
(evaluation mode); with the statistics of the batch there is no such thing as one sample's gradient.

Shapes: ``n`` samples of ``k`` rows each (mostly one), ``C`` channels, ``*shape`` of the scale and shift.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lightning_eff.privacy.engine.recording import KeptInput, Recorder, rule
from lightning_eff.privacy.engine.uses import GradientUse, wide


@rule(functional.layer_norm)
def record_layer_norm(
    recorder: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Scale and shift of the trailing dimensions."""
    own = recorder.detached(weight), recorder.detached(bias)
    # what layer_norm itself calls; its statistics save normalising once more
    output, mean, inverse = torch.native_layer_norm(input, normalized_shape, *own, eps)
    mean, inverse = mean.detach(), inverse.detach()
    kept = KeptInput(input, "a layer norm")
    exact = input.dtype == mean.dtype and input.dtype in (torch.float32, torch.float64)

    def normalise() -> Tensor:
        if exact:
            return (kept.get() - mean).mul_(inverse)
        return functional.layer_norm(wide(kept.get()), normalized_shape, eps=eps)

    return _record(
        recorder,
        output,
        (weight, bias),
        normalise,
        range(output.ndim - len(normalized_shape), output.ndim),
        "a layer norm",
    )


@rule(functional.rms_norm)
def record_rms_norm(
    recorder: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Scale of the trailing dimensions."""
    output = functional.rms_norm(input, normalized_shape, recorder.detached(weight), eps)
    kept = KeptInput(input, "an RMS norm")
    # without eps the layer takes that of the input's type
    epsilon = torch.finfo(input.dtype).eps if eps is None else eps
    return _record(
        recorder,
        output,
        (weight, None),
        lambda: functional.rms_norm(wide(kept.get()), normalized_shape, eps=epsilon),
        range(output.ndim - len(normalized_shape), output.ndim),
        "an RMS norm",
    )


@rule(functional.group_norm)
def record_group_norm(
    recorder: Recorder,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Scale and shift of channels."""
    output = functional.group_norm(input, num_groups, recorder.detached(weight), recorder.detached(bias), eps)
    kept = KeptInput(input, "a group norm")
    return _record(
        recorder,
        output,
        (weight, bias),
        lambda: functional.group_norm(wide(kept.get()), num_groups, eps=eps),
        (1,),
        "a group norm",
    )


@rule(functional.instance_norm)
def record_instance_norm(
    recorder: Recorder,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Scale and shift of channels; running statistics are only read."""
    output = functional.instance_norm(
        input,
        running_mean,
        running_var,
        recorder.detached(weight),
        recorder.detached(bias),
        use_input_stats,
        momentum,
        eps,
    )
    kept = KeptInput(input, "an instance norm")

    def normalise() -> Tensor:
        if running_mean is not None and running_var is not None:
            return functional.batch_norm(wide(kept.get()), wide(running_mean), wide(running_var), eps=eps)
        return functional.instance_norm(wide(kept.get()), eps=eps)

    return _record(recorder, output, (weight, bias), normalise, (1,), "an instance norm")


@rule(functional.batch_norm)
def record_batch_norm(
    recorder: Recorder,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Scale and shift of channels, with frozen statistics: see ``statistics.py``."""
    assert running_mean is not None
    assert running_var is not None
    output = functional.batch_norm(
        input,
        running_mean,
        running_var,
        recorder.detached(weight),
        recorder.detached(bias),
        False,
        momentum,
        eps,
    )
    kept = KeptInput(input, "a batch norm")

    def normalise() -> Tensor:
        return functional.batch_norm(wide(kept.get()), wide(running_mean), wide(running_var), eps=eps)

    return _record(recorder, output, (weight, bias), normalise, (1,), "a batch norm")


def _record(
    recorder: Recorder,
    output: Tensor,
    parameters: tuple[Tensor | None, Tensor | None],
    normalise: Callable[[], Tensor],
    dims: Sequence[int],
    what: str,
) -> Tensor:
    """Tap the output of a layer ``normalise(input) * weight + bias`` whose parameters lie along ``dims``."""
    weight, bias = (recorder.part(parameter) for parameter in parameters)
    recorder.split(output, what)  # refuses before any work what has no samples in front
    summed = [dim for dim in range(1, output.ndim) if dim not in dims]

    def compute(gradient: Tensor) -> Mapping[str, Tensor]:
        gradient = wide(gradient)
        gradients = {}
        if bias is not None:
            gradients[bias.name] = _example_sums(recorder, gradient, summed)
        if weight is not None:
            # what was normalised belongs to nobody else
            gradients[weight.name] = _example_sums(recorder, normalise().mul_(gradient), summed)
        return gradients

    return recorder.tap(output, GradientUse((weight, bias), recorder.samples, compute))


def _example_sums(recorder: Recorder, values: Tensor, dims: Sequence[int]) -> Tensor:
    """Sum ``dims`` and the ``k`` rows of each sample, ``[k * n, ...]`` to ``[n, *shape]``."""
    sums = values.sum(list(dims)) if dims else values
    return recorder.split(sums, "a norm").sum(1)
