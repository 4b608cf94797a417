"""From scores to masks: exactly the kept share, never an empty tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_eff.privacy.selection.granularity import Scope, Units
from lightning_eff.privacy.selection.plan import is_vector
from lightning_eff.privacy.selection.selected import Selection
from lightning_eff.privacy.selection.subsets import largest_subset, random_subset

Masks = dict[str, Tensor]
PruningUnit = Literal["element", "row"]


def pruning_targets(
    module: nn.Module, exclude: Sequence[str] = (), optimized: Container[int] | None = None
) -> dict[str, nn.Parameter]:
    """Parameters that may lose coordinates: trainable ones of two dimensions or more.

    Left whole are biases, and what has one dimension in disguise, as class tokens ``[1, 1, E]`` have.

    Args:
        module: the network.
        exclude: patterns of parameter names that are left whole too.
        optimized: ``id`` of the parameters that are trained; None is every one that requires a gradient.

    Raises:
        ValueError: nothing remains, or a layer is re-parametrised by ``torch.nn.utils.prune``.
    """
    reparametrised = [
        name.removesuffix("_orig")
        for name, _ in module.named_parameters()
        if name.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in dict(module.named_buffers())
    ]
    if reparametrised:
        raise ValueError(
            f"torch.nn.utils.prune has re-parametrised {reparametrised}: make that permanent with "
            "torch.nn.utils.prune.remove(layer, name) first"
        )
    targets = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        and not name.endswith("bias")
        and not is_vector(parameter.shape)
        and (optimized is None or id(parameter) in optimized)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not targets:
        raise ValueError(
            f"{type(module).__name__} has no trainable weight of two dimensions or more"
            + (f" that exclude={list(exclude)} does not name" if exclude else "")
        )
    return targets


def choose_masks(
    targets: Mapping[str, Tensor],
    amount: float,
    scores: Mapping[str, Tensor] | None = None,
    *,
    scope: Scope = "layerwise",
    granularity: PruningUnit = "element",
    min_keep_per_tensor: int = 1,
    seed: int = 0,
) -> tuple[Masks, list[str]]:
    """Keep ``round((1 - amount) n)`` units, of each tensor or of all together.

    Args:
        targets: tensors to prune, by name.
        amount: share that goes, in [0, 1).
        scores: by name, of every coordinate; None draws at random.
        scope: ``"layerwise"`` or ``"global"``.
        granularity: ``"element"`` or ``"row"``.
        min_keep_per_tensor: coordinates that every tensor keeps at least, also beyond the share.
        seed: of random draws.

    Returns:
        Masks by name, True where a coordinate stays; and the names of tensors that would have kept too few.
    """
    device = next(iter(targets.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    units = Units({name: Selection.all(one.shape) for name, one in targets.items()}, granularity, scope)
    chosen = units.choose(1 - amount, generator, scores)
    masks, rescued = {}, []
    for name, selection in chosen.items():
        shape = targets[name].shape
        least = min(min_keep_per_tensor, math.prod(shape))
        mask = selection.full_mask(device)
        in_rows = len(shape) if granularity == "element" else 1
        share = round((1 - amount) * math.prod(shape[:in_rows])) * math.prod(shape[in_rows:])
        if min(share, selection.count) < least if scope == "layerwise" else selection.count < least:
            rescued.append(name)
        if selection.count < least:
            mask = _at_least(least, shape, None if scores is None else scores[name], granularity, generator)
        masks[name] = mask
    return masks, rescued


def _at_least(
    least: int, shape: torch.Size, scores: Tensor | None, granularity: PruningUnit, generator: torch.Generator
) -> Tensor:
    """Keep the best units of one tensor until ``least`` coordinates stay."""
    size = 1 if granularity == "element" else math.prod(shape[1:])
    units, k = math.prod(shape) // size, math.ceil(least / size)
    if scores is None:
        flags = random_subset(units, k, generator)
    else:
        flags = largest_subset(scores.reshape(units, size).mean(1), k)
    return flags.unsqueeze(1).expand(units, size).reshape(shape).contiguous()


def prune_in_rounds(
    targets: Mapping[str, Tensor],
    amount: float,
    score: Callable[[Masks | None], Mapping[str, Tensor]],
    *,
    rounds: int = 100,
    scope: Scope = "global",
    granularity: PruningUnit = "element",
    min_keep_per_tensor: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Masks, list[str]]:
    """Prune a little, score what is left, prune again: round j of n keeps the share ``(1 - amount) ** (j / n)``.

    Args:
        targets: tensors to prune, by name.
        amount: share that is gone in the end, in [0, 1).
        score: scores of all coordinates, >= 0, given the masks so far.
        rounds: how many, >= 1.
        scope: ``"layerwise"`` or ``"global"``.
        granularity: ``"element"`` or ``"row"``.
        min_keep_per_tensor: coordinates that every tensor keeps at least.
        advance: called after every round.

    Returns:
        As :func:`choose_masks`.
    """
    masks: Masks | None = None
    rescued: list[str] = []
    for j in range(1, rounds + 1):
        scores = score(masks)
        if masks is not None:  # what is gone stays gone
            scores = {name: one.masked_fill(~masks[name], -1) for name, one in scores.items()}
        masks, rescued = choose_masks(
            targets,
            1 - (1 - amount) ** (j / rounds),
            scores,
            scope=scope,
            granularity=granularity,
            min_keep_per_tensor=min_keep_per_tensor,
        )
        advance()
    assert masks is not None
    return masks, rescued
