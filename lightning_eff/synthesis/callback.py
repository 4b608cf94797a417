"""Pictures of a training as it goes, and synthetic records written by ``trainer.predict``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_eff.arguments import check_whole
from lightning_eff.documents import parsed, whole_state, write_text
from lightning_eff.reporting import results_folder, save_figure
from lightning_eff.synthesis.figures import loss_figure, signal_figure
from lightning_eff.synthesis.module import DPNTKGenerator


class SynthesisFigures(Callback):
    """Write pictures of a :class:`DPNTKGenerator` into a folder; none of them looks at private data.

    ``signal_to_noise.png`` when training begins, ``samples-00100.png`` (images only, a row a class, the same latent
    codes every time) every so many steps and at the end, ``loss.png`` at the end.

    Args:
        dirpath: The folder; ``None`` takes ``synthesis`` beside what the trainer logs.
        every_n_steps: Steps between two pictures of samples, >= 1.
        per_class: Samples of each class, >= 1.
        class_names: In the order of the classes.
        seed: Of the latent codes.

    Attributes:
        written: Files written so far in this run.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        every_n_steps: int = 500,
        per_class: int = 10,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        check_whole("every_n_steps", every_n_steps, least=1)
        check_whole("per_class", per_class, least=1)
        check_whole("seed", seed, least=0)
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.every_n_steps, self.per_class, self.seed = every_n_steps, per_class, seed
        self.class_names = None if class_names is None else list(class_names)
        self.written: list[Path] = []
        self._steps: list[int] = []
        self._losses: list[torch.Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other modules."""
        if not isinstance(pl_module, DPNTKGenerator):
            raise ValueError(f"SynthesisFigures draws a DPNTKGenerator, got a {type(pl_module).__name__}")
        self._folder = results_folder(self.dirpath, trainer, "synthesis")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the signal to noise of the release."""
        assert isinstance(pl_module, DPNTKGenerator)
        if trainer.is_global_zero and pl_module.embedding is not None:
            names = self.class_names or _label_names(pl_module)
            self._save("signal_to_noise.png", signal_figure(pl_module.embedding, names))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss, and draw samples where it is time."""
        if not trainer.is_global_zero:
            return
        self._steps.append(trainer.global_step)
        self._losses.append(trainer.callback_metrics["train/mmd2"].detach())
        if trainer.global_step % self.every_n_steps == 0:
            self._draw_samples(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw samples and the loss."""
        assert isinstance(pl_module, DPNTKGenerator)
        if trainer.is_global_zero and self._steps:
            self._draw_samples(trainer, pl_module)
            losses = torch.stack(self._losses).tolist()
            self._save("loss.png", loss_figure(self._steps, losses, pl_module.noise_floor))

    def state_dict(self) -> dict[str, Any]:
        """Return the losses so far."""
        losses = torch.stack(self._losses).tolist() if self._losses else []
        return {"steps": list(self._steps), "losses": losses}

    @whole_state
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the losses of a checkpoint."""
        self._steps = parsed(list[int], state_dict["steps"], "steps")
        self._losses = [torch.tensor(loss) for loss in parsed(list[float], state_dict["losses"], "losses")]

    def _draw_samples(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DPNTKGenerator)
        if not _are_images(pl_module):
            return
        labels = torch.arange(pl_module.num_classes).repeat_interleave(self.per_class)
        samples = pl_module.generate(len(labels), labels, seed=self.seed)
        self._save(f"samples-{trainer.global_step:05d}.png", samples.grid(self.per_class, self.class_names))

    def _save(self, name: str, figure: Any) -> None:
        path = save_figure(figure, self._folder / name)
        if path not in self.written:
            self.written.append(path)


class SyntheticDataWriter(Callback):
    """Write synthetic records in ``trainer.predict(model)`` or ``lightning-eff predict``; in ``fit`` it does nothing.

    A table becomes ``synthetic.csv``; images and vectors become ``synthetic.npz``, and images are shown besides in
    ``synthetic.png``. ``privacy_report.md`` goes with them. Writing costs no privacy, however often.

    Args:
        n: Records, >= 1.
        dirpath: The folder; ``None`` takes ``synthesis`` beside what the trainer logs.
        labels: Class of all of them, its number or its category; ``None`` takes every class as often as the release
            has it.
        seed: Of the records; ``None`` draws one.

    Attributes:
        written: Files written in the last run.
    """

    def __init__(
        self, n: int, dirpath: str | Path | None = None, labels: int | str | None = None, seed: int | None = None
    ) -> None:
        check_whole("n", n, least=1)
        self.n, self.labels, self.seed = n, labels, seed
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.written: list[Path] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other modules."""
        if not isinstance(pl_module, DPNTKGenerator):
            raise ValueError(
                f"SyntheticDataWriter writes records of a DPNTKGenerator, got a {type(pl_module).__name__}"
            )
        self._folder = results_folder(self.dirpath, trainer, "synthesis")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the records and write them."""
        assert isinstance(pl_module, DPNTKGenerator)
        if not trainer.is_global_zero:
            return
        folder = self._folder
        made = pl_module.generate(self.n, self.labels, seed=self.seed)
        if made.schema is not None:
            self.written = [made.to_csv(folder / "synthetic.csv")]
        else:
            self.written = [made.to_npz(folder / "synthetic.npz")]
            if _are_images(pl_module):
                self.written.append(made.save_grid(folder / "synthetic.png"))
        self.written.append(write_text(folder / "privacy_report.md", pl_module.privacy_report().to_markdown()))


def _are_images(module: DPNTKGenerator) -> bool:
    return len(module.space.shape) == 3 and module.space.shape[0] in (1, 3)


def _label_names(module: DPNTKGenerator) -> list[str] | None:
    if module.schema is None or module.schema.label_categories is None:
        return None
    names = [str(category) for category in module.schema.label_categories]
    return [*names, "missing"][: module.num_classes]
