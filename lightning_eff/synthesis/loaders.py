"""What a generator is trained on instead of data: numbered steps, put in the place of a data module's loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StepToken:
    """One step of training that needs no data."""

    __slots__ = ()


class StepTokens:
    """As many tokens as an epoch has steps. It is no DataLoader: Lightning would split those among processes.

    Args:
        steps: Steps of an epoch, >= 1, in each process.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[StepToken]:
        for _ in range(self.steps):
            yield StepToken()


class ShadowedLoaders:
    """Stands between a trainer and private records: training gets step tokens, validation nothing.

    It must be made before Lightning asks for a loader, hence in ``setup``: ``trainer.estimated_stepping_batches`` in
    ``configure_optimizers`` builds the training loader already.

    Args:
        trainer: Whose data module, if it has one.
        steps: Step tokens of an epoch.
        keep_validation: Leave validation alone.

    Attributes:
        private: The data module's own ``train_dataloader``; ``None`` without a data module.
    """

    def __init__(self, trainer: Trainer, steps: int, *, keep_validation: bool) -> None:
        self._put_back: list[Callable[[], None]] = []
        datamodule = getattr(trainer, "datamodule", None)
        self.private: Callable[[], Any] | None = None if datamodule is None else datamodule.train_dataloader
        if datamodule is not None:
            self._replace(datamodule, "train_dataloader", lambda: StepTokens(steps))
        if not keep_validation:
            self._replace(trainer, "limit_val_batches", 0)

    def restore(self) -> None:
        """Put everything back as it was; a second call does nothing."""
        while self._put_back:
            self._put_back.pop()()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        own = vars(owner)
        if name in own:
            before = own[name]
            self._put_back.append(lambda: setattr(owner, name, before))
        else:
            self._put_back.append(lambda: delattr(owner, name))
        setattr(owner, name, value)


class RestoreOnException(Callback):
    """Calls ``restore`` when a run ends by an exception, which Lightning tells callbacks and not modules.

    Args:
        restore: Puts back what the module replaced.
    """

    def __init__(self, restore: Callable[[], None]) -> None:
        self._restore = restore

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put back."""
        self._restore()
