"""Select lidar lines with the verbs of a Trainer.

`fit` evaluates coalitions of lines, an epoch being one round of them over the calibration frames; `validate` and `test`
measure the selection beside others; `predict` completes depth from the selected lines. After "Lidar Line Selection with
Spatially-Aware Shapley Value for Cost-Efficient Depth Completion" (arXiv 2303.11720).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_eff.batch import SplitBatch
from lightning_eff.documents import whole_state
from lightning_eff.lidar.announcement import announcement
from lightning_eff.lidar.batches import LidarKeys
from lightning_eff.lidar.choosing import choose, kept_pixels
from lightning_eff.lidar.completion.forwarding import Forward
from lightning_eff.lidar.dynamic import lines_by_frame, predicted_lines
from lightning_eff.lidar.estimators import EstimationOptions
from lightning_eff.lidar.evaluation import LineEvaluation
from lightning_eff.lidar.frames import Frame
from lightning_eff.lidar.hyperparameters import built, load_weights, plain_hyperparameters
from lightning_eff.lidar.in_trainer import Reader, frames_in, gathered
from lightning_eff.lidar.journal import model_hash
from lightning_eff.lidar.measuring import Measurement
from lightning_eff.lidar.records import FrameId
from lightning_eff.lidar.report import LineSelection
from lightning_eff.lidar.reuse import choice_of, choose_again
from lightning_eff.lidar.settings import BASELINES, Baseline, Dynamic, LineGameOptions, Settings, Spread
from lightning_eff.lidar.study import LineStudy
from lightning_eff.reporting import save_figure
from lightning_eff.surgery.structure import prunable

_UNKNOWN = torch.finfo(torch.float32).max  # finite, so that EarlyStopping does not take it for the end
_CHECKPOINT = "lidar_lines"


@prunable
class LidarSaSSelector(LightningModule):
    """Which lines of a lidar to keep, so that a network's completed depth stays good.

    Logs, behind `lidar/`: `max_se`, the largest standard error of a line's value; `rank_stability`, the overlap of the
    selection with that of the round before; `forwards` and `forwards_per_second`; at the end of the fit `v_empty` and
    `v_full` (the errors without any line and with all), `proxy_correlation` and `phi_line_07` and so on; validation and
    test log `val/rmse/region/k16` and so on. `global_step` counts batches. A fit measures nothing on validation data:
    `limit_val_batches=0` saves reading them.

    A model handed over as an object is not written into the checkpoint's hyperparameters, only its weights are:
    `LidarSaSSelector.load_from_checkpoint(path, model=net)`.

    Args:
        model: completes depth; it is evaluated in evaluation mode, never trained, and left as it was.
        k: how many lines to keep; several numbers are selected for at once, and `predict` uses the first.
        num_lines: lines of the sensor, 1 to 255.
        game: what is played for, and by which lines.
        estimation: how values are estimated; its rounds are epochs. The trainer stops after the last.
        spread: how lines are selected by value and spread.
        dynamic: let every frame have lines of its own; None selects the same for all.
        baselines: what the selection is measured beside: `"uniform"`ly spread candidates, `"uniform_sensor"` over all
            lines, ten `"random"` draws, `"top"` (values without spread), `"most_points"`, `"loo"` (leave one out),
            `"greedy"` (the network is asked sum_{j<k} (n - j) times a frame), and on the gap game, for which no network
            is asked, `"gap_greedy"` and the optimum `"gap_dp"`.
        split_batch: `batch -> (inputs, target)`; a `LidarKeys` renames keys.
        forward: how the network is called, see `DepthForward`.
        dirpath: folder for `lines.json`, tables, figures, and `values-*.jsonl`, which keeps every value at once so that
            a run that dies goes on where it was; None writes nothing.
        checkpoint_path: weights of the model: a state dict, or a checkpoint that has one under `state_dict` or `model`.
        seed: of coalitions and draws; 0 leaves that of `estimation`.

    Attributes:
        result: the selection, after every round that told the lines apart.
        evaluations: what was measured last, by stage.

    Raises:
        ValueError: what cannot be meant, before any work.
    """

    # for those who would change the training of any module
    refuses = {
        "pruning": "it asks its network and trains nothing. Prune the network before, in a fit of a "
        "DepthCompletionModule, and hand over what is left, or its checkpoint as checkpoint_path",
        "private training": "it trains nothing; what it says of lines are errors on the calibration frames, without "
        "noise. Train the network privately before, and select by frames that nobody needs to protect",
    }

    def __init__(
        self,
        model: nn.Module,
        k: Sequence[int] = (32, 16, 8, 4),
        num_lines: int = 64,
        *,
        game: LineGameOptions = LineGameOptions(),  # noqa: B008 (frozen)
        estimation: EstimationOptions = EstimationOptions(rounds=4),  # noqa: B008
        spread: Spread = Spread(),  # noqa: B008
        dynamic: Dynamic | None = None,
        baselines: Sequence[Baseline] = BASELINES,
        split_batch: SplitBatch | None = None,
        forward: Forward = "auto",
        dirpath: str | Path | None = None,
        checkpoint_path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.save_hyperparameters(ignore=list(given))
        if "_instantiator" in self.hparams:  # built by LightningCLI, which gives everything as plain data
            self.save_hyperparameters()
        else:
            self.save_hyperparameters(plain_hyperparameters(given))
        game, estimation, spread = (
            built(LineGameOptions, game),
            built(EstimationOptions, estimation),
            built(Spread, spread),
        )
        dynamic = None if dynamic is None else built(Dynamic, dynamic)
        if seed:
            estimation = replace(estimation, seed=seed)
        if checkpoint_path is not None:
            load_weights(model, Path(checkpoint_path))
        self.model = model
        self.anchor = nn.Parameter(torch.zeros(()))  # DistributedDataParallel refuses a module without a parameter
        self.automatic_optimization = False
        self.split_batch = split_batch or LidarKeys()
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.study = LineStudy(
            model,
            Settings(k, num_lines, game, estimation, spread, dynamic, tuple(baselines), forward),
            gathered,
        )
        self.evaluations: dict[str, LineEvaluation] = {}
        self._measurement: Measurement | None = None
        self._modes: list[tuple[nn.Module, bool]] = []
        self._finished = self._loaded = self._other_choice = False
        self._clock = 0.0

    @property
    def result(self) -> LineSelection:
        """The selection as far as it is known; RuntimeError before there is any."""
        study = self.study
        if study.selection is None and study.estimation is not None and study.estimation.records:
            study.note_round()  # a fit that broke off within its first round
        return study.known()

    def select(self, k: int, spread: Spread | None = None, frame: FrameId | None = None) -> list[int]:
        """Lines for any number, without asking the network again.

        Args:
            k: how many.
            spread: by what rule; None by the selector's.
            frame: by the values of this calibration frame alone.

        Raises:
            KeyError: there are no values of that frame.
        """
        result, spread = self.result, spread or self.study.settings.spread
        if frame is None and spread == self.study.settings.spread and k in result.selected:
            return list(result.selected[k])
        values = result.values if frame is None else result.per_frame[frame]
        return choose(values, [k], result.lines, spread)[k].lines

    def mask(self, batch: Any, k: int) -> dict[str, Any]:
        """A batch of which only the selected lines are left; with `dynamic`, those of every frame.

        Args:
            batch: as the loader gives it.
            k: how many lines.

        Returns:
            For `LidarKeys` the batch with new sparse depth and lines, else the inputs of `split_batch`.
        """
        keys = self.split_batch if isinstance(self.split_batch, LidarKeys) else None
        inputs = keys.inputs(batch) if keys is not None else self.split_batch(batch)[0]
        sparse, line_idx = inputs["sparse"], inputs["line_idx"]
        kept = kept_pixels(sparse, line_idx, self._lines_of(inputs, k))
        if self.study.settings.game.unassigned == "always_keep":
            kept |= (line_idx == 255) & (sparse > 0)
        changed = torch.where(kept, sparse, 0.0), torch.where(kept, line_idx, 255)
        if keys is None:
            return {**inputs, "sparse": changed[0], "line_idx": changed[1]}
        return {**batch, keys.sparse: changed[0], keys.line_idx: changed[1]}

    # fit

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One that moves nothing: its steps are what `global_step` counts, without which no ModelCheckpoint saves."""
        return torch.optim.SGD([self.anchor], lr=0.0)

    def setup(self, stage: str) -> None:
        """Refuse a precision of the trainer that depths would not survive, and averages that would change the model."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
            raise ValueError(
                "StochasticWeightAveraging would estimate the statistics of the model's BatchNorm layers anew, and "
                f"{type(self).__name__} trains nothing that could be averaged: leave it out"
            )
        if self.trainer.precision not in ("32-true", "64-true"):
            raise ValueError(
                f"expected a trainer of precision 32-true, got {self.trainer.precision}: the network's precision is "
                'that of LineGameOptions(precision="bf16"), metres must not be rounded'
            )

    def on_fit_start(self) -> None:
        """Begin anew, unless a checkpoint was loaded."""
        if not self._loaded and self.study.estimation is not None:
            self.study = LineStudy(self.model, self.study.settings, gathered)
        self._loaded = self._finished = False
        self._modes = [(module, module.training) for module in self.modules()]
        self.train()  # Lightning warns of modules in evaluation mode, which are no mistake here

    def on_train_start(self) -> None:
        """Settle the candidates in one pass over the calibration frames, unless a checkpoint has."""
        for module, mode in self._modes:
            module.training = mode
        study = self.study
        if study.estimation is None:
            for frame in self._reader("fit").frames():
                study.count(frame)
            study.begin()
        self._keep_values()
        rank_zero_info(f"{type(self).__name__}: {announcement(study)}")
        self._finished = study.complete and not self._other_choice
        if study.complete:
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        """Begin to time the round."""
        self._clock = time.perf_counter()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate the coalitions of this round, and end it with its last batch."""
        rounds = min(self.trainer.current_epoch + 1, self.study.settings.estimation.rounds)
        for frame in self._frames(batch):
            self.study.advance(frame, rounds)
        self.optimizers().step()  # type: ignore[union-attr]
        if self.trainer.is_last_batch:  # before any hook that may write a checkpoint
            self._end_round()

    def _end_round(self) -> None:
        """Put together what all processes know, solve and select."""
        study = self.study
        before = study.rounds[-1].forwards if study.rounds else 0
        study.share()
        last = study.complete or self.trainer.current_epoch + 1 >= (self.trainer.max_epochs or -1) > 0
        try:
            now = study.note_round()
        except ValueError:  # too few coalitions so far
            if last:
                raise
            self._log_to_all({"lidar/max_se": _UNKNOWN})
            return
        self.log("lidar/max_se", min(now.max_se, _UNKNOWN), on_step=True, prog_bar=True, logger=False)
        self._log_to_all(
            {
                "lidar/max_se": min(now.max_se, _UNKNOWN),
                "lidar/rank_stability": 0.0 if now.stability is None else now.stability,
                "lidar/forwards": float(now.forwards),
                "lidar/forwards_per_second": (now.forwards - before) / max(1e-9, time.perf_counter() - self._clock),
            }
        )
        if last:
            self._finish()

    def on_train_end(self) -> None:
        """Finish a fit that something else has ended."""
        if not self._finished:
            self._finish()
        for module, mode in self._modes:
            module.training = mode

    def on_fit_end(self) -> None:
        """Select for other k or by another rule than a finished fit, of which Lightning has no epoch left to run."""
        for module, mode in self._modes:
            module.training = mode
        if self._other_choice and not self._finished:
            self._keep_values()
            self._finish()

    def _finish(self) -> None:
        reader = self._reader("fit")
        result = self.study.finish(reader.frames)
        self._finished, self._other_choice = True, False
        self.trainer.should_stop = True
        values = {f"lidar/phi_line_{line:02d}": float(v) for line, v in zip(result.lines, result.values, strict=True)}
        values |= {"lidar/v_empty": result.error_empty, "lidar/v_full": result.error_full}
        correlation = result.settings["proxy_correlation"]
        if correlation is not None:
            values["lidar/proxy_correlation"] = correlation
        self._log_to_all(values)
        if self.trainer.is_global_zero:
            if self.dirpath is not None:
                result.save(self.dirpath / "lines.json")
                result.write(self.dirpath)
            rank_zero_info(str(result))

    def _log_to_all(self, values: dict[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.trainer.global_step)
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    # validate and test

    def val_dataloader(self) -> Any:
        """Nothing, for a fit without validation data; ValueError for a validation without any."""
        if self._is_fitting:
            return iter(())  # of no length, as Lightning warns of a length of 0
        raise ValueError("expected frames to measure selections on, got none: give trainer.validate a loader")

    def on_validation_epoch_start(self) -> None:
        """Prepare to measure; the validation of a fit measures nothing."""
        if not self._is_fitting:
            self._prepare_to_measure("validate")

    def on_test_epoch_start(self) -> None:
        """Prepare to measure."""
        self._prepare_to_measure("test")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure all selections."""
        if not self._is_fitting:
            self._measure(batch)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure all selections."""
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Log and write the table."""
        if not self._is_fitting:
            self._tell("val")

    def on_test_epoch_end(self) -> None:
        """Log and write the table."""
        self._tell("test")

    @property
    def _is_fitting(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING

    def _prepare_to_measure(self, stage: Literal["validate", "test"]) -> None:
        self.study.selection = self.result
        dynamic = self.study.settings.dynamic
        own = None
        if dynamic is not None:
            own = lines_by_frame(self.study, dynamic, self._reader(stage).frames(), self.select)
        self._measurement = Measurement(self.study, own)

    def _measure(self, batch: Any) -> None:
        assert self._measurement is not None
        for frame in self._frames(batch):
            self._measurement.add(frame)

    def _tell(self, stage: str) -> None:
        assert self._measurement is not None
        found, pixels = self._measurement.evaluation(stage), self._measurement.pixels()
        pixels.check(self.study.settings.game.unassigned)
        if pixels.unassigned:
            found.notes.append(f"{100 * pixels.share_unassigned:.1f} % of the pixels belong to no line.")
        self.evaluations[stage] = found
        self.log_dict({f"{stage}/{name}": value for name, value in found.logged().items()}, sync_dist=True)
        if self.trainer.is_global_zero:
            if self.dirpath is not None:
                found.write(self.dirpath / stage)
                self._draw_lines(self.dirpath / stage)
            rank_zero_info(str(found))

    def _draw_lines(self, directory: Path) -> None:
        """Draw the points of the selected lines over the first image, for every number of lines."""
        from lightning_eff.lidar.figures import points_figure

        if self._measurement is None or self._measurement.first is None:
            return
        for k, lines in self.result.selected.items():
            save_figure(points_figure(self._measurement.first, lines), directory / f"points_k{k}.png")

    # predict

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Dense depth `[B, 1, H, W]` in metres from the lines selected for the first `k`."""
        masked = self.mask(batch, self.study.settings.k[0])
        inputs = self.split_batch.inputs(masked) if isinstance(self.split_batch, LidarKeys) else masked
        return self.study.completion.forward(inputs["rgb"], inputs["sparse"])

    # lines by frame

    def _lines_of(self, inputs: Mapping[str, Any], k: int) -> Sequence[int] | dict[int, list[int]]:
        dynamic = self.study.settings.dynamic
        if dynamic is None:
            return self.select(k)
        if dynamic.source == "predictor":
            return {place: predicted_lines(self.study, rgb, [k])[k] for place, rgb in enumerate(inputs["rgb"])}
        ids = [frame.id for frame in frames_in(inputs, torch.zeros_like(inputs["sparse"]))]
        own = {} if self._measurement is None else self._measurement.own
        unknown = [frame for frame in ids if frame not in own and frame not in self.result.per_frame]
        if unknown:
            raise ValueError(
                f"there are no values of frame {unknown[0]!r}, which dynamic selection by {dynamic.source!r} needs: "
                'to measure them takes ground truth; test the frames first, or take Dynamic("predictor")'
            )
        return {
            place: own[frame][k] if frame in own else self.select(k, frame=frame) for place, frame in enumerate(ids)
        }

    # frames

    def _frames(self, batch: Any) -> list[Frame]:
        return frames_in(*self.split_batch(batch))

    def _keep_values(self) -> None:
        if self.dirpath is not None and self.study.journal is None:
            self.study.keep_values(self.dirpath, self.trainer.global_rank)

    def _reader(self, stage: Literal["fit", "validate", "test"]) -> Reader:
        return Reader(self.trainer, self, stage, self._frames)

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write what was evaluated so far."""
        choice = choice_of(self.study.settings)
        checkpoint[_CHECKPOINT] = {"model": model_hash(self.model), "choice": choice, **self.study.state_dict()}

    @whole_state
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what was evaluated, and select from it anew where `k` or `spread` are others.

        Raises:
            ValueError: it was evaluated with other settings or another model, or the rule needs calibration frames.
        """
        state = checkpoint.get(_CHECKPOINT)
        if state is None:
            return
        resumes = self._trainer is not None and self._is_fitting
        own = model_hash(self.model)
        if resumes and state["model"] != own:
            raise ValueError(
                f"expected the model whose values the checkpoint holds (hash {state['model']}), got another: model "
                f"{own}; load the same weights before resuming"
            )
        if resumes:  # a tuner's trial may have come first, which ends like a fit
            self.study = LineStudy(self.model, self.study.settings, gathered)
            self.trainer.should_stop &= not self._finished
        self.study.load_state_dict(state)
        self._other_choice = choose_again(self.study, state["choice"], fitting=resumes) and resumes
        self._loaded = self.study.estimation is not None
