"""Public data for choosing what to train: proof that it is not the private data, and mean gradients on it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_eff.batch import LossFunction
from lightning_eff.surgery.state import quiet_model, untouched_generators

# A data module stands for its training loader.
PublicSource = LightningDataModule | Dataset[Any] | DataLoader[Any] | Sequence[Any]


def public_loader(source: PublicSource) -> Iterable[Any]:
    """Return an iterable of batches that can be started again and again.

    Raises:
        ValueError: it is none, or can be read only once.
    """
    if isinstance(source, LightningDataModule):
        source.prepare_data()
        source.setup("fit")
        return public_loader(source.train_dataloader())
    if isinstance(source, Dataset):
        return DataLoader(source, batch_size=256)
    if isinstance(source, Iterable) and not isinstance(source, Iterator | Mapping | Tensor | str):
        return source
    raise ValueError(
        "expected public_data to be a LightningDataModule, a Dataset, or a DataLoader or list of batches, got a "
        f"{type(source).__name__}"
    )


def check_not_private(public: Any, private: Any, argument: str) -> None:
    """Refuse public data that holds samples of the private data.

    Seen are the same data set object, parts of it, and equal tensors; a second copy read from the disk by another
    class is not.

    Args:
        public: loader or data set.
        private: loader, data set, or several loaders as list, tuple or dict.
        argument: what the user set, for the message.

    Raises:
        ValueError: they have samples in common.
    """
    if shared := holds_private(public, private):
        raise ValueError(
            f"{argument} holds samples of the private training data ({shared}): scores made with it would not be "
            "covered by epsilon. Pass data that nobody needs to protect and that is not trained on, or choose without "
            'data: "random" or "magnitude"'
        )


def holds_private(public: Any, private: Any) -> str:
    """Return the class of a data set that both have samples of, ``""`` for none; see :func:`check_not_private`."""
    ours = list(_pieces(public))
    for one, its_samples in _pieces(private):
        for other, samples in ours:
            if not _same_data(one, other):
                continue
            if its_samples is not None and samples is not None and its_samples.isdisjoint(samples):
                continue
            return type(one).__name__
    return ""


def _pieces(data: Any) -> Iterator[tuple[Any, frozenset[int] | None]]:
    """Data sets at the bottom of loaders, subsets and concatenations, with the samples taken; None is all."""
    if isinstance(data, Mapping):
        data = list(data.values())
    if isinstance(data, LightningDataModule):
        data = public_loader(data)
    if isinstance(data, list | tuple):
        for part in data:
            if not isinstance(part, Tensor):
                yield from _pieces(part)
    elif isinstance(data, Subset):
        indices = [int(index) for index in data.indices]
        for piece, samples in _pieces(data.dataset):
            if isinstance(data.dataset, ConcatDataset):
                yield piece, samples  # all of it: which part an index falls into is not worth following
            else:
                yield piece, frozenset(indices if samples is None else _nested(data.dataset, indices))
    elif isinstance(data, ConcatDataset):
        for part in data.datasets:
            yield from _pieces(part)
    elif isinstance(data, Dataset) or not hasattr(data, "dataset"):
        yield data, None
    elif isinstance(data.dataset, Dataset):
        yield from _pieces(data.dataset)
    else:  # anything with a length can be a loader's data set
        yield data.dataset, None


def _nested(outer: Any, indices: list[int]) -> Iterator[int]:
    """Indices in the data set at the bottom of a chain of subsets."""
    while isinstance(outer, Subset):
        indices = [int(outer.indices[index]) for index in indices]
        outer = outer.dataset
    return iter(indices)


def _same_data(one: Any, other: Any) -> bool:
    if one is other:
        return True
    mine, theirs = _tensors(one), _tensors(other)
    return bool(mine) and any(
        a.shape == b.shape and a.dtype == b.dtype and a.numel() > 0 and torch.equal(a, b)
        for a in mine
        for b in theirs
        if a.ndim > 1  # labels alone may well be equal
    )


def _tensors(dataset: Any) -> list[Tensor]:
    if isinstance(dataset, TensorDataset):
        return list(dataset.tensors)
    return [value for value in getattr(dataset, "__dict__", {}).values() if isinstance(value, Tensor)]


def mean_gradients(
    module: nn.Module,
    batches: Iterable[Any],
    parameters: Mapping[str, Tensor],
    *,
    loss_fn: LossFunction | None = None,
    most: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Average the gradient of the loss over batches, in evaluation mode.

    Nothing of the module changes and no gradient is left in it; what it logs meanwhile goes nowhere.

    Args:
        module: the network or LightningModule.
        batches: of public data.
        parameters: by name, whose gradients are wanted.
        loss_fn: ``(model, batch) -> loss``, the mean over the batch; None asks ``training_step`` of a copy of the
            module.
        most: batches at most; None takes all.
        seed: of the loader's order. The global generators are given back as they were.

    Returns:
        By name, of the parameter's shape; zeros where the loss does not depend on it.

    Raises:
        ValueError: there is no batch, or the module has no training step and ``loss_fn`` is missing.
    """
    if loss_fn is None and not isinstance(module, LightningModule):
        raise ValueError(
            f"{type(module).__name__} has no training_step: pass loss_fn, a function (model, batch) -> loss"
        )
    device = next((parameter.device for parameter in parameters.values()), torch.device("cpu"))
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    count = 0
    with ExitStack() as stack:
        stack.enter_context(untouched_generators())
        stack.enter_context(torch.enable_grad())
        torch.manual_seed(seed)
        if loss_fn is None:
            assert isinstance(module, LightningModule)
            model: nn.Module = _silent_copy(module)
            ask = _training_step(model)
        else:
            model, ask = module, loss_fn
        stack.enter_context(quiet_model(model))
        leaves = dict(model.named_parameters(remove_duplicate=False))
        wanted = {name: leaves[name] for name in parameters if leaves[name].requires_grad}
        for batch in islice(batches, most):
            loss = _loss(module, model, ask, batch, device)
            gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            for name, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient.detach()
            count += 1
    if not count:
        raise ValueError("public_data gave no batch")
    return {name: total / count for name, total in sums.items()}


def _loss(module: nn.Module, model: nn.Module, ask: LossFunction, batch: Any, device: torch.device) -> Tensor:
    trainer = getattr(module, "_trainer", None)
    if trainer is None:
        loss = ask(model, move_data_to_device(batch, device))
    else:
        precision = trainer.precision_plugin
        with precision.forward_context():
            loss = ask(model, trainer.strategy.batch_to_device(precision.convert_input(batch), device))
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ValueError(
            f"expected the loss of a public batch as a scalar tensor, got {type(loss).__name__}: pass loss_fn, a "
            "function (model, batch) -> loss"
        )
    return loss


def _silent_copy(module: LightningModule) -> LightningModule:
    """A copy, so that metrics and other state of the training step stay as they are; it logs nothing."""
    copied = copy.deepcopy(module)
    copied._trainer = module._trainer
    vars(copied).update(dict.fromkeys(("log", "log_dict"), _nothing))
    return copied


def _training_step(model: Any) -> LossFunction:
    if not model.automatic_optimization:
        raise ValueError(
            f"{type(model).__name__} optimizes by hand, so its training_step does not say what the loss is: pass "
            "loss_fn, a function (model, batch) -> loss"
        )
    numbered = is_param_in_hook_signature(model.training_step, "batch_idx", min_args=2)

    def loss(model: Any, batch: Any) -> Any:
        output = model.training_step(batch, 0) if numbered else model.training_step(batch)
        return output.get("loss") if isinstance(output, Mapping) else output

    return loss


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Take what is logged."""
