"""What a run leaves behind: pictures while it trains, table and figures of a test, trajectories of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_eff.arguments import check_whole
from lightning_eff.batch import take
from lightning_eff.glimpse.exploration import Trajectory
from lightning_eff.glimpse.figures import exploration_figure, save_animation
from lightning_eff.glimpse.module import AdaGlimpseModule
from lightning_eff.glimpse.report import ExplorationReport
from lightning_eff.reporting import results_folder, save_figure


class GlimpseReport(Callback):
    """Write what an :class:`AdaGlimpseModule` does into a folder; it changes nothing of the run.

    ``exploration-003.png`` after validation; after a test ``policies`` as ``.md``, ``.csv`` and ``.json``, printed
    besides, ``exploration.png``, ``steps.png``, ``exploration.gif``, ``coverage.png``, ``scales.png``, and where images
    do not stop early ``curves.png``; after a prediction ``trajectories.jsonl``, one file a process, each of which
    numbers the scenes that it saw from 0.

    Args:
        dirpath: The folder; None takes ``glimpse`` beside what the trainer logs.
        every_n_epochs: Validated epochs between two pictures, >= 1; None draws none.
        shown: Images shown, >= 1.
        explored: First images of the test that coverage and scales are drawn of, >= ``shown``.
        class_names: In the order of the classes.
        verbose: Print the table too.

    Attributes:
        written: Files written so far.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        every_n_epochs: int | None = 1,
        shown: int = 6,
        explored: int = 500,
        class_names: Sequence[str] | None = None,
        verbose: bool = True,
    ) -> None:
        if every_n_epochs is not None:
            check_whole("every_n_epochs", every_n_epochs)
        check_whole("shown", shown)
        check_whole("explored", explored, shown)
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.every_n_epochs, self.shown, self.explored = every_n_epochs, shown, explored
        self.class_names = None if class_names is None else list(class_names)
        self.verbose = verbose
        self.written: list[Path] = []
        self._kept: list[tuple[Tensor, Any]] = []
        self._seen: list[Trajectory] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other modules."""
        if not isinstance(pl_module, AdaGlimpseModule):
            raise ValueError(f"GlimpseReport tells of an AdaGlimpseModule, got a {type(pl_module).__name__}")
        self._folder = results_folder(self.dirpath, trainer, "glimpse")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to keep images."""
        self._kept = []

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first images."""
        if self._is_due(trainer):
            self._keep(trainer, pl_module, batch, self.shown)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw where the agent looks by now."""
        assert isinstance(pl_module, AdaGlimpseModule)
        if self._kept and self._is_due(trainer):
            images, target = self._first()
            seen = pl_module.explore(images)
            figure = exploration_figure(images, seen, target, self.class_names, self.shown)
            self._save(f"exploration-{trainer.current_epoch:03d}.png", figure)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to keep images."""
        self._kept = []

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first images."""
        self._keep(trainer, pl_module, batch, self.explored)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write the table, draw the figures."""
        assert isinstance(pl_module, AdaGlimpseModule)
        if not trainer.is_global_zero:
            return
        report = ExplorationReport(pl_module)
        if self._kept:
            images, target = self._first()
            few, truth = images[: self.shown], None if target is None else target[: self.shown]
            seen = pl_module.explore(few, predictions="all")
            gif = self._folder / "exploration.gif"
            self._note(save_animation(few, seen, gif, target=truth, class_names=self.class_names))
            places = pl_module.explore(images, predictions="none")
            report = ExplorationReport(pl_module, few, seen, truth, places, self.class_names)
        if self.verbose:
            report.print()
        for path in report.write(self._folder):
            self._note(path)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to collect trajectories."""
        self._seen = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect a trajectory."""
        self._seen.append(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the trajectories of this process."""
        seen, self._seen = self._seen, []
        if seen:
            name = "trajectories.jsonl" if trainer.world_size == 1 else f"trajectories-{trainer.global_rank}.jsonl"
            self._note(Trajectory.cat(seen).save(self._folder / name))

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking or not trainer.is_global_zero or self.every_n_epochs is None:
            return False
        validated = trainer.current_epoch // (trainer.check_val_every_n_epoch or 1)
        return validated % self.every_n_epochs == 0

    def _keep(self, trainer: Trainer, pl_module: LightningModule, batch: Any, most: int) -> None:
        assert isinstance(pl_module, AdaGlimpseModule)
        missing = most - sum(len(images) for images, _ in self._kept)
        if missing > 0 and trainer.is_global_zero:
            images, target = pl_module._images_and_target(batch)
            self._kept.append((images[:missing], take(target, slice(missing))))

    def _first(self) -> tuple[Tensor, Tensor | None]:
        """Return the images kept, and their targets where these are tensors."""
        kept, self._kept = self._kept, []
        targets = [target for _, target in kept]
        whole = all(isinstance(target, Tensor) for target in targets)
        return torch.cat([images for images, _ in kept]), torch.cat(targets) if whole else None

    def _save(self, name: str, figure: Any) -> None:
        self._note(save_figure(figure, self._folder / name))

    def _note(self, path: Path) -> None:
        if path not in self.written:
            self.written.append(path)
