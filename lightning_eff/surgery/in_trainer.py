"""A cut inside a running Trainer: optimizers, averaged models and the distributed wrapper follow.

The only file of this room that touches Lightning's strategies, two of their private functions among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_eff.surgery.cut import Cut, apply_plan
from lightning_eff.surgery.graph import ChannelGraph
from lightning_eff.surgery.plan import PruningPlan
from lightning_eff.surgery.structure import averaged_models


def refuse_unsupported(trainer: Trainer) -> None:
    """Raise before any work is done where a cut cannot be carried through.

    Raises:
        MisconfigurationException: sharded strategies, launchers that copy the weights back into the whole network.
    """
    strategy = trainer.strategy
    if strategy.restore_checkpoint_after_setup:
        raise MisconfigurationException(
            f"{type(strategy).__name__} shards the parameters before the shapes of a pruned network are known. Prune "
            'in one process (or with strategy="ddp"), then load the result with lightning_eff.load_pruned and train on.'
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            "Launchers that spawn or fork copy the weights back into the un-pruned network of the main process. "
            'Use strategy="ddp", which starts the script once per process.'
        )


def cutters(trainer: Trainer) -> list[str]:
    """Names of the callbacks that will make tensors of the network smaller, by their attribute ``cuts_channels``."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [type(callback).__name__ for callback in callbacks if getattr(callback, "cuts_channels", False)]


def apply_plan_in_trainer(
    trainer: Trainer,
    pl_module: LightningModule,
    plan: PruningPlan,
    example_inputs: Any,
    *,
    graph: ChannelGraph,
    submodule: str = "",
    verify: bool = True,
) -> Cut:
    """Cut ``pl_module`` (or its ``submodule``) in the middle of a fit; every rank follows the plan of rank 0."""
    refuse_unsupported(trainer)
    plan = PruningPlan.from_dict(trainer.strategy.broadcast(plan.to_dict()))
    cut = apply_plan(
        pl_module.get_submodule(submodule),
        plan,
        example_inputs,
        graph=graph,
        optimizers=trainer.optimizers,
        twins=[twin.get_submodule(submodule) for twin in averaged_models(trainer)],
        verify=verify,
    )
    rewrap(trainer, pl_module)
    return cut


def load_in_trainer(
    trainer: Trainer, pl_module: LightningModule, state: Mapping[str, Tensor], *, submodule: str = ""
) -> None:
    """Take on corrected tensors of a smaller network, averaged models too.

    What optimizers remember of the old weights would lead their first steps astray, so it is forgotten.
    """
    for module in (pl_module, *averaged_models(trainer)):
        module.get_submodule(submodule).load_state_dict(state, strict=False)
    for name, parameter in pl_module.get_submodule(submodule).named_parameters():
        for optimizer in trainer.optimizers if name in state else ():
            optimizer.state.pop(parameter, None)


def rewrap(trainer: Trainer, pl_module: LightningModule) -> None:
    """Build DistributedDataParallel anew after sizes or ``requires_grad`` have changed.

    Parameters it was not built for would be averaged wrongly or, silently, not at all. Every process must call this.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        for parameter in pl_module.parameters():
            parameter.grad = None
        strategy.model = strategy._setup_model(pl_module)
        strategy._register_ddp_hooks()
