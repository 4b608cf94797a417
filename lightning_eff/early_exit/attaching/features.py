"""What a layer hands on: the feature a head reads, and which dimensions of what it returns are the batch.

A layer may return a tensor, a tuple, a dict or a model output. The batch dimension of each tensor in it is learnt by
comparing shapes at two batch sizes, never by "dimension 0 equals B": a sequence may be as long as the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class BatchDim(NamedTuple):
    """Where the batch is in a tensor: ``dim`` has ``factor`` entries a sample (heads or windows may be folded in)."""

    dim: int
    factor: int


Layout = list[BatchDim | None]  # of the leaves of a container; None: not a tensor, or without batch


def feature_index(output: Any) -> int:
    """Position, among the leaves of a layer's output, of the tensor that heads read.

    Raises:
        ValueError: there is no tensor.
    """
    leaves = pytree.tree_leaves(output)
    for name in ("last_hidden_state", "logits"):
        named = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(named, Tensor):
            for i, leaf in enumerate(leaves):
                if leaf is named:
                    return i
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            return i
    raise ValueError(f"expected a layer that returns a tensor or a container of tensors, got a {type(output).__name__}")


def feature_of(output: Any) -> Tensor:
    """Tensor that heads read: ``last_hidden_state`` or ``logits`` where there is one, else the first tensor."""
    if isinstance(output, Tensor):
        return output
    for name in ("last_hidden_state", "logits"):
        named = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(named, Tensor):
            return named
    feature: Tensor = pytree.tree_leaves(output)[feature_index(output)]
    return feature


def replace_feature(output: Any, feature: Tensor) -> Any:
    """Return ``output`` with another tensor in the place of its feature."""
    if isinstance(output, Tensor):
        return feature
    leaves, spec = pytree.tree_flatten(output)
    leaves[feature_index(output)] = feature
    return pytree.tree_unflatten(leaves, spec)


def shapes(tree: Any) -> list[tuple[int, ...] | None]:
    """Shape of every leaf; None where it is no (strided) tensor."""
    return [
        tuple(leaf.shape) if isinstance(leaf, Tensor) and not leaf.is_nested else None
        for leaf in pytree.tree_leaves(tree)
    ]


def layout(
    first: Sequence[tuple[int, ...] | None], second: Sequence[tuple[int, ...] | None], batches: tuple[int, int]
) -> Layout:
    """Find the batch dimension of each leaf from its shapes at two batch sizes."""
    return [
        None if one is None or two is None else _batch_dim(one, two, batches)
        for one, two in zip(first, second, strict=True)
    ]


def _batch_dim(one: tuple[int, ...], two: tuple[int, ...], batches: tuple[int, int]) -> BatchDim | None:
    if len(one) != len(two):
        return None
    moved = [dim for dim, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if len(moved) != 1:
        return None
    dim = moved[0]
    factor = one[dim] // batches[0]
    return BatchDim(dim, factor) if (one[dim], two[dim]) == (factor * batches[0], factor * batches[1]) else None


def select(tensor: Tensor, where: BatchDim, rows: Tensor) -> Tensor:
    """Keep samples ``rows`` [n] of a tensor; rows folded with others lie side by side, sample by sample."""
    if where.factor > 1:
        rows = (rows[:, None] * where.factor + torch.arange(where.factor, device=rows.device)).flatten()
    # indexing keeps channels_last, index_select does not; along other dimensions it is the other way round
    return tensor[rows] if where.dim == 0 else tensor.index_select(where.dim, rows)


def select_all(tree: Any, where: Layout, rows: Tensor) -> Any:
    """Keep samples ``rows`` of every tensor with a batch dimension."""
    if isinstance(tree, Tensor):
        return tree if where[0] is None else select(tree, where[0], rows)
    leaves, spec = pytree.tree_flatten(tree)
    kept = [leaf if at is None else select(leaf, at, rows) for leaf, at in zip(leaves, where, strict=True)]
    return pytree.tree_unflatten(kept, spec)
