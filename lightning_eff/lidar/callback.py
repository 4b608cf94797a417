"""Select lidar lines for a depth completion network that a Trainer is training, without changing its run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lightning_eff.arguments import check_whole
from lightning_eff.batch import SplitBatch
from lightning_eff.documents import whole_state
from lightning_eff.lidar.batches import LidarKeys
from lightning_eff.lidar.completion.forwarding import Forward
from lightning_eff.lidar.estimators import EstimationOptions
from lightning_eff.lidar.evaluation import LineEvaluation
from lightning_eff.lidar.frames import Frame
from lightning_eff.lidar.in_trainer import frames_in, gathered, on_device, validation_batches
from lightning_eff.lidar.measuring import Measurement
from lightning_eff.lidar.report import LineSelection
from lightning_eff.lidar.settings import BASELINES, Baseline, LineGameOptions, Settings, Spread
from lightning_eff.lidar.study import LineStudy
from lightning_eff.surgery.state import untouched_generators


class LidarSaSCallback(Callback):
    """Which lidar lines the network in training should keep, at the end of a fit and every few epochs.

    The module is called as a network, `module(rgb, sparse)`, or as `forward` says. Its modes, weights, buffers and the
    random generators are left as they were. Logs `lidar/max_se`, `lidar/v_empty`, `lidar/v_full`, `lidar/forwards`,
    `lidar/rank_stability` (against the selection before) and `lidar/rmse/region/k16` and so on, on the calibration
    frames themselves; they stand in `trainer.callback_metrics` too. To measure a selection on other frames take
    :class:`~lightning_eff.lidar.selector.LidarSaSSelector`.

    Args:
        k: how many lines to keep, one number or several.
        num_lines: lines of the sensor, 1 to 255.
        every_n_epochs: select after the validation of every so manieth epoch too; None: only at the end of the fit.
        calibration: frames to select on, the same on all processes (every process evaluates its part of them); None
            takes the trainer's validation loaders.
        game: what is played for, and by which lines.
        estimation: how values are estimated, all rounds at once.
        spread: how lines are selected by value and spread.
        baselines: what the selection is measured beside; see `LidarSaSSelector`.
        split_batch: `batch -> (inputs, target)`; a `LidarKeys` renames keys.
        forward: how the module is called, see `DepthForward`.
        dirpath: folder for `lines.json`, tables and figures, those of an epoch in a folder of their own; None writes
            nothing.
        seed: of coalitions and draws; 0 leaves that of `estimation`.

    Attributes:
        result: the last selection; None before the first.
        evaluation: its errors on the calibration frames beside those of others.

    Raises:
        ValueError: what cannot be meant, before any work; at the start of a fit, neither validation data nor
            `calibration`.
    """

    def __init__(
        self,
        k: Sequence[int] = (32, 16, 8, 4),
        num_lines: int = 64,
        *,
        every_n_epochs: int | None = None,
        calibration: DataLoader[Any] | None = None,
        game: LineGameOptions = LineGameOptions(),  # noqa: B008 (frozen)
        estimation: EstimationOptions = EstimationOptions(),  # noqa: B008
        spread: Spread = Spread(),  # noqa: B008
        baselines: Sequence[Baseline] = BASELINES,
        split_batch: SplitBatch | None = None,
        forward: Forward = "auto",
        dirpath: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if every_n_epochs is not None:
            check_whole("every_n_epochs", every_n_epochs)
        estimation = replace(estimation, rounds=1, seed=seed or estimation.seed)
        self.settings = Settings(k, num_lines, game, estimation, spread, None, tuple(baselines), forward)
        self.every_n_epochs, self.calibration = every_n_epochs, calibration
        self.split_batch = split_batch or LidarKeys()
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.result: LineSelection | None = None
        self.evaluation: LineEvaluation | None = None
        self._epoch: int | None = None  # of the last selection in this fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a precision that depths would not survive."""
        if stage == "fit" and isinstance(trainer.precision_plugin, HalfPrecision):
            raise ValueError(
                f"{type(self).__name__} measures depths, whose metres precision={trainer.precision!r} rounds before "
                "they are seen: use 'bf16-mixed', or select lines by trainer.fit of a LidarSaSSelector afterwards"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what could not be done at the end, before training."""
        self._epoch = None
        if self.calibration is None and not (
            trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined() and trainer.limit_val_batches > 0
        ):
            raise ValueError(
                f"{type(self).__name__} has no frames to select lines on: give it calibration=, or the trainer "
                "validation data"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select where the epoch is one of those."""
        if trainer.sanity_checking or not self.every_n_epochs or trainer.state.fn != "fit":
            return
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._run(trainer, pl_module, f"epoch={trainer.current_epoch}")
            self._epoch = trainer.current_epoch

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select, unless that was done in the last epoch."""
        if self._epoch is None or self._epoch != trainer.current_epoch - 1:
            self._run(trainer, pl_module, "")

    def state_dict(self) -> dict[str, Any]:
        """The last selection, plain Python."""
        return {"result": None if self.result is None else self.result.to_dict()}

    @whole_state
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        found = state_dict["result"]
        self.result = None if found is None else LineSelection.from_dict(found)

    def _run(self, trainer: Trainer, pl_module: LightningModule, folder: str) -> None:
        study = LineStudy(pl_module, self.settings, gathered)
        study.selection = self.result  # what the overlap is with

        def frames() -> Iterator[Frame]:
            with untouched_generators():
                yield from self._frames(trainer, pl_module)

        for frame in frames():
            study.count(frame)
        study.begin()
        for frame in frames():
            study.advance(frame, 1)
        study.share()
        now = study.note_round()
        result = self.result = study.finish(frames)
        measurement = Measurement(study)
        for frame in frames():
            measurement.add(frame)
        found = self.evaluation = measurement.evaluation("calibration")
        logged = {
            "lidar/max_se": now.max_se,
            "lidar/v_empty": result.error_empty,
            "lidar/v_full": result.error_full,
            "lidar/forwards": float(result.forwards),
            **({} if now.stability is None else {"lidar/rank_stability": now.stability}),
            **{f"lidar/{name}": value for name, value in found.logged().items()},
        }
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.global_step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in logged.items()})
        if trainer.is_global_zero:
            if self.dirpath is not None:
                result.save(self.dirpath / folder / "lines.json")
                result.write(self.dirpath / folder)
                found.write(self.dirpath / folder)
            rank_zero_info(str(result))

    def _frames(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[Frame]:
        for batch in validation_batches(trainer, self.calibration):
            inputs, target = self.split_batch(on_device(trainer, pl_module, batch))
            yield from frames_in(inputs, target)
