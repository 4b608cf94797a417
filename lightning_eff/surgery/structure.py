"""Checkpoints of networks whose shapes have changed.

A cut model remembers the attributes its layers had before (``in_channels`` ...). Its checkpoint carries the attributes
of every layer that was ever cut under :data:`KEY`, plain Python that ``weights_only=True`` reads. On loading, the
shapes of the file are taken on before Lightning loads the weights: so an earlier, wider checkpoint loads into an
already narrower model as well, which replaying plans could not do.

Lightning calls a module's own ``on_load_checkpoint`` just before the weights are loaded, in every load path, and those
of callbacks only afterwards. That is why the module class is what :func:`prunable` extends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_eff.documents import parsed, reading, whole_file

KEY = "lightning_eff.structure"
VERSION = 1
# An entry of the state dict whose name tells whoever loads a cut checkpoint the plain way what to do instead.
HINT = "channels were removed from this network: load the checkpoint with lightning_eff.load_pruned"

_MEMORY = "_lightning_eff_dense"  # on every cut layer, whatever holds it: {attribute: value before the first cut}
_ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "groups",
    "in_features",
    "out_features",
    "num_features",
    "num_channels",
    "num_parameters",
    "normalized_shape",
    "embedding_dim",
)

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", bound=type)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Sizes of a layer, and the shapes of the tensors it holds itself, as plain Python."""
    sizes = {
        name: list(value) if isinstance(value, tuple) else value
        for name in _ATTRIBUTES
        if isinstance(value := getattr(module, name, None), int | tuple)
    }
    return {**sizes, "shapes": {name: list(tensor.shape) for name, tensor in _tensors(module).items()}}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    own = (*module._parameters.items(), *module._buffers.items())
    return {name: tensor for name, tensor in own if tensor is not None}


def _owner(modules: Mapping[str, nn.Module], path: str) -> str:
    """Return ``path`` if it is a module, else the path of the module that holds the parameter."""
    owner = path if path in modules else path.rpartition(".")[0]
    if owner not in modules:
        raise KeyError(path)
    return owner


def remember_cut(model: nn.Module, paths: Iterable[str]) -> None:
    """Note the attributes that the modules at ``paths`` have now, unless an earlier cut did; call before cutting."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        layer = modules[_owner(modules, path)]
        layer.__dict__.setdefault(_MEMORY, _attributes(layer))
    if hasattr(type(model), "on_save_checkpoint"):
        prunable(type(model))


def dense_structure(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Attributes before the first cut of every module in ``model`` that was ever cut; empty for a whole network."""
    return {
        path: module.__dict__[_MEMORY]
        for path, module in model.named_modules(remove_duplicate=False)
        if _MEMORY in module.__dict__
    }


def structure_of(model: nn.Module) -> dict[str, Any] | None:
    """Return what a checkpoint must carry besides the weights; None for a model that was never cut."""
    dense = dense_structure(model)
    if not dense:
        return None
    modules = dict(model.named_modules(remove_duplicate=False))
    return {"version": VERSION, "modules": {path: _attributes(modules[path]) for path in dense}, "dense": dense}


def apply_structure(model: nn.Module, structure: Mapping[str, Any] | None) -> None:
    """Give ``model`` the shapes that ``structure`` describes, or its own dense shapes for None; values are undefined.

    Raises:
        ValueError: another version, or layers that the model does not have; nothing has changed then.
    """
    dense = dense_structure(model)
    if structure is not None:
        with reading("not the structure of a cut network"):
            structure = _checked(structure)
    wanted = {**dense, **(structure["modules"] if structure else {})}
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = sorted(set(wanted) - set(modules))
    if unknown:
        raise ValueError(
            f"the checkpoint is of another network: {type(model).__name__} has no layer {', '.join(unknown[:5])}"
        )
    for path, sizes in (structure or {"modules": {}})["modules"].items():
        _check_layer(path, sizes, dense.get(path) or _attributes(modules[path]))
    for path in wanted:
        if path not in dense:
            modules[path].__dict__[_MEMORY] = structure["dense"][path] if structure else _attributes(modules[path])
    for path, attributes in wanted.items():
        module = modules[path]
        for name, value in attributes.items():
            if name != "shapes":
                setattr(module, name, tuple(value) if isinstance(value, list) else value)
        for name, tensor in _tensors(module).items():
            shape = attributes["shapes"].get(name)
            if shape is not None and list(tensor.shape) != shape:
                with torch.no_grad():
                    tensor.grad = None
                    tensor.set_(torch.zeros(shape, dtype=tensor.dtype, device=tensor.device))  # type: ignore[call-overload]


def part_of(structure: Mapping[str, Any] | None, prefix: str) -> dict[str, Any] | None:
    """What a structure says of the part of the network behind ``prefix``, which ends with a dot."""
    if structure is None:
        return None
    kept = {
        name: {path.removeprefix(prefix): one for path, one in structure[name].items() if path.startswith(prefix)}
        for name in ("modules", "dense")
    }
    return {"version": structure["version"], **kept}


def _checked(structure: Mapping[str, Any]) -> dict[str, Any]:
    """The structure, if everything in it is of the type it should be."""
    if structure["version"] != VERSION:
        raise ValueError(f"expected a checkpoint structure of version {VERSION}, got {structure['version']!r}")
    layers = {key: parsed(dict[str, dict[str, Any]], structure[key], key) for key in ("modules", "dense")}
    if layers["modules"].keys() != layers["dense"].keys():
        raise ValueError(
            f"expected modules and dense of the same layers, got {[*layers['modules']]}, {[*layers['dense']]}"
        )
    return layers


