"""What private training refuses before it looks at a sample, and says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.optim import LBFGS, Optimizer

NORM_LAYERS = (_NormBase,)
"""Layers that may use statistics of the batch."""
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")
"""Precisions with which the bound on a gradient's norm holds."""


def check_trainer(trainer: Trainer, module: LightningModule) -> None:
    """Refuse a Trainer or module that takes the step out of our hands, or looks at data nobody accounts for.

    Raises:
        ValueError: Says what and what to do instead.
    """
    if reason := getattr(module, "refuses", {}).get("private training"):
        raise ValueError(f"{type(trainer.strategy).__name__} in a fit of {type(module).__name__}: {reason}")
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes by hand (automatic_optimization = False), so that nobody else can clip "
            "and noise its gradients: let Lightning optimize; several optimizers become one with parameter groups"
        )
    if trainer.accumulate_grad_batches != 1 or _has(trainer, GradientAccumulationScheduler):
        raise ValueError(
            "accumulate_grad_batches > 1 adds gradients up after they were clipped and noised: take the batch size you "
            "want to train with and max_physical_batch_size=, which bounds the memory"
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"{type(module).__name__}.training_step(dataloader_iter) fetches batches by itself, so that they cannot be "
            "split into samples: take a batch"
        )
    if trainer.overfit_batches > 0:  # type: ignore[attr-defined]
        raise ValueError("overfit_batches > 0 takes the same samples in every step, Poisson sampling does not")
    if _has(trainer, LearningRateFinder) or _has(trainer, BatchSizeFinder):
        raise ValueError(
            "a tuner chooses by training losses that epsilon does not cover: find learning rate and batch size on "
            "public data"
        )
    has_batch_norm = any(isinstance(layer, _BatchNorm) for layer in module.modules())
    if has_batch_norm and _has(trainer, StochasticWeightAveraging):
        raise ValueError(
            "StochasticWeightAveraging computes the statistics of batch normalisation anew, from private data and "
            "without noise: replace the layers by GroupNorm, or use WeightAveraging"
        )
    check_compiled(module)
    check_batch_statistics(module)
    check_experts(module)


def check_precision(precision: Precision) -> None:
    """Refuse precisions that scale the loss or overflow.

    Raises:
        ValueError: Names what works.
    """
    if precision.precision not in PRECISIONS:
        raise ValueError(
            f"precision {precision.precision!r} scales losses or rounds norms, so that a clipped gradient could pass "
            f"its bound: use one of {', '.join(PRECISIONS)}"
        )


def check_compiled(module: LightningModule) -> None:
    """Refuse compiled modules: calls of layers inside of them cannot be seen.

    Raises:
        ValueError: Names them.
    """
    compiled = [
        name or type(module).__name__
        for name, layer in module.named_modules()
        if isinstance(layer, OptimizedModule) or layer._compiled_call_impl is not None
    ]
    if module._compiler_ctx is not None and not compiled:
        compiled = [type(module).__name__]
    if compiled:
        raise ValueError(
            f"{compiled} is compiled, and per-sample gradients need to see the calls of its layers: train it without "
            "torch.compile, and compile it for inference"
        )


def check_experts(module: nn.Module) -> None:
    """Refuse to train layers that say by ``mixes_samples`` that their loss is one of the whole batch.

    Raises:
        ValueError: Names them and the way out.
    """
    mixing = {
        name: layer
        for name, layer in module.named_modules()
        if getattr(layer, "mixes_samples", "") and any(p.requires_grad for p in layer.parameters())
    }
    if mixing:
        layer: Any = next(iter(mixing.values()))
        raise ValueError(
            f"{first_few(list(mixing))} ({type(layer).__name__}): {layer.mixes_samples}. Train the dense network "
            "privately and put experts in afterwards (replace_ffn(..., init='upcycle') keeps what it computes), or "
            "freeze them with requires_grad_(False)"
        )


