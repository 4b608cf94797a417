"""Call any depth completion network the same way: ``(rgb, sparse) -> depth``.

Published networks differ in how they are called. What is understood without being told: two arguments
``(rgb, sparse)``, and one dict, with the names of self-supervised sparse-to-dense (``rgb``, ``g``, ``d``;
arXiv 1807.00275) and of NLSPN and its descendants (``rgb``, ``dep``, answer under ``pred``; arXiv 2007.10042).
Shapes: ``B`` batch, ``M`` coalitions, ``H``, ``W`` height and width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils import _pytree as pytree

Forward = Literal["auto", "positional", "dict"] | Callable[[nn.Module, Tensor | None, Tensor], Any]

_HOW = "pass forward=, a callable (model, rgb, sparse) -> depth [B, 1, H, W] in metres"


class DepthForward:
    """A network that completes depth, called as ``(rgb, sparse) -> depth``.

    Args:
        model: any network; its mode and parameters are left alone.
        forward: ``"positional"`` calls ``model(rgb, sparse)``; ``"dict"`` calls ``model(batch)`` with the keys ``rgb``,
            ``g`` (grey image), ``d`` and ``dep`` (both the sparse depth); ``"auto"`` decides by how many arguments the
            model takes. A callable ``(model, rgb, sparse) -> depth`` is taken as it is.

    Raises:
        ValueError: ``forward`` is none of these, or ``"auto"`` and the model takes neither one argument nor two.
    """

    def __init__(self, model: nn.Module, forward: Forward = "auto") -> None:
        self.model = model
        if not callable(forward) and forward not in ("auto", "positional", "dict"):
            raise ValueError(f"expected forward 'auto', 'positional', 'dict' or a callable, got {forward!r}; {_HOW}")
        self.forward = _style(model) if forward == "auto" else forward

    @property
    def splits_image(self) -> bool:
        """Whether the model has ``encode_image(rgb)`` and ``decode(features, sparse)``, with no callable between."""
        parts = getattr(self.model, "encode_image", None), getattr(self.model, "decode", None)
        return not callable(self.forward) and all(map(callable, parts))

    def __call__(self, rgb: Tensor | None, sparse: Tensor) -> Tensor:
        """Complete depth.

        Args:
            rgb: ``[B, 3, H, W]``, or ``[B, 1, H, W]`` grey; None for a model that reads no image.
            sparse: ``[B, 1, H, W]`` in metres, 0 = none.

        Returns:
            Depth ``[B, 1, H, W]`` in metres.

        Raises:
            TypeError: the model answers with something that is no tensor and no dict with ``pred``.
            ValueError: the depth has another shape than ``sparse``.
        """
        try:
            answer = self._answer(rgb, sparse)
        except Exception as error:
            error.add_note(f"while {self._call()} with {_seen('rgb', rgb)} and {_seen('sparse', sparse)}; {_HOW}")
            raise
        return self._depth(answer, sparse)

    def of_image(self, rgb: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Fix one image, to complete many sparse maps of it; its features are computed once where the model can.

        Args:
            rgb: ``[1, 3, H, W]``, or None.

        Returns:
            A function from sparse depth ``[M, 1, H, W]`` to depth of the same shape, for any ``M``.
        """
        if not self.splits_image or rgb is None:
            return lambda sparse: self(None if rgb is None else rgb.expand(len(sparse), -1, -1, -1), sparse)
        model: Any = self.model
        features = model.encode_image(rgb)

        def complete(sparse: Tensor) -> Tensor:
            wide = pytree.tree_map_only(Tensor, lambda t: t.expand(len(sparse), *t.shape[1:]), features)
            return self._depth(model.decode(wide, sparse), sparse)

        return complete

    def _answer(self, rgb: Tensor | None, sparse: Tensor) -> Any:
        if callable(self.forward):
            return self.forward(self.model, rgb, sparse)
        if self.forward == "positional":
            return self.model(rgb, sparse)
        batch = {"d": sparse, "dep": sparse}
        if rgb is not None:
            batch |= {"rgb": rgb, "g": grey(rgb)}
        return self.model(batch)

    def _depth(self, answer: Any, sparse: Tensor) -> Tensor:
        if isinstance(answer, Mapping) and "pred" in answer:
            answer = answer["pred"]
        if not isinstance(answer, Tensor):
            came = f"a {type(answer).__name__}"
            if isinstance(answer, Mapping):
                came += f" with keys {sorted(map(str, answer))}"
            elif isinstance(answer, tuple | list):
                came += " of " + ", ".join(str(list(a.shape)) if isinstance(a, Tensor) else "?" for a in answer)
            raise TypeError(f"{self._call()} gave {came} where depth was expected; {_HOW}")
        if answer.shape != sparse.shape:
            raise ValueError(
                f"{self._call()} gave depth of shape {list(answer.shape)} for {_seen('sparse', sparse)}; {_HOW}"
            )
        return answer

    def _call(self) -> str:
        name = type(self.model).__name__
        if callable(self.forward):
            return f"calling {getattr(self.forward, '__name__', 'forward')}({name}, rgb, sparse)"
        return f"calling {name}" + ("(rgb, sparse)" if self.forward == "positional" else "({'rgb', 'g', 'd', 'dep'})")


def grey(rgb: Tensor) -> Tensor:
    """Luma of ITU-R BT.601: ``[B, 3, H, W]`` to ``[B, 1, H, W]``; an image that is grey already stays."""
    if rgb.size(1) == 1:
        return rgb
    return 0.299 * rgb[:, :1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:]


def _style(model: nn.Module) -> Literal["positional", "dict"]:
    inner = getattr(model, "_orig_mod", model)  # torch.compile hides the signature
    parameters = inspect.signature(inner.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    if required == 1:
        return "dict"
    if required <= 2 and (len(positional) >= 2 or any(p.kind == p.VAR_POSITIONAL for p in parameters)):
        return "positional"
    raise ValueError(
        f"expected a model that takes (rgb, sparse) or one dict, got {type(inner).__name__}.forward"
        f"({', '.join(p.name for p in parameters)}); {_HOW}"
    )


def _seen(name: str, tensor: Tensor | None) -> str:
    return f"{name} {'None' if tensor is None else list(tensor.shape)}"
