"""Multiply-adds and parameters of a network for any channel counts, in closed form.

A layer costs ``positions * kernel / groups * in * out`` multiply-adds, and both widths are linear in the channel
counts of the groups, so the cost of thousands of configurations is one matrix product. ``FlopCounterMode`` of torch
is the reference that the constant part (attention scores, bare matrix products) is taken from. FLOPs = 2 MACs.

Shape letters: ``N`` configurations, ``G`` groups, ``A`` tensor axes, ``T`` cost terms.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff.batch import batch_size, call_model
from lightning_eff.surgery.state import quiet_model

if TYPE_CHECKING:
    from lightning_eff.surgery.graph import ChannelGroup


@dataclass(frozen=True)
class Terms:
    """A sum of products of two axis lengths, one product a term; axis 0 has length one.

    Attributes:
        paths: the module or parameter each term belongs to.
        factor: constant factors, float64 ``[T]``.
        left: axis numbers, int64 ``[T]``.
        right: axis numbers, int64 ``[T]``.
    """

    paths: tuple[str, ...]
    factor: Tensor
    left: Tensor
    right: Tensor

    def __call__(self, lengths: Tensor) -> Tensor:
        """Return every term for axis lengths ``[N, A]``: float64 ``[N, T]``."""
        return self.factor * lengths[:, self.left] * lengths[:, self.right]


@dataclass(frozen=True)
class CostModel:
    """Closed-form costs of a model under changing channel counts.

    Attributes:
        per_channel: positions of each axis per channel of each group, float64 ``[A, G]``.
        fixed: positions of each axis that no group owns, float64 ``[A]``.
        mac_terms: multiply-adds per sample of convolutions and linear layers.
        param_terms: parameters.
        other_macs: multiply-adds per sample that do not depend on the groups.
    """

    per_channel: Tensor
    fixed: Tensor
    mac_terms: Terms
    param_terms: Terms
    other_macs: float

    def macs(self, config: Tensor) -> Tensor:
        """Multiply-adds per sample for channel counts ``[N, G]``: float64 ``[N]``."""
        return self.mac_terms(self._lengths(config)).sum(1) + self.other_macs

    def params(self, config: Tensor) -> Tensor:
        """Parameters for channel counts ``[N, G]``: float64 ``[N]``."""
        return self.param_terms(self._lengths(config)).sum(1)

    def by_path(self, config: Tensor) -> dict[str, tuple[int, int]]:
        """MACs per sample and parameters of each layer for one configuration ``[1, G]``."""
        lengths = self._lengths(config)
        out: dict[str, list[float]] = {}
        for column, terms in enumerate((self.mac_terms, self.param_terms)):
            for path, value in zip(terms.paths, terms(lengths)[0].tolist(), strict=True):
                out.setdefault(path, [0.0, 0.0])[column] += value
        return {path: (round(macs), round(params)) for path, (macs, params) in out.items()}

    def _lengths(self, config: Tensor) -> Tensor:
        return config.double() @ self.per_channel.T + self.fixed


def measure_costs(model: nn.Module, example_inputs: Any, groups: Sequence[ChannelGroup]) -> CostModel:
    """Run ``model`` once on ``example_inputs`` and write its costs as a function of the groups' channel counts."""
    positions, flops = _positions(model, example_inputs)
    modules = dict(model.named_modules(remove_duplicate=False))
    axes: dict[tuple[str, str], int] = {("", ""): 0}
    per_channel, fixed = [[0.0] * len(groups)], [1.0]

    def axis(path: str, name: str, length: int) -> int:
        if (path, name) not in axes:
            axes[path, name] = len(fixed)
            owned = [sum(len(m.index) for m in group.members if (m.path, m.axis) == (path, name)) for group in groups]
            per_channel.append([count / group.size for count, group in zip(owned, groups, strict=True)])
            fixed.append(float(length - sum(owned)))
        return axes[path, name]

    mac_terms, param_terms = [], []
    seen: set[int] = set()
    for path, module in modules.items():
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                factor, left, right = _parameter_term(path, module, name, parameter, axis)
                param_terms.append((path, factor, left, right))
        if id(module) in positions:
            kernel = module.weight[0, 0].numel() if isinstance(module, _ConvNd) else 1
            left, right = _layer_axes(path, module, axis)
            divisor = 1 if right == 0 else getattr(module, "groups", 1)
            mac_terms.append((path, positions[id(module)] * kernel / divisor, left, right))
    costs = CostModel(
        torch.tensor(per_channel, dtype=torch.float64).reshape(len(fixed), len(groups)),
        torch.tensor(fixed, dtype=torch.float64),
        _terms(mac_terms),
        _terms(param_terms),
        other_macs=0.0,
    )
    dense = torch.tensor([[group.size for group in groups]], dtype=torch.float64).reshape(1, len(groups))
    other = flops / 2 / batch_size(example_inputs) - float(costs.macs(dense))
    return CostModel(costs.per_channel, costs.fixed, costs.mac_terms, costs.param_terms, max(0.0, round(other, 6)))


