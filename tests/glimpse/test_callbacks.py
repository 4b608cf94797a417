"""What a run writes about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError, MetricCollection

from lightning_eff.glimpse.backbones.canvas import CanvasBackbone
from lightning_eff.glimpse.callbacks import GlimpseReport
from lightning_eff.glimpse.config import AgentConfig, GlimpseConfig, ReplayOptions, TrainingPlan
from lightning_eff.glimpse.module import AdaGlimpseModule
from lightning_eff.glimpse.report import ExplorationReport
from lightning_eff.glimpse.tasks.base import Task
from lightning_eff.glimpse.tasks.classification import ClassificationTask
from lightning_eff.models import ImageClassifier, SmallCNN


def module(stop: float | None = None) -> AdaGlimpseModule:
    torch.manual_seed(0)
    return AdaGlimpseModule(
        CanvasBackbone(1, num_classes=3, widths=(2, 2, 4, 4)),
        ClassificationTask(3),
        GlimpseConfig(image_size=16, num_glimpses=2, patch_size=4, stop_threshold=stop),
        AgentConfig(hidden=8, heads=2, state_parts=("box",), replay=ReplayOptions(batch_size=8, random_steps=1)),
        TrainingPlan(pretrain_epochs=1, rl_only_epochs=1),
    )


def data() -> DataLoader[tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 16, 16, generator=draw)
    return DataLoader(TensorDataset(images, torch.arange(12) % 3), batch_size=4)


def trainer(report: GlimpseReport, tmp_path: Path, **options: object) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        callbacks=[report],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,  # type: ignore[arg-type]
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_leaves_pictures_of_its_validation_and_is_not_changed_by_them(tmp_path: Path) -> None:
    weights = []
    for callback in (GlimpseReport(every_n_epochs=2, shown=5), GlimpseReport(every_n_epochs=None)):
        trained = module()
        trainer(callback, tmp_path, max_epochs=3).fit(trained, data(), data())
        weights.append(torch.cat([one.flatten() for one in trained.state_dict().values()]))
    assert names(tmp_path / "glimpse") == {"exploration-000.png", "exploration-002.png"}
    assert torch.equal(*weights)


def test_pictures_are_counted_in_epochs_that_are_validated(tmp_path: Path) -> None:
    report = GlimpseReport(every_n_epochs=2)
    trainer(report, tmp_path, max_epochs=6, check_val_every_n_epoch=2).fit(module(), data(), data())
    assert names(tmp_path / "glimpse") == {"exploration-001.png", "exploration-005.png"}


def test_a_test_leaves_table_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, tested = GlimpseReport(tmp_path / "test", shown=3, explored=6), module()
    trainer(report, tmp_path).test(tested, data(), verbose=False)
    assert names(tmp_path / "test") == {
        *(f"policies.{suffix}" for suffix in ("md", "csv", "json")),
        *(f"{name}.png" for name in ("curves", "exploration", "steps", "coverage", "scales")),
        "exploration.gif",
    }
    assert {path.name for path in report.written} == names(tmp_path / "test")
    (learned, random) = json.loads((tmp_path / "test" / "policies.json").read_text())
    assert (learned["policy"], random["policy"]) == ("learned", "random")
    assert learned["accuracy@2"] == tested.results["test"]["policy"]["accuracy"]
    assert learned["pixel %"] == 50
    assert "higher is better" in capsys.readouterr().out


def test_where_images_stop_there_is_no_curve_by_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(GlimpseReport(shown=1, verbose=False), tmp_path).test(module(stop=0.3), data(), verbose=False)
    assert "curves.png" not in names(tmp_path / "glimpse")
    assert "policies.md" in names(tmp_path / "glimpse")
    assert capsys.readouterr().out == ""


def test_a_prediction_leaves_every_trajectory(tmp_path: Path) -> None:
    trainer(GlimpseReport(), tmp_path).predict(module(), data())
    lines = (tmp_path / "glimpse" / "trajectories.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(12))


def test_what_it_cannot_tell_of_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_epochs must be a whole number >= 1, got 0"):
        GlimpseReport(every_n_epochs=0)
    with pytest.raises(ValueError, match="explored must be a whole number >= 6, got 2"):
        GlimpseReport(explored=2)
    with pytest.raises(ValueError, match="got a ImageClassifier"):
        trainer(GlimpseReport(), tmp_path).test(ImageClassifier(SmallCNN(width=1)), data())
    with pytest.raises(ValueError, match="no results of 'test'"):
        ExplorationReport(module())


class Brightness(Task):
    """A task of one's own, whose targets are numbers."""

    higher_is_better = False

    def loss(self, prediction: Tensor, images: Tensor, target: Any, teacher: Tensor | None = None) -> Tensor:
        return -self.score(prediction, images, target).mean()

    def score(self, prediction: Tensor, images: Tensor, target: Any, teacher: Tensor | None = None) -> Tensor:
        return -(prediction - target).square().mean(1)

    def metrics(self) -> MetricCollection:
        return MetricCollection({"mse": MeanSquaredError()})

    def metric_inputs(self, prediction: Tensor, images: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        return prediction, target


def test_a_task_with_numbers_for_targets_is_drawn_too(tmp_path: Path) -> None:
    images = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1)), 3)
    like = module()
    tested = AdaGlimpseModule(
        CanvasBackbone(1, num_classes=2, widths=(2, 2, 4, 4)), Brightness(), like.glimpse, like.agent, like.plan
    )
    run = trainer(GlimpseReport(shown=2), tmp_path, max_epochs=2)
    run.fit(tested, loader, loader)
    run.test(tested, loader, verbose=False)
    assert {"exploration-001.png", "exploration.png", "steps.png", "exploration.gif"} <= names(tmp_path / "glimpse")
