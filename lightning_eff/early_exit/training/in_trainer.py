"""What is asked of a Trainer before training: an example of its data, and whether its parts agree with phases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_eff.early_exit.training.phases import Phase
from lightning_eff.steps import steps_of_epoch
from lightning_eff.surgery.state import untouched_generators
from lightning_eff.surgery.structure import averaged_models


def first_batch(trainer: Trainer, pl_module: LightningModule) -> Any:
    """Return the first batch that the running task of the trainer will see.

    It is on the module's device and in its precision. The global random generators are left as they were.

    Raises:
        ValueError: there is none.
    """
    fitting = trainer.state.fn == TrainerFn.FITTING
    loop: Any = {
        TrainerFn.FITTING: trainer.fit_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }.get(trainer.state.fn)  # type: ignore[arg-type]
    batch = None
    if loop is not None and loop._data_source.is_defined():
        with untouched_generators():
            loaders = loop._data_source.dataloader()
            if not isinstance(loaders, CombinedLoader):
                loaders = CombinedLoader(loaders, "max_size_cycle" if fitting else "sequential")
            batch, _, _ = next(iter(loaders), (None, 0, 0))
    if batch is None:
        raise ValueError("there is no batch to build the exits from: give the module example_input")
    batch = pl_module._on_before_batch_transfer(batch)
    batch = trainer.strategy.batch_to_device(batch, pl_module.device)
    # the precision the module has now, which the trainer may be about to change
    floating = next((one.dtype for one in pl_module.parameters() if one.is_floating_point()), torch.float32)
    return tree_map(lambda x: x.to(floating) if isinstance(x, Tensor) and x.is_floating_point() else x, batch)


def steps_of_epochs(trainer: Trainer, first: int) -> Iterator[int]:
    """Count the optimizer steps of one epoch after the other, from the ``first`` on; none where data have no length.

    Before the fit begins, Lightning's loop sets its data up for counting and then never loads the state that loaders
    have in a checkpoint. So what was set up for counting is dropped.
    """
    loop = trainer.fit_loop
    begun = loop._combined_loader is not None
    with untouched_generators():
        loop.setup_data()
        if not begun and loop._data_fetcher is not None:
            loop._data_fetcher.teardown()
            loop._combined_loader = None
    for epoch in count(first):
        steps = steps_of_epoch(trainer, epoch)
        if not steps:
            return
        yield steps


def check_trainer(
    trainer: Trainer, pl_module: LightningModule, phases: Sequence[Phase], only_with_heads: set[str], built: bool
) -> None:
    """Raise, or warn, before any work where something in the trainer does not go together with phases.

    Args:
        trainer: about to fit.
        pl_module: its module, exits built.
        phases: that will be trained.
        only_with_heads: names that are logged in phases that train heads, and in no others.
        built: whether the exits were there before the trainer's data was looked at.

    Raises:
        MisconfigurationException: strategies that cannot change what is trained, or that lose the exits.
        ValueError: a callback that could not work.
    """
    strategy = trainer.strategy
    several = len(phases) > 1
    if several and strategy.restore_checkpoint_after_setup:
        raise MisconfigurationException(
            f"{type(strategy).__name__} shards the parameters and cannot change what is trained within one fit, which "
            f"the phases {[phase.train for phase in phases]} need. Train one phase a fit: regime=[Phase(...)], or "
            'regime="joint", or start_phase at the last phase with a backbone that is trained'
        )
    if not built and isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            "Launchers that spawn or fork copy the weights back into the module of the main process, which has no "
            'exits yet: give the module example_input, or use strategy="ddp", which starts the script once a process.'
        )
    own = sum(1 for _ in pl_module.parameters())
    if not all(sum(1 for _ in copy.parameters()) == own for copy in averaged_models(trainer)):
        raise ValueError("a callback has copied the module before the exits were built: give the module example_input")
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if several and isinstance(callback, EarlyStopping):
            rank_zero_warn(
                f"{type(callback).__name__} ends the whole fit, even in the first of {len(phases)} phases: "
                "PhaseEarlyStopping ends the phase and goes on with the next one"
            )
        if isinstance(callback, StochasticWeightAveraging) and phases[-1].train == "heads":
            raise ValueError(
                "StochasticWeightAveraging estimates the statistics of all BatchNorm layers anew at the end, and in "
                'phase "heads" the backbone stands still: use EMAWeightAveraging'
            )
        monitored = None if getattr(callback, "ends_phases", False) else getattr(callback, "monitor", None)
        early = [phase.train for phase in phases if phase.train == "backbone"]
        if early and monitored in only_with_heads and getattr(callback, "strict", True):
            late = ", ".join(repr(phase.train) for phase in phases if phase.train != "backbone") or "none here"
            raise ValueError(
                f"{type(callback).__name__} monitors {monitored!r}, which is logged in phases that train heads "
                f'({late}) and not in phase "backbone": keep the last weights, ModelCheckpoint(save_last=True), or '
                "train the phases in fits of their own with start_phase"
            )
        if early and len(early) < len(phases) and monitored is not None and isinstance(callback, ModelCheckpoint):
            rank_zero_warn(
                f"ModelCheckpoint monitors {monitored!r} over phases whose numbers mean different things: the best may "
                "be weights whose heads were never trained. Keep the last ones (save_last=True), or train the phases "
                "in fits of their own with start_phase"
            )
