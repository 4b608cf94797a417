"""Every technique in a run of seconds that keeps checkpoints and files, for tests that break it off and read them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.data.loading import ResumableLoader, TrainerEpochSampler
from lightning_eff.early_exit import EarlyExitModule
from lightning_eff.glimpse import (
    AdaGlimpseModule,
    AgentConfig,
    CanvasBackbone,
    ClassificationTask,
    GlimpseConfig,
    ReplayOptions,
    TrainingPlan,
)
from lightning_eff.lidar import (
    DepthCompletionModule,
    EstimationOptions,
    LidarSaSCallback,
    LidarSaSSelector,
    LineGameOptions,
)
from lightning_eff.moe import MoEScalingModule, RunRecorder
from lightning_eff.privacy import DPGradientDropStrategy, DPPrePruneCallback, PrivateTrainingOptions
from lightning_eff.pruning import (
    Calibration,
    DirichletPruneCallback,
    RandomChannelPruningCallback,
    Repair,
    Schedule,
    Search,
    ShapleyPruningCallback,
)
from lightning_eff.shapley import PermutationShapley
from lightning_eff.synthesis import DPNTKGenerator, ReleaseOptions, SynthesisFigures


class Convolutional(pl.LightningModule):
    """Somebody's module: two convolutions over 6 x 6 images, three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, 0.9)


class Filling(nn.Module):
    """The smallest network that completes depth."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
        out: Tensor = sparse.amax((1, 2, 3), keepdim=True) / 2 + self.conv(torch.cat([rgb, sparse], 1))
        return out


def images() -> TensorDataset:
    """Images that differ in the brightness of a corner."""
    random = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 1, 6, 6, generator=random), torch.arange(32) % 3
    x[:, :, :3, :3] += y[:, None, None, None] - 1.0
    return TensorDataset(x, y)


def vectors() -> TensorDataset:
    """The same as vectors in [0, 1]."""
    x, y = images().tensors
    return TensorDataset(torch.sigmoid(x.flatten(1)), y)


def scenes() -> TensorDataset:
    """Images of 32 x 32 pixels."""
    return TensorDataset(torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(3)), torch.arange(8))


def windows() -> TensorDataset:
    """Windows of eight tokens, and the tokens after them."""
    tokens = torch.randint(11, (8, 9), generator=torch.Generator().manual_seed(4))
    return TensorDataset(tokens[:, :-1].clone(), tokens[:, 1:].clone())


def frames() -> list[dict[str, Any]]:
    """Street views of 4 x 8 pixels, one lidar line a row."""
    random = torch.Generator().manual_seed(2)
    found = []
    for i in range(4):
        depth, seen = 5 + 10 * torch.rand(1, 4, 8, generator=random), torch.rand(1, 4, 8, generator=random) < 0.6
        lines = torch.where(seen, torch.arange(4, dtype=torch.uint8).view(1, 4, 1), 255).to(torch.uint8)
        sample = {"rgb": torch.rand(3, 4, 8, generator=random), "sparse": depth * seen, "gt": depth}
        found.append({**sample, "line_idx": lines, "sample_id": f"frame {i}"})
    return found


PRUNING: dict[str, Any] = {"schedule": Schedule(start=1), "calibration": Calibration(samples=16), "verbose": False}


def _shapley(folder: Path) -> Any:
    return ShapleyPruningCallback(0.5, estimator=PermutationShapley(walks=2), dirpath=folder / "pruning", **PRUNING)


def _dirichlet(folder: Path) -> Any:
    return DirichletPruneCallback(0.5, dirpath=folder / "pruning", **PRUNING)


def _random(folder: Path) -> Any:
    repair, search = Repair(samples=16, bn_samples=16, positions=4), Search(candidates=4, top_k=1, score_batches=1)
    return RandomChannelPruningCallback(0.5, search=search, repair=repair, dirpath=folder / "pruning", **PRUNING)


def _exits(regime: Any) -> EarlyExitModule:
    example, optimizer = torch.zeros(2, 1, 6, 6), partial(torch.optim.SGD, lr=0.05)
    return EarlyExitModule(
        Convolutional().net, ["1"], num_classes=3, regime=regime, example_input=example, optimizer=optimizer
    )


def _private(folder: Path) -> Any:
    options = PrivateTrainingOptions(noise_seed=7, isolation_check="off", accountant="rdp", dirpath=folder / "privacy")
    return DPGradientDropStrategy(noise_multiplier=0.5, drop_rate=0.5, options=options)


def _generator() -> DPNTKGenerator:
    return DPNTKGenerator(
        50.0, 1e-3, num_classes=3, input_shape=(36,), feature_widths=(8,), latent_dim=3, samples_per_class=4,
        steps_per_epoch=4, release_options=ReleaseOptions(noise_seed=7),
    )  # fmt: skip


def _experts() -> MoEScalingModule:
    decoder = {"vocab_size": 11, "d_model": 8, "n_layers": 1, "n_heads": 2, "max_seq_len": 8}
    moe = {"expansion_rate": 2, "granularity": 2}
    return MoEScalingModule({**decoder, "moe": moe}, partial(torch.optim.SGD, lr=0.05))


def _glimpse() -> AdaGlimpseModule:
    replay = ReplayOptions(buffer_size=64, batch_size=8, random_steps=2)
    agent = AgentConfig(hidden=16, heads=4, state_parts=("patch", "box"), ent_coef="auto_0.1", replay=replay)
    return AdaGlimpseModule(
        CanvasBackbone(num_classes=10, widths=(4, 4, 8, 8)),
        ClassificationTask(10),
        GlimpseConfig(image_size=32, num_glimpses=2, patch_size=4),
        agent,
        TrainingPlan(pretrain_epochs=1, rl_only_epochs=0, alternate_unit="batch"),
        backbone_optimizer=partial(torch.optim.AdamW, lr=1e-2),
        baselines=(),
    )


LINES: dict[str, Any] = {"game": LineGameOptions(metric="mae"), "baselines": ("uniform",)}


def _selector(folder: Path) -> LidarSaSSelector:
    estimation = EstimationOptions(budget=20, rounds=3)
    return LidarSaSSelector(Filling(), [2], 4, estimation=estimation, dirpath=folder / "lines", **LINES)


def _lines(folder: Path) -> Any:
    calibration = DataLoader(frames(), batch_size=2)
    estimation = EstimationOptions(budget=20)
    return LidarSaSCallback([2], 4, calibration=calibration, estimation=estimation, dirpath=folder / "lines", **LINES)


class EpochCount(Callback):
    """Counts the epoch that Lightning 2.6 forgets to count when it goes on from the last batch of the one before.

    Checkpoints written from there on make Lightning begin their epoch anew, whatever is trained.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        epochs = trainer.fit_loop.epoch_progress
        if epochs.total.ready == epochs.total.processed:
            epochs.increment_ready()
            epochs.increment_started()