def _check_layer(path: str, sizes: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError unless sizes are those of a layer that channels were taken from."""
    shapes = parsed(dict[str, list[int]], sizes.get("shapes"), f"shapes of {path}")
    told = {name: value for name, value in sizes.items() if name != "shapes"}
    fits = told.keys() <= own.keys() and all(
        _smaller([told[name]], [own[name]]) if isinstance(own[name], int) else _smaller(told[name], own[name])
        for name in told
    )
    if not fits or not all(_smaller(shape, own["shapes"].get(name)) for name, shape in shapes.items()):
        raise ValueError(f"{path}: expected at most the sizes {dict(own)}, got {dict(sizes)}")


def _smaller(sizes: Any, own: Any) -> bool:
    plain = parsed(list[int], sizes, "sizes")
    return own is not None and len(plain) == len(own) and all(0 <= a <= b for a, b in zip(plain, own, strict=True))


def _save(self: Any, checkpoint: dict[str, Any]) -> None:
    structure = structure_of(self)
    if structure is not None:
        checkpoint[KEY] = structure
        checkpoint["state_dict"] = {**checkpoint["state_dict"], HINT: torch.empty(0)}


def _load(self: Any, checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k != HINT}
    structure = checkpoint.get(KEY)
    if structure is not None and hasattr(self, "build_for_checkpoint"):
        self.build_for_checkpoint(checkpoint)
    apply_structure(self, structure)
    trainer = getattr(self, "_trainer", None)
    for twin in averaged_models(trainer) if trainer is not None else ():
        apply_structure(twin, structure)


def averaged_models(trainer: Any) -> list[nn.Module]:
    """Copies of the module that weight averaging (EMA, SWA) callbacks of ``trainer`` hold."""
    held = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    copies = [copy for copy in held if isinstance(copy, nn.Module)]
    return [copy.module if isinstance(copy, AveragedModel) else copy for copy in copies]


def prunable(cls: C) -> C:
    """Class decorator: checkpoints of this LightningModule carry and take on the shapes of a cut network.

    After ``fit`` has cut a module, its class is extended in the same way, so that whatever is saved later can be
    loaded again. Decorate the class to make ``load_from_checkpoint`` work in a fresh process as well; for a class
    that you do not own there is :func:`load_pruned`. Does nothing to networks that were never cut. Idempotent.

    A module that puts layers in place only when it sees the trainer's data writes ``build_for_checkpoint(checkpoint)``,
    which is called before the shapes of a cut network are taken on.
    """
    for hook, action in (("on_save_checkpoint", _save), ("on_load_checkpoint", _load)):
        original: Callable[..., Any] | None = getattr(cls, hook, None)
        if original is None:
            raise TypeError(
                f"{cls.__name__} is not a LightningModule: it has no {hook}; use save_pruned and load_pruned"
            )
        if not getattr(original, "_prunable", False):
            setattr(cls, hook, _extended(original, action, first=hook == "on_load_checkpoint"))
    return cls


def _extended(original: Callable[..., Any], action: Callable[..., None], *, first: bool) -> Callable[..., Any]:
    def hook(self: Any, checkpoint: dict[str, Any]) -> None:
        if first:
            action(self, checkpoint)
        original(self, checkpoint)
        if not first:
            action(self, checkpoint)

    hook._prunable = original  # type: ignore[attr-defined]
    hook.__name__, hook.__doc__ = original.__name__, original.__doc__
    return hook


def unprunable(cls: type) -> None:
    """Take back what :func:`prunable` did to ``cls``."""
    for hook in ("on_save_checkpoint", "on_load_checkpoint"):
        original = getattr(cls.__dict__.get(hook), "_prunable", None)
        if original is not None:
            delattr(cls, hook)
            if getattr(cls, hook) is not original:
                setattr(cls, hook, original)


def is_prunable(cls: type) -> bool:
    """Tell whether checkpoints of ``cls`` carry their shapes."""
    return all(hasattr(getattr(cls, hook, None), "_prunable") for hook in ("on_save_checkpoint", "on_load_checkpoint"))


def save_pruned(model: nn.Module, path: str | Path) -> None:
    """Save a plain torch model, cut or not, for :func:`load_pruned`."""
    with whole_file(path) as beside, beside.open("wb") as file:
        torch.save({"state_dict": model.state_dict(), KEY: structure_of(model)}, file)


def load_pruned(model: type[M] | M, path: str | Path, **kwargs: Any) -> M:
    """Load a checkpoint whatever channels were removed, in any process.

    Args:
        model: a LightningModule class (``load_from_checkpoint`` is called with ``kwargs``), or an instance of any
            module in its full size, which is changed in place.
        path: a Lightning checkpoint or a file of :func:`save_pruned`.
        **kwargs: for a class, handed to ``load_from_checkpoint``; its ``weights_only`` is True unless given.

    Raises:
        ValueError: the file holds no weights, or the shapes of a cut that this network cannot take.
        RuntimeError: torch's, which names weights that are missing or of other shapes.
    """
    if isinstance(model, type):
        load: Callable[..., M] | None = getattr(prunable(model), "load_from_checkpoint", None)
        if load is None:
            raise TypeError(f"{model.__name__} is not a LightningModule: build it and pass the instance")
        return load(path, **{"weights_only": True, **kwargs})
    if kwargs:
        raise TypeError(f"load_pruned takes no options for an instance, got {sorted(kwargs)}")
    with reading(f"{path} holds no weights"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = checkpoint.get("state_dict", checkpoint)  # or a plain state dict of a whole network
        state = {key: value for key, value in weights.items() if key != HINT}
    apply_structure(model, checkpoint.get(KEY))
    model.load_state_dict(state)
    if hasattr(type(model), "on_save_checkpoint"):
        prunable(type(model))
    return model
