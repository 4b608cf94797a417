"""The one convention of the package about batches, and the one way to override it.

A batch is ``(inputs, target)``, a tuple or a list. Every technique that must know what is input and what is target
takes ``split_batch``, a callable ``batch -> (inputs, target)``, and hands ``inputs`` to the model by
:func:`call_model`. Every technique that must know a loss takes ``loss_fn``, a :data:`LossFunction`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

SplitBatch = Callable[[Any], tuple[Any, Any]]
"""``batch -> (inputs, target)``."""

# Any, not nn.Module and Tensor: jsonargparse would look for classes derived from them
LossFunction = Callable[[Any, Any], Any]
"""``(model, batch) -> loss``: a scalar tensor, the mean over the samples of the batch."""


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Split a batch that is a tuple or list of two into ``(inputs, target)``.

    Raises:
        TypeError: anything else; the message says what came and what to pass instead.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        came = f"a {type(batch).__name__} with keys {sorted(map(str, batch))}"
    elif isinstance(batch, tuple | list):
        came = f"a {type(batch).__name__} of {len(batch)}"
    else:
        came = f"a {type(batch).__name__}"
    raise TypeError(
        f"expected a batch (inputs, target), got {came}: pass split_batch=, a callable batch -> (inputs, target), "
        'for example BatchKeys("image", "label")'
    )


class BatchKeys:
    """Take inputs and target out of dict batches: ``split_batch`` in Python, ``lightning_eff.BatchKeys`` in YAML.

    Args:
        inputs: key of the model's input; a list of keys gives a dict that is passed on by keyword.
        target: key of the target.
    """

    def __init__(self, inputs: str | list[str] = "inputs", target: str = "target") -> None:
        self.inputs = inputs
        self.target = target

    def __call__(self, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return ``(inputs, target)``; KeyError names the keys that are there."""
        if not isinstance(batch, Mapping):
            raise TypeError(f"BatchKeys expects dict batches, got a {type(batch).__name__}")
        wanted = [self.inputs] if isinstance(self.inputs, str) else list(self.inputs)
        missing = [key for key in (*wanted, self.target) if key not in batch]
        if missing:
            raise KeyError(
                f"the batch has no {missing}; its keys are {sorted(map(str, batch))}: "
                "name those wanted, split_batch=BatchKeys(inputs, target)"
            )
        inputs = batch[self.inputs] if isinstance(self.inputs, str) else {key: batch[key] for key in wanted}
        return inputs, batch[self.target]


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call ``model``: a dict of inputs by keyword, a tuple or list by position, anything else as the one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def batch_size(tree: Any) -> int:
    """Return ``size(0)`` of the first tensor in ``tree``."""
    if isinstance(tree, Tensor) and tree.ndim:
        return tree.size(0)
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.size(0)
    raise ValueError(f"expected at least one tensor with a batch dimension, got a {type(tree).__name__}")


def take(tree: Any, samples: slice | Sequence[int] | Tensor) -> Any:
    """Index dimension 0 of every tensor in ``tree``; other leaves stay."""
    return pytree.tree_map(lambda leaf: leaf[samples] if isinstance(leaf, Tensor) and leaf.ndim else leaf, tree)