class Run:
    """A technique in a fit.

    Args:
        module: ``folder -> module``.
        data: A data set.
        callbacks: ``folder -> callbacks``, those of the technique.
        options: ``folder -> options`` of the Trainer.
        batch_size: Of the loader.
        epochs: Of the fit.
    """

    def __init__(
        self,
        module: Callable[[Path], pl.LightningModule],
        data: Callable[[], Any],
        callbacks: Callable[[Path], list[Any]] = lambda folder: [],
        options: Callable[[Path], dict[str, Any]] = lambda folder: {},
        batch_size: int = 8,
        epochs: int = 3,
    ) -> None:
        self.module, self.data, self.callbacks, self.options = module, data, callbacks, options
        self.batch_size, self.epochs = batch_size, epochs

    def fit(self, folder: Path, *more: Any) -> tuple[Any, pl.Trainer]:
        """Train in ``folder``, from its last checkpoint if there is one, with a checkpoint after every step."""
        last = folder / "checkpoints" / "last.ckpt"
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.module(folder)
            torch.manual_seed(5)
            saving = ModelCheckpoint(
                last.parent, every_n_train_steps=1, save_last=True, save_top_k=1, enable_version_counter=False
            )
            trainer = pl.Trainer(
                accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
                max_epochs=self.epochs, callbacks=[EpochCount(), *self.callbacks(folder), saving, *more],
                default_root_dir=folder, **self.options(folder),
            )  # fmt: skip
            data = self.data()
            loader = ResumableLoader(data, self.batch_size, sampler=TrainerEpochSampler(data, trainer, 0))
            trainer.fit(module, loader, ckpt_path=last if last.exists() else None, weights_only=True)
        return module, trainer


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: runs as small as these find little."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


RUNS: dict[str, Run] = {
    "ShapleyPruningCallback": Run(lambda folder: Convolutional(), images, lambda folder: [_shapley(folder)]),
    "DirichletPruneCallback": Run(lambda folder: Convolutional(), images, lambda folder: [_dirichlet(folder)]),
    "RandomChannelPruningCallback": Run(lambda folder: Convolutional(), images, lambda folder: [_random(folder)]),
    "EarlyExitModule mixed": Run(lambda folder: _exits("mixed"), images),
    "EarlyExitModule joint": Run(lambda folder: _exits("joint"), images),
    "EarlyExitModule disjoint": Run(lambda folder: _exits("disjoint"), images),
    "DPGradientDropStrategy": Run(
        lambda folder: Convolutional(), images, options=lambda folder: {"strategy": _private(folder)}
    ),
    "DPPrePruneCallback": Run(
        lambda folder: Convolutional(),
        images,
        lambda folder: [DPPrePruneCallback(0.5)],
        lambda folder: {"strategy": _private(folder)},
    ),
    "DPNTKGenerator": Run(
        lambda folder: _generator(), vectors, lambda folder: [SynthesisFigures(folder / "made")], batch_size=32
    ),
    "MoEScalingModule": Run(
        lambda folder: _experts(), windows, lambda folder: [RunRecorder(folder / "runs.csv", "run")], batch_size=2
    ),
    "AdaGlimpseModule": Run(lambda folder: _glimpse(), scenes, batch_size=4),
    "LidarSaSSelector": Run(_selector, frames, batch_size=2),
    "LidarSaSCallback": Run(
        lambda folder: DepthCompletionModule(Filling(), lr=1e-2), frames, lambda folder: [_lines(folder)], batch_size=2
    ),
}


if __name__ == "__main__":
    _, where, which = sys.argv
    RUNS[which].fit(Path(where))
    print("done", flush=True)
