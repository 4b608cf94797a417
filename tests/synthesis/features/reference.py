"""Features the slow way: per-sample gradients, written out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_eff.synthesis.features import NTKFeatures


def looped(network: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    """Return the gradients ``(n, P)`` by one backward for each sample."""
    rows = []
    for sample in x:
        weights = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
        total = functional_call(network, weights, (sample[None],)).sum()
        found = torch.autograd.grad(total, [weights[name] for name in names])
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def vmapped(network: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    """Return the gradients ``(n, P)`` by ``torch.func``; differentiable in ``x``."""
    weights = {name: p.detach() for name, p in network.named_parameters()}
    one = grad(lambda values, sample: functional_call(network, values, (sample[None],)).sum())
    found = vmap(one, in_dims=(None, 0))(weights, x)
    return torch.cat([found[name].flatten(1) for name in names], 1)


def unit(gradients: Tensor) -> Tensor:
    return gradients / gradients.norm(dim=1, keepdim=True)


def summed(features: Tensor, y: Tensor, classes: int) -> Tensor:
    return nn.functional.one_hot(y, classes).to(features).T @ features


def expanded(features: NTKFeatures, sums: Tensor, network: nn.Module) -> Tensor:
    """Undo the collapse of the last layer in ``(C, P)``: copies of its one row, each divided by sqrt(K)."""
    pieces = sums.split([torch.Size(shape).numel() for shape in features.layout.values()], 1)
    full = []
    for name, piece in zip(features.layout, pieces, strict=True):
        copies = network.get_parameter(name).numel() // piece.shape[1]
        full.append(piece.repeat(1, copies) / copies**0.5)
    return torch.cat(full, 1)


def discrepancy(phi: Callable[[Tensor], Tensor], sums: Tensor, counts: Tensor, x: Tensor, y: Tensor, u: bool) -> Tensor:
    """Return the squared mean discrepancy, averaged over classes, from features ``phi(x)`` that are written out."""
    rows, total = phi(x), x.new_zeros(())
    for label, (class_sum, count) in enumerate(zip(sums, counts, strict=True)):
        here = rows[y == label]
        products = here @ here.T
        if u:
            spread = (products.sum() - products.trace()) / (len(here) * (len(here) - 1))
        else:
            spread = products.mean()
        mean = class_sum / count
        total = total + (mean @ mean - 2 * here.mean(0) @ mean + spread) / len(sums)
    return total
