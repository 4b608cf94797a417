"""Every tensor and attribute of a model that a removal of channels changes, worked out before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer

from lightning_eff.surgery.counting import CHANNEL_NORMS, is_depthwise
from lightning_eff.surgery.errors import SurgeryError
from lightning_eff.surgery.optimizer import slice_state


@dataclass
class TensorEdit:
    """One tensor that becomes smaller."""

    store: dict[str, Any]  # a module's _parameters or _buffers
    name: str
    old: Tensor
    new: Tensor
    dims: dict[int, Tensor]  # dimension -> kept positions


class Edits:
    """The changes that keep masks of tensor axes, ``{(path, axis): bool [E]}``, make to a model.

    Raises:
        SurgeryError: a layer that cannot be cut this way; nothing was touched.
    """

    def __init__(self, model: nn.Module, masks: Mapping[tuple[str, str], Tensor]) -> None:
        self.model = model
        self.masks = masks
        self.tensors: list[TensorEdit] = []
        self.attributes: list[tuple[nn.Module, str, Any, Any]] = []
        modules = dict(model.named_modules(remove_duplicate=False))
        by_path: dict[str, dict[str, Tensor]] = {}
        for (path, axis), mask in masks.items():
            by_path.setdefault(path, {})[axis] = mask
        for path, axes in by_path.items():
            if path in modules:
                self._edit_module(path, modules[path], axes)
            else:
                owner, _, name = path.rpartition(".")
                dims = {int(axis.removeprefix("dim:")): mask for axis, mask in axes.items()}
                self._edit_tensor(modules[owner]._parameters, name, dims)

    def _edit_module(self, path: str, module: nn.Module, axes: Mapping[str, Tensor]) -> None:
        if isinstance(module, _ConvNd):
            out, into = axes.get("out"), axes.get("in")
            if is_depthwise(module):
                width = self._kept(out, module.out_channels)
                self._edit_tensor(module._parameters, "weight", {0: out})
                self._edit_tensor(module._parameters, "bias", {0: out})
                self._set(module, in_channels=width, out_channels=width, groups=width)
                return
            dim_out, dim_in = (1, 0) if isinstance(module, _ConvTransposeNd) else (0, 1)
            dims = {dim_out: out, dim_in: into}
            blocked = dim_out if isinstance(module, _ConvTransposeNd) else dim_in  # the axis that lies within a block
            if module.groups > 1 and dims[blocked] is not None:
                length = module.out_channels if blocked == dim_out else module.in_channels
                blocks = self._full(dims[blocked], length).reshape(module.groups, -1)
                if not (blocks == blocks[0]).all():
                    raise SurgeryError(f"{path}: a grouped convolution must lose the same positions of every block")
                dims[blocked] = blocks[0]
            self._edit_tensor(module._parameters, "weight", dims)
            self._edit_tensor(module._parameters, "bias", {0: out})
            self._set(
                module,
                out_channels=self._kept(out, module.out_channels),
                in_channels=self._kept(into, module.in_channels),
            )
        elif isinstance(module, nn.Linear):
            out, into = axes.get("out"), axes.get("in")
            self._edit_tensor(module._parameters, "weight", {0: out, 1: into})
            self._edit_tensor(module._parameters, "bias", {0: out})
            self._set(
                module,
                out_features=self._kept(out, module.out_features),
                in_features=self._kept(into, module.in_features),
            )
        elif isinstance(module, nn.Embedding):
            self._edit_tensor(module._parameters, "weight", {1: axes["out"]})
            self._set(module, embedding_dim=self._kept(axes["out"], module.embedding_dim))
        elif isinstance(module, CHANNEL_NORMS):
            self._edit_norm(module, axes["out"])
        else:
            raise SurgeryError(f"{path}: a {type(module).__name__} cannot be cut")

    def _edit_norm(self, module: nn.Module, mask: Tensor) -> None:
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.ndim and tensor.shape[-1] > 1:
                    self._edit_tensor(store, name, {tensor.ndim - 1: mask})
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            *outer, width = module.normalized_shape
            self._set(module, normalized_shape=(*outer, self._kept(mask, width)))
        elif isinstance(module, nn.GroupNorm):
            self._set(module, num_channels=self._kept(mask, module.num_channels))
        elif isinstance(module, nn.PReLU):
            if module.num_parameters > 1:
                self._set(module, num_parameters=self._kept(mask, module.num_parameters))
        else:
            self._set(module, num_features=self._kept(mask, int(module.num_features)))  # type: ignore[arg-type]

    @staticmethod
    def _full(mask: Tensor | None, length: int) -> Tensor:
        full = torch.ones(length, dtype=torch.bool)
        if mask is not None and len(mask) > length:
            raise SurgeryError(
                "the channel graph is of another state of the model: use the graph its last cut returned"
            )
        if mask is not None:
            full[: len(mask)] = mask
        return full

    def _kept(self, mask: Tensor | None, length: int) -> int:
        return int(self._full(mask, length).sum())

    def _edit_tensor(self, store: dict[str, Any], name: str, masks: Mapping[int, Tensor | None]) -> None:
        old = store.get(name)
        dims = {d: mask for d, mask in masks.items() if mask is not None}
        if old is None or not dims:
            return
        if old.is_inference():
            raise SurgeryError(
                f"{name} was created under torch.inference_mode and cannot be cut: clone the model first"
            )
        kept = {d: self._full(mask, old.shape[d]).nonzero().flatten() for d, mask in dims.items()}
        self.tensors.append(TensorEdit(store, name, old, _sliced(old.detach(), kept), kept))

    def _set(self, module: nn.Module, **values: Any) -> None:
        self.attributes += [(module, name, getattr(module, name), value) for name, value in values.items()]

    @contextmanager
    def on_trial(self) -> Iterator[None]:
        """Put smaller stand-ins in place of the tensors; the old ones come back untouched."""
        try:
            for module, name, _, value in self.attributes:
                setattr(module, name, value)
            for edit in self.tensors:
                parameter = isinstance(edit.old, nn.Parameter)
                edit.store[edit.name] = nn.Parameter(edit.new, requires_grad=False) if parameter else edit.new
            yield
        finally:
            for module, name, value, _ in self.attributes:
                setattr(module, name, value)
            for edit in self.tensors:
                edit.store[edit.name] = edit.old

    def commit(self, optimizers: Sequence[Optimizer]) -> None:
        """Make the tensors smaller for good, gradients and optimizer state with them.

        ``Tensor.set_`` keeps the Python object, so parameter groups, hooks and weak references stay valid.
        """
        for module, name, _, value in self.attributes:
            setattr(module, name, value)
        for edit in self.tensors:
            shape, gradient = edit.old.shape, edit.old.grad
            with torch.no_grad():
                edit.old.grad = None
                edit.old.set_(edit.new)  # type: ignore[call-overload]
                if gradient is not None:
                    edit.old.grad = _sliced(gradient, edit.dims)
            for optimizer in optimizers:
                slice_state(optimizer, edit.old, shape, edit.dims)


def _sliced(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Index several dimensions of ``tensor``; channels-last tensors stay so."""
    out = tensor
    for d, positions in kept.items():
        out = out.index_select(d, positions.to(tensor.device))
    if tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return out.contiguous(memory_format=torch.channels_last)
    return out.contiguous()
