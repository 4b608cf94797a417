"""What a run takes up from a file of values or a checkpoint is of the same network, metric and frames, or is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from adding import LINES, Adding, loader, sample, trainer
from line_frames import toy_frame
from torch import Tensor, nn

from lightning_eff.lidar.completion.hole_filling import PullPushCompletion
from lightning_eff.lidar.dynamic import values_of
from lightning_eff.lidar.frames import Frame
from lightning_eff.lidar.game import Completion
from lightning_eff.lidar.journal import ValueJournal
from lightning_eff.lidar.lines import LidarWarning
from lightning_eff.lidar.selector import LidarSaSSelector
from lightning_eff.lidar.settings import LineGameOptions, Settings
from lightning_eff.lidar.study import LineStudy
from lightning_eff.lidar.values import EstimationOptions

TWO_ROUNDS = EstimationOptions(budget=40, rounds=2)


class Scaled(Adding):
    """Has an attribute that no state dict tells."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
        return self.scale * super().forward(rgb, sparse)


def metric(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda depth, truth: scale * (depth - truth).abs().mean(1)


def fitted(model: nn.Module, folder: Path | None = None, **options: Any) -> LidarSaSSelector:
    made = LidarSaSSelector(model, [3, 2], num_lines=LINES, estimation=TWO_ROUNDS, dirpath=folder, **options)
    trainer().fit(made, loader())
    return made


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda **to: fitted(Scaled(), **to), lambda **to: fitted(Scaled(1.1), **to)),
        (
            lambda **to: fitted(Adding(), **to, forward=lambda model, rgb, sparse: model(rgb, sparse)),
            lambda **to: fitted(Adding(), **to, forward=lambda model, rgb, sparse: 1.1 * model(rgb, sparse)),
        ),
        (
            lambda **to: fitted(Adding(), **to, game=LineGameOptions(metric=metric(1))),
            lambda **to: fitted(Adding(), **to, game=LineGameOptions(metric=metric(7))),
        ),
    ],
    ids=["attribute", "forward", "metric"],
)
def test_values_of_another_call_or_metric_are_put_aside_with_a_warning(
    first: Callable[..., LidarSaSSelector], second: Callable[..., LidarSaSSelector], tmp_path: Path
) -> None:
    first(folder=tmp_path)
    (path,) = tmp_path.glob("values-*.jsonl")
    told, lines = rf"{path.name} holds errors of another network call or metric \(the error of frame", path.read_text()
    with pytest.warns(LidarWarning, match=told):
        made = second(folder=tmp_path)
    truth = second(folder=None)
    assert torch.equal(made.result.values, truth.result.values)
    assert (made.result.error_empty, made.result.error_full) == (truth.result.error_empty, truth.result.error_full)
    assert (tmp_path / f"outdated-{path.name}").read_text() == lines
    again = second(folder=tmp_path)  # the new file is whole, and no warning comes
    assert torch.equal(again.result.values, truth.result.values)
    assert len(path.read_text().splitlines()) == 1 + 4 * 40


def test_a_middle_coalition_is_asked_too(tmp_path: Path) -> None:
    class Bent(PullPushCompletion):
        """Differs from its parent between no line and all lines only."""

        def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
            shown = (sparse > 0).sum((1, 2, 3), keepdim=True)
            between = (shown > 0) & (shown < 8 * 12)
            return super().forward(rgb, sparse) + 5 * between

    frame, kept = toy_frame("a"), torch.eye(8, dtype=torch.bool)
    kept = torch.cat([kept, torch.zeros(1, 8, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)])

    def errors(model: nn.Module) -> Tensor:
        journal = ValueJournal(tmp_path / "values.jsonl", {"format": 1})
        return journal.game(frame, range(3, 11), Completion(model)).errors(kept)

    first = errors(PullPushCompletion())
    with pytest.warns(LidarWarning, match="frame 'a' with 1 of 8 lines"):
        second = errors(Bent())
    assert bool((first != second)[:8].all())
    assert torch.equal(errors(Bent()), second)


def test_a_frame_without_lines_is_proved_by_its_only_coalition(tmp_path: Path) -> None:
    frame = toy_frame("a", missing=tuple(range(8)))

    def error(empty_depth: float) -> float:
        journal = ValueJournal(tmp_path / "values.jsonl", {"format": 1})
        return journal.game(frame, range(3, 11), Completion(PullPushCompletion(empty_depth=empty_depth))).empty_error

    first = error(15.0)
    assert error(15.0) == first
    with pytest.warns(LidarWarning, match="with 0 of 0 lines"):
        assert error(60.0) != first


# checkpoints


class Stop(pl.Callback):
    """Ends a fit after its first round."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = True


def stopped(path: Path) -> Path:
    """The checkpoint of a fit after one of two rounds."""
    run = trainer(Stop())
    run.fit(LidarSaSSelector(Scaled(), [3, 2], num_lines=LINES, estimation=TWO_ROUNDS), loader())
    run.save_checkpoint(path / "one.ckpt")
    return path / "one.ckpt"


def go_on(path: Path, model: nn.Module, data: Any) -> LidarSaSSelector:
    made = LidarSaSSelector(model, [3, 2], num_lines=LINES, estimation=TWO_ROUNDS)
    trainer().fit(made, data, ckpt_path=path, weights_only=True)
    return made


def test_the_same_frames_and_network_are_gone_on_with(tmp_path: Path) -> None:
    made, whole = go_on(stopped(tmp_path), Scaled(), loader()), fitted(Scaled())
    assert torch.equal(made.result.values, whole.result.values)
    assert made.result.forwards == whole.result.forwards


@pytest.mark.parametrize("shown", ["rgb", "gt", "sparse"])
def test_other_frames_with_the_same_ids_are_not_gone_on_with(shown: str, tmp_path: Path) -> None:
    others = [sample(i) for i in range(4)]
    others[2][shown] = 1.5 * others[2][shown] + (shown == "rgb")
    with pytest.raises(ValueError, match=r"'frame 2' shows something else than when it was evaluated.*begin anew"):
        go_on(stopped(tmp_path), Scaled(), loader(others))


def test_a_network_that_answers_otherwise_is_not_gone_on_with(tmp_path: Path) -> None:
    told = r"the network answers otherwise than when this run began \(error_full of frame 'frame \d': .* begin anew"
    with pytest.raises(ValueError, match=told):
        go_on(stopped(tmp_path), Scaled(1.1), loader())


# one frame by itself


def test_one_more_frame_has_values_where_all_others_were_pooled() -> None:
    frames = [toy_frame(name, 12) for name in "abcd"]
    study = LineStudy(PullPushCompletion(), Settings([3], 15, estimation=EstimationOptions(budget=20)))
    for frame in frames:
        study.count(frame)
    study.begin()
    assert study.estimation is not None
    assert study.estimation.pooled
    values = values_of(study, frames[0])
    assert values is not None
    assert float(values.sum()) == pytest.approx(drop(study, frames[0]), rel=1e-9)


def drop(study: LineStudy, frame: Frame) -> float:
    game = study.frame_game(frame)
    return game.empty_error - game.full_error
