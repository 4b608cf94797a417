"""A batch as samples: how many there are, and some of them.

Whatever the batch is made of, what belongs to a sample stands at its place in the first dimension of every tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

_Array = Tensor | np.ndarray
_PLAIN = (str, bytes, bool, int, float, complex, type(None))


def number_of_samples(batch: Any) -> int:
    """Size of the first dimension, which all tensors of the batch share.

    Raises:
        TypeError: The batch holds no tensor, or something that is neither tensor, sequence, mapping, dataclass nor
            plain value.
        ValueError: The tensors have different first dimensions or one has none; names where they stand.
    """
    shapes: dict[str, list[int]] = {}
    others: dict[str, str] = {}
    for path, leaf in _leaves(batch):
        if isinstance(leaf, _Array):
            shapes[path or "the batch"] = list(leaf.shape)
        elif not isinstance(leaf, _PLAIN):
            others[path or "the batch"] = type(leaf).__name__
    sizes = {int(shape[0]) for shape in shapes.values() if shape}
    told = ", ".join(f"{path} {shape}" for path, shape in shapes.items())
    if not shapes:
        found = ", ".join(f"{path} is a {kind}" for path, kind in others.items()) or f"a {type(batch).__name__}"
        raise TypeError(f"expected a batch of tensors in sequences, mappings or dataclasses, got {found}")
    if [] in shapes.values():
        raise ValueError(
            f"a tensor without dimensions belongs to the whole batch, and what samples share depends on all of them; "
            f"give every sample its own value; got {told}"
        )
    if len(sizes) > 1:
        raise ValueError(f"expected the samples in the first dimension of every tensor of the batch, got {told}")
    (size,) = sizes
    # a list with an entry for each sample may hold anything
    lists = tuple(f"{path}[" for path, entry in _lists(batch) if len(entry) == size)
    strangers = [f"{path} is a {kind}" for path, kind in others.items() if not path.startswith(lists)]
    if strangers:
        raise TypeError(
            f"cannot tell which part of the batch belongs to which sample: {', '.join(strangers)}; expected tensors, "
            "sequences, mappings, dataclasses, or a list with one entry for each sample"
        )
    return size


def some_samples(batch: Any, part: slice | Sequence[int]) -> Any:
    """Cut samples out of a batch: tensors along their first dimension, and lists with one entry for each sample."""
    part = part if isinstance(part, slice) else list(part)
    size = number_of_samples(batch)

    def cut(node: Any) -> Any:
        if isinstance(node, _Array):
            return node[part]
        if isinstance(node, Mapping):
            return _like(node, {key: cut(value) for key, value in node.items()})
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return type(node)(*map(cut, node))
        if isinstance(node, list | tuple):
            if len(node) == size and not _has_tensors(node):
                return node[part] if isinstance(part, slice) else type(node)(node[place] for place in part)
            return type(node)(map(cut, node))
        if dataclasses.is_dataclass(node) and not isinstance(node, type):
            fields = {field.name: cut(getattr(node, field.name)) for field in dataclasses.fields(node) if field.init}
            return dataclasses.replace(node, **fields)
        return node

    return cut(batch)


def _like(mapping: Mapping[Any, Any], entries: dict[Any, Any]) -> Any:
    """A mapping of the same type; one whose type cannot be made of entries becomes a dict."""
    try:
        return type(mapping)(entries)  # type: ignore[call-arg]
    except TypeError:
        return entries


def _children(node: Any) -> list[tuple[str, Any]] | None:
    """Names and values of what a node holds; None for a leaf."""
    if isinstance(node, Mapping):
        return [(f"[{key!r}]", value) for key, value in node.items()]
    if isinstance(node, list | tuple):
        return [(f"[{place}]", value) for place, value in enumerate(node)]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(f".{field.name}", getattr(node, field.name)) for field in dataclasses.fields(node)]
    return None


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    children = _children(node)
    if children is None:
        yield path, node
        return
    for name, child in children:
        yield from _leaves(child, path + name)


def _lists(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, list | tuple) and not _has_tensors(node):
        yield path, node
    for name, child in _children(node) or ():
        yield from _lists(child, path + name)


def _has_tensors(node: Any) -> bool:
    return any(isinstance(leaf, _Array) for _, leaf in _leaves(node))