def _terms(rows: Sequence[tuple[str, float, int, int]]) -> Terms:
    paths, factor, left, right = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Terms(
        tuple(paths),
        torch.tensor(factor, dtype=torch.float64),
        torch.tensor(left, dtype=torch.int64),
        torch.tensor(right, dtype=torch.int64),
    )


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether ``module`` is a convolution with one filter per channel, whose input and output go together."""
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels == module.out_channels


def _layer_axes(path: str, module: nn.Module, axis: Any) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return axis(path, "out", module.out_features), axis(path, "in", module.in_features)
    assert isinstance(module, _ConvNd)
    out = axis(path, "out", module.out_channels)
    return out, 0 if is_depthwise(module) else axis(path, "in", module.in_channels)


def _parameter_term(
    path: str, module: nn.Module, name: str, parameter: nn.Parameter, axis: Any
) -> tuple[float, int, int]:
    """Write the element count of one parameter as factor * axis * axis."""
    numel = float(parameter.numel())
    if isinstance(module, _ConvNd | nn.Linear):
        left, right = _layer_axes(path, module, axis)
        if name == "bias":
            return 1.0, left, 0
        if name == "weight":
            groups = getattr(module, "groups", 1) if right else 1
            return (float(parameter[0, 0].numel()) if parameter.ndim > 2 else 1.0) / groups, left, right
        return numel, 0, 0
    if isinstance(module, CHANNEL_NORMS) and parameter.ndim == 1 and parameter.numel() > 1:
        return 1.0, axis(path, "out", parameter.numel()), 0
    if isinstance(module, nn.Embedding):
        return float(parameter.shape[0]), axis(path, "out", parameter.shape[1]), 0
    bare = f"{path}.{name}" if path else name
    for d, length in enumerate(parameter.shape):
        number = axis(bare, f"dim:{d}", length)
        if number and length > 1:
            return numel / length, number, 0
    return numel, 0, 0


CHANNEL_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.PReLU,
)


def _positions(model: nn.Module, example_inputs: Any) -> tuple[dict[int, float], int]:
    """Output positions per sample of every convolution and linear layer that runs, and the FLOPs of the whole batch."""
    positions: dict[int, float] = {}
    batch = batch_size(example_inputs)

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        seen = output
        width = getattr(module, "out_features", getattr(module, "out_channels", 0))
        if isinstance(module, _ConvTransposeNd):
            seen, width = (args or tuple(kwargs.values()))[0], module.in_channels
        positions[id(module)] = positions.get(id(module), 0.0) + seen.numel() / (batch * int(width))

    handles = [m.register_forward_hook(record, with_kwargs=True) for m in _counted(model)]
    try:
        # With gradients on, attention takes the path whose products the counter sees.
        with quiet_model(model), torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile")  # the counter's hooks would fire twice: harmless
            with FlopCounterMode(display=False) as counter:
                call_model(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return positions, int(counter.get_total_flops())


def _counted(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if isinstance(m, _ConvNd | nn.Linear))
