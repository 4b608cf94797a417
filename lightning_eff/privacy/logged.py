"""What training steps log on several processes, some of which may not run the step for want of samples.

Lightning reduces at the end of an epoch what a process has logged, and waits for the others with every reduction. A
process that drew nobody all through the epoch has logged nothing and would not come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torchmetrics import Metric

_NOTHING = {"max": -torch.inf, "min": torch.inf}


def agree_on_logged(results: Any, module: LightningModule, reduce: Callable[..., Any]) -> None:
    """Give every process all keys that any of them has to reduce, in one order; called by all of them.

    A key that a process lacks gets no weight: its tensor is a mean over no samples, or a sum of nothing, and its
    metric has not been updated. Where values are not reduced over processes, such a mean is nan.

    Args:
        results: The training results of the Trainer.
        module: Has the metrics.
        reduce: With which Lightning reduces what is logged with ``sync_dist=True``.

    Raises:
        RuntimeError: A key that some lack is reduced over a group of processes; raised by all of them.
    """
    ours = {key: _told(item) for key, item in results.valid_items() if _is_shared(item)}
    everyone: list[dict[str, dict[str, Any]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, ours)
    if all(list(theirs) == list(ours) for theirs in everyone):
        return
    union = {key: told for theirs in everyone for key, told in theirs.items()}
    for key, told in union.items():
        if told.pop("grouped") and not all(key in theirs for theirs in everyone):
            raise RuntimeError(
                f"{key} was logged with sync_dist_group, and not by all processes, as one may have no samples: leave "
                "sync_dist_group out"
            )
    modules = dict(module.named_modules())
    for key, told in union.items():
        if key not in ours:
            attribute = told["metric_attribute"]
            nothing = torch.tensor(_NOTHING.get(told["reduce_fx"].__name__, 0.0), device=module.device)
            value = nothing if attribute is None else modules[attribute]
            results.log(**told, value=value, sync_dist_fn=reduce, batch_size=0)
            if isinstance(value, Metric):
                value._update_count = max(1, value._update_count)  # with nothing, about which it need not warn
    # reductions follow the order of the keys
    items = {**{key: results[key] for key in union}, **results}
    results.clear()
    results.update(items)


def _is_shared(item: Any) -> bool:
    return item.meta.on_epoch and not item.meta.sync.rank_zero_only


def _told(item: Any) -> dict[str, Any]:
    """How an item was logged, but for its value."""
    names = (
        "fx",
        "name",
        "prog_bar",
        "logger",
        "on_step",
        "on_epoch",
        "reduce_fx",
        "enable_graph",
        "add_dataloader_idx",
        "metric_attribute",
    )
    meta = item.meta
    told = {name: getattr(meta, name) for name in names}
    return {**told, "sync_dist": meta.sync.should, "grouped": meta.sync.group is not None}


@contextmanager
def metrics_of_the_process(metrics: Iterable[Metric]) -> Iterator[None]:
    """Keep metrics from asking other processes, which may not be there; afterwards they do so again."""
    metrics = list(metrics)
    before = [metric.distributed_available_fn for metric in metrics]
    try:
        for metric in metrics:
            metric.distributed_available_fn = _alone
        yield
    finally:
        for metric, available in zip(metrics, before, strict=True):
            metric.distributed_available_fn = available
            metric._computed = None  # it would be taken for the value of all


def _alone() -> bool:
    return False
