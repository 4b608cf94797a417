"""Multiply channels by values without removing them: how channels are scored.

A gate stands at the input of every layer that reads the channels, behind norm and activation, so a zero there is what
a physical removal does, also on residual sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from lightning_eff.surgery.graph import ChannelGroup


class Gates:
    """A context in which the channels of one or more groups are multiplied by values.

    Args:
        groups: channel groups by name, as :attr:`ChannelGraph.groups`.
        model: the model; hooks are on it only while the context is open.
        values: for each group ``[C]``, or ``[B, C]`` for one gate per sample; may require gradients.
        site: ``"consumer"`` (the input of every reader: equals removal) or ``"producer"`` (the output of the layers
            that compute the channels, before their norm: what older published code does).
        fill: for each consumer path the constant ``[E]`` that a fully closed channel becomes instead of zero.

    Values may be changed with :meth:`set` while the context is open.
    """

    def __init__(
        self,
        groups: Mapping[str, ChannelGroup],
        model: nn.Module,
        values: Mapping[str, Tensor],
        *,
        site: Literal["consumer", "producer"] = "consumer",
        fill: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._groups = {name: groups[name] for name in values}
        self._model = model
        self._axis = "in" if site == "consumer" else "out"
        self.fill = dict(fill or {})
        self._values: dict[str, Tensor] = {}
        self._vectors: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for name, value in values.items():
            self.set(name, value)

    def set(self, name: str, value: Tensor) -> None:
        """Change the values of one group, ``[C]`` or ``[B, C]``."""
        group = self._groups.get(name)
        if group is None:
            raise KeyError(f"no gate on {name!r}; gated groups: {', '.join(self._groups)}")
        if value.ndim not in (1, 2) or value.shape[-1] != group.size:
            raise ValueError(f"expected gate values [{group.size}] or [B, {group.size}], got {list(value.shape)}")
        self._values[group.name] = value
        self._vectors.clear()

    def __enter__(self) -> Gates:
        if self._handles:
            return self
        modules = dict(self._model.named_modules(remove_duplicate=False))
        paths = {m.path for group in self._groups.values() for m in group.members if m.axis == self._axis}
        for path in sorted(paths):
            module = modules[path]
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                if self._axis == "in":
                    hook = module.register_forward_pre_hook(self._before(path), with_kwargs=True)
                else:
                    hook = module.register_forward_hook(self._behind(path))
                self._handles.append(hook)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, path: str) -> Any:
        def gate(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args:
                return (self._gated(path, module, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "input": self._gated(path, module, kwargs["input"])}

        return gate

    def _behind(self, path: str) -> Any:
        def gate(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return self._gated(path, module, output)

        return gate

    def _gated(self, path: str, module: nn.Module, x: Tensor) -> Tensor:
        channels_last = isinstance(module, nn.Linear)
        width = x.shape[-1] if channels_last else x.shape[1]
        vector = self._vector(path, width, x)
        if vector.ndim == 2 and vector.shape[0] != x.shape[0]:
            raise ValueError(f"{path}: {vector.shape[0]} gates per sample for a batch of {x.shape[0]}")
        shape = [vector.shape[0] if vector.ndim == 2 else 1, *([1] * (x.ndim - 1))]
        shape[-1 if channels_last else 1] = width
        gate = vector.reshape(shape)
        if path in self.fill:
            return x * gate + (1 - gate) * self.fill[path].to(x).reshape([1, *shape[1:]])
        return x * gate

    def _vector(self, path: str, width: int, x: Tensor) -> Tensor:
        """Spread the groups' values over the axis of one layer: ``[E]`` or ``[B, E]``."""
        cached = self._vectors.get(path)
        if cached is not None and cached.device == x.device and cached.dtype == x.dtype:
            return cached
        vector = torch.ones(width, dtype=x.dtype, device=x.device)
        for name, group in self._groups.items():
            value = self._values[name].to(x)
            for m in group.members:
                if m.path == path and m.axis == self._axis:
                    spread = value[..., m.root.to(x.device)]
                    vector = vector.expand(*spread.shape[:-1], width).index_copy(-1, m.index.to(x.device), spread)
        if not vector.is_inference() and not any(value.requires_grad for value in self._values.values()):
            self._vectors[path] = vector
        return vector