def uses_batch_statistics(layer: nn.Module) -> bool:
    """Whether a layer now normalises with statistics of the batch, or keeps statistics of what it sees."""
    if not isinstance(layer, _NormBase):
        return False
    if isinstance(layer, _BatchNorm):
        return layer.training or layer.running_mean is None
    return layer.training and bool(layer.track_running_stats)


def check_batch_statistics(module: nn.Module) -> None:
    """Refuse normalisation by batch statistics: it makes a sample's gradient depend on the others.

    Raises:
        ValueError: Names the layers and both ways out.
    """
    refuse_batch_statistics([(name, layer) for name, layer in module.named_modules() if uses_batch_statistics(layer)])


def refuse_batch_statistics(layers: Sequence[tuple[str, nn.Module]]) -> None:
    """Raise ValueError for layers that use batch statistics; nothing for none."""
    if layers:
        names = first_few([f"{name} ({type(layer).__name__})" for name, layer in layers])
        raise ValueError(
            "statistics of the batch mix samples, and running ones keep them without noise, whether the layer is "
            f"frozen or not: {names}. Replace each by nn.GroupNorm, or put it into evaluation mode with statistics of "
            "public data: call eval() on it in __init__, configure_model or setup of the module, and keep it there"
        )


def first_few(names: Sequence[str], most: int = 3) -> str:
    """Tell some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def trained_parameters(module: nn.Module, optimizers: Sequence[Optimizer]) -> Mapping[str, nn.Parameter]:
    """Return by name the parameters that require a gradient and that the optimizer changes.

    Raises:
        ValueError: There are none, or the optimizer needs several gradients a step, or has parameters that the module
            does not own; or hooks wait for gradients that never come.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise ValueError("LBFGS asks for several gradients of one batch: use an optimizer that takes one, such as SGD")
    optimized = {id(parameter): parameter for parameter in optimized_parameters(optimizers)}
    found = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and id(parameter) in optimized
    }
    if not found:
        trainable = sum(parameter.requires_grad for parameter in module.parameters())
        raise ValueError(
            f"nothing to train: {trainable} parameters require a gradient, and none of them is in the optimizer "
            "(configure_optimizers)"
        )
    owned = {id(parameter) for parameter in module.parameters()}
    strange = [list(p.shape) for key, p in optimized.items() if key not in owned and p.requires_grad]
    if strange:
        raise ValueError(
            f"the optimizer has parameters of shapes {strange} that are not among those of {type(module).__name__}, so "
            "that nothing would clip and noise their gradients: register them (as nn.Parameter attributes, or in "
            "nn.ParameterList, not in a plain list), or leave them out"
        )
    hooked = [name for name, p in found.items() if p._backward_hooks or p._post_accumulate_grad_hooks]
    if hooked:
        raise ValueError(
            f"{hooked} have hooks for their gradient (register_hook or register_post_accumulate_grad_hook), which "
            "private training never calls: autograd makes no gradient of theirs. Remove the hooks; "
            "on_before_optimizer_step sees the private gradient"
        )
    return found


def optimized_parameters(optimizers: Sequence[Optimizer]) -> list[nn.Parameter]:
    """Everything that optimizers change."""
    return [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]


def monitors_of_training_metrics(trainer: Trainer, schedulers: Sequence[LRSchedulerConfig]) -> list[str]:
    """Tell by a sentence each who goes by a metric that was logged of private training batches."""
    results = trainer.fit_loop.epoch_loop._results
    logged = {result.meta.name for result in results.values() if not result.meta.name.startswith("privacy/")}
    names = {name + ending for name in logged for ending in ("", "_step", "_epoch")}
    monitors = [(type(s.scheduler).__name__, s.monitor) for s in schedulers if s.reduce_on_plateau]
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    monitors += [(type(callback).__name__, getattr(callback, "monitor", None)) for callback in callbacks]
    return [
        f"{who} goes by {monitor!r}, which was logged of private training batches without noise."
        for who, monitor in monitors
        if monitor in names
    ]


def _has(trainer: Trainer, kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in trainer.callbacks)  # type: ignore[attr-defined]
