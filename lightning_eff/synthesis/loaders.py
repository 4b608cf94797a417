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
        module: The one the trainer runs.
        trainer: Whose data module, if it has one, or whose loader passed to ``fit``.
        training: Makes the tokens of the training.
        prediction: Makes those of the prediction.
        keep_validation: Leave validation alone.

    Attributes:
        private: The data module's own ``train_dataloader``, or what gives the loader passed to ``fit``; else ``None``.
    """

    def __init__(
        self,
        module: LightningModule,
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
        if datamodule is None and fitting:
            source = trainer.fit_loop._data_source
            if not isinstance(given := source.instance, LightningModule | StepTokens | None):
                self.private = lambda: given
                self._replace(source, "instance", module)
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


class DataFreeModule(LightningModule):
    """A module whose steps need no data: the loaders of a data module are covered while it is trained or predicts.

    Attributes:
        steps_per_epoch: >= 1, in each process.
        keep_validation: Leave validation alone.
    """

    steps_per_epoch: int
    keep_validation: bool = False
    _shadow: ShadowedLoaders | None = None

    @property
    def private_loader(self) -> Callable[[], Any] | None:
        """Gives the data module's own loader, or that passed to ``fit``, while it is covered; ``None`` without one."""
        return None if self._shadow is None else self._shadow.private

    def configure_callbacks(self) -> list[Callback]:
        """Put step tokens before the data module's loaders, and have these put back also after an exception."""
        self._cover_loaders()
        return [RestoreOnException(self._restore_loaders)]

    def setup(self, stage: str) -> None:
        """Put step tokens before the data module's loaders where a subclass has callbacks of its own."""
        if self._shadow is None:
            self._cover_loaders()

    def train_dataloader(self) -> StepTokens:
        """Return step tokens: training needs no data."""
        return StepTokens(self.steps_per_epoch, lambda: self.current_epoch)

    def val_dataloader(self) -> Any:
        """Return no loader; with ``validation_step`` there must be one, or Lightning warns."""
        return []

    def predict_dataloader(self) -> StepTokens:
        """Return one token: ``trainer.predict`` needs no data."""
        return StepTokens(1, lambda: 0)

    def predict_step(self, batch: Any, batch_idx: int) -> list[Any]:
        """Return nothing: a :class:`SyntheticDataWriter` among the callbacks makes and writes the records.

        Raises:
            RuntimeError: The batch is no step token, so a private one.
        """
        if not isinstance(batch, StepToken):
            raise RuntimeError("prediction makes records and takes none: leave dataloaders out of trainer.predict")
        return []

    def teardown(self, stage: str) -> None:
        """Give the data module its loaders back."""
        self._restore_loaders()

    def __getstate__(self) -> dict[str, Any]:
        # copies of the module, as averaging of weights makes them, must not hold the data module
        return {**super().__getstate__(), "_shadow": None}

    def _cover_loaders(self) -> None:
        self._restore_loaders()
        self._shadow = ShadowedLoaders(
            self, self.trainer, self.train_dataloader, self.predict_dataloader, keep_validation=self.keep_validation
        )

    def _restore_loaders(self) -> None:
        if self._shadow is not None:
            self._shadow.restore()
            self._shadow = None
