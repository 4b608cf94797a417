"""What a generator is trained on instead of data: numbered steps, put in the place of a data module's loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class StepToken:
    """One step of training that needs no data."""

    __slots__ = ()


class StepTokens:
    """As many tokens as an epoch has steps. It is no DataLoader: Lightning would split those among processes.

    Lightning stores ``state_dict()`` in checkpoints: a run resumed in the middle of an epoch gets the rest of it.

    Args:
        steps: Steps of an epoch, >= 1, in each process.
        epoch: Tells the number of the epoch.
    """

    def __init__(self, steps: int, epoch: Callable[[], int]) -> None:
        self.steps = steps
        self._epoch = epoch
        self._seen = 0
        self._loaded: Mapping[str, int] = {}

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[StepToken]:
        # a generator: what stands here runs at the first step, when Lightning knows the epoch
        loaded, self._loaded = self._loaded, {}
        self._seen = loaded["steps_seen"] if loaded.get("epoch") == self._epoch() else 0
        while self._seen < self.steps:
            self._seen += 1
            yield StepToken()

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its steps were begun."""
        return {"epoch": self._epoch(), "steps_seen": self._seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Make the next iteration go on, if it is of the same epoch."""
        self._loaded = dict(state)


class ShadowedLoaders:
    """Stands between a trainer and private records: training and prediction get step tokens, validation nothing.

    It must be made before Lightning asks for a loader, so not after ``setup``: ``trainer.estimated_stepping_batches``
    in ``configure_optimizers`` builds the training loader already. In ``configure_callbacks`` it also comes before
    Lightning warns of a validation step without a validation loader.

    Args:
        trainer: Whose data module, if it has one.
        training: Makes the tokens of the training.
        prediction: Makes those of the prediction.
        keep_validation: Leave validation alone.

    Attributes:
        private: The data module's own ``train_dataloader``; ``None`` without a data module.
    """

    def __init__(
        self,
        trainer: Trainer,
        training: Callable[[], StepTokens],
        prediction: Callable[[], StepTokens],
        *,
        keep_validation: bool,
    ) -> None:
        self._put_back: list[Callable[[], None]] = []
        datamodule = getattr(trainer, "datamodule", None)
        self.private: Callable[[], Any] | None = None if datamodule is None else datamodule.train_dataloader
        fitting, predicting = (trainer.state.fn == fn for fn in (TrainerFn.FITTING, TrainerFn.PREDICTING))
        if datamodule is not None and predicting:
            self._replace(datamodule, "predict_dataloader", lambda: prediction())
        if datamodule is not None and fitting:
            self._replace(datamodule, "train_dataloader", lambda: training())
            if not keep_validation:
                self._replace(datamodule, "val_dataloader", _no_loaders)
        if fitting and not keep_validation:
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


def _no_loaders() -> list[Any]:
    return []


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
