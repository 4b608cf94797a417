"""Write a cut network as a program that runs without its Python class: torch.export (.pt2) or ONNX (.onnx)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_eff.batch import call_model, take
from lightning_eff.surgery.state import quiet_model


def export_model(
    model: nn.Module, example_inputs: Any, path: str | Path, *, dynamic_batch: bool = True, tolerance: float = 1e-4
) -> Path:
    """Export ``model`` in evaluation mode and check that the program gives the model's own outputs.

    Args:
        model: any torch module; left as it was.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, two samples or more when the
            batch is dynamic.
        path: ends in ``.pt2`` (torch.export) or ``.onnx`` (needs the extra ``export``).
        dynamic_batch: let dimension 0 of every input vary.
        tolerance: relative error allowed between program and model (checked for ``.pt2``).

    Raises:
        ValueError: another file ending.
        ImportError: ONNX packages are missing.
        RuntimeError: the exported program differs from the model.
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"expected a path ending in .pt2 or .onnx, got {path.name!r}")
    named = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    args = () if named else tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    path.parent.mkdir(parents=True, exist_ok=True)
    dynamic: Any = None
    if dynamic_batch:
        batch = torch.export.Dim.AUTO
        shapes = pytree.tree_map(lambda x: {0: batch} if isinstance(x, Tensor) and x.ndim else None, (args, named))
        dynamic = shapes[1] if named else shapes[0]
    with quiet_model(model), torch.no_grad():
        program = torch.export.export(model, args, named, dynamic_shapes=dynamic, strict=False)
        if path.suffix == ".pt2":
            _check(program.module(), model, args, named, tolerance, dynamic_batch)
            torch.export.save(program, path)
        else:
            _onnx(program, path)
    return path


def _check(program: nn.Module, model: nn.Module, args: Any, named: Any, tolerance: float, dynamic: bool) -> None:
    for inputs in ((args, named), take((args, named), slice(0, 1))) if dynamic else ((args, named),):
        got = pytree.tree_leaves(program(*inputs[0], **inputs[1]))
        expected = pytree.tree_leaves(call_model(model, inputs[1] or inputs[0]))
        for a, b in zip(got, expected, strict=True):
            if isinstance(a, Tensor) and a.is_floating_point():
                error = float((a - b).norm() / b.norm().clamp(min=1e-12))
                if error > tolerance:
                    raise RuntimeError(f"the exported program differs from the model: relative error {error:.2g}")


def _onnx(program: Any, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('ONNX export needs extra packages: pip install "lightning-eff[export]"') from error
    torch.onnx.export(program, (), str(path), dynamo=True, external_data=False, verbose=False)
