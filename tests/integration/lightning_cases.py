"""Every technique of the package in the smallest fit that uses all of it, for tests of Lightning's own features.

A case knows nothing of any feature: :meth:`Case.fit` takes whatever a Trainer takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

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
from lightning_eff.moe import FineGrainedMoE, MoEScalingModule, ReplaceFFN
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
from lightning_eff.surgery import load_pruned
from lightning_eff.surgery.state import quiet_model
from lightning_eff.synthesis import DPNTKGenerator

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class UserModule(pl.LightningModule):
    """Somebody's module, which knows of no technique."""

    def __init__(self, lr: float = 0.05, momentum: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = self.network()

    def network(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, self.hparams["momentum"])


class Convolutional(UserModule):
    """Two convolutions over 6 x 6 images."""

    def network(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )


class FeedForward(UserModule):
    """A feed-forward network inside of a residual, as transformers have them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(36, 8)
            self.ffn = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x.flatten(1))
            out: Tensor = self.head(x + self.ffn(x))
            return out

    def network(self) -> nn.Module:
        return self.Net()


def images(count: int = 32) -> TensorDataset:
    """Images ``[count, 1, 6, 6]`` of three classes that differ in brightness of the upper left."""
    random = torch.Generator().manual_seed(1)
    x, y = torch.randn(count, 1, 6, 6, generator=random), torch.arange(count) % 3
    x[:, :, :3, :3] += y[:, None, None, None] - 1.0
    return TensorDataset(x, y)


def fixed() -> DataLoader[Any]:
    """Batches that stay the same whatever the trainer's are."""
    return DataLoader(images(), batch_size=8)


def frames(count: int = 4) -> list[dict[str, Any]]:
    """Street views of 4 x 8 pixels seen by four lines, one row each."""
    random = torch.Generator().manual_seed(2)
    found = []
    for i in range(count):
        depth = 5 + 10 * torch.rand(1, 4, 8, generator=random)
        seen = torch.rand(1, 4, 8, generator=random) < 0.6
        line_idx = torch.arange(4, dtype=torch.uint8).view(1, 4, 1).expand(1, 4, 8)
        found.append(
            {
                "rgb": torch.rand(3, 4, 8, generator=random),
                "sparse": depth * seen,
                "gt": depth,
                "line_idx": torch.where(seen, line_idx, 255).to(torch.uint8),
                "sample_id": f"frame {i}",
            }
        )
    return found


class Filling(nn.Module):
    """The smallest network that completes depth."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, rgb: Tensor, sparse: Tensor) -> Tensor:
        out: Tensor = sparse.amax((1, 2, 3), keepdim=True) / 2 + self.conv(torch.cat([rgb, sparse], 1))
        return out


def scenes(count: int = 8) -> TensorDataset:
    """Scenes of 32 x 32 pixels of ten classes."""
    random = torch.Generator().manual_seed(3)
    return TensorDataset(torch.rand(count, 1, 32, 32, generator=random), torch.arange(count) % 10)


def windows(count: int = 8) -> TensorDataset:
    """Windows of eight tokens of eleven, and the tokens after them."""
    tokens = torch.randint(11, (count, 9), generator=torch.Generator().manual_seed(4))
    return TensorDataset(tokens[:, :-1].clone(), tokens[:, 1:].clone())


@dataclass
class Case:
    """A technique in a fit.

    Args:
        module: Makes the module, the same weights every time.
        data: A data set.
        batch_size: Of its loader.
        callbacks: Makes those of the technique.
        strategy: Makes that of the technique.
        epochs: After which the technique has done all it does.
        monitor: What validation logs, smaller is better.
        load: ``path -> module`` out of a checkpoint.
        answer: ``(module, inputs) -> tensor``, deterministic.
        validates: Whether the fit is given validation data.
        done: ``(module, trainer) -> whether the technique has done its work``.
    """

    module: Callable[[], pl.LightningModule]
    data: Callable[[], Any]
    load: Callable[..., pl.LightningModule]
    answer: Callable[[Any, Any], Tensor]
    batch_size: int = 8
    callbacks: Callable[[], list[pl.Callback]] = list
    strategy: Callable[[], Any] = lambda: "auto"
    epochs: int = 2
    monitor: str = "val/loss"
    validates: bool = True
    done: Callable[[Any, pl.Trainer], bool] = lambda module, trainer: True

    def loader(self, **options: Any) -> DataLoader[Any]:
        return DataLoader(self.data(), **{"batch_size": self.batch_size, **options})

    def trainer(self, *callbacks: pl.Callback, first: bool = False, **options: Any) -> pl.Trainer:
        """One that has the technique in it; others' callbacks stand before its own if ``first``."""
        own = self.callbacks()
        every = [*callbacks, *own] if first else [*own, *callbacks]
        given = {"max_epochs": self.epochs, "strategy": self.strategy(), **QUIET, **options}
        return pl.Trainer(callbacks=every, **given)

    def fit(
        self, *callbacks: pl.Callback, module: Any = None, loader: Any = None, first: bool = False, **options: Any
    ) -> tuple[Any, pl.Trainer]:
        """Train, and return module and trainer."""
        module = self.module() if module is None else module
        ckpt_path = options.pop("ckpt_path", None)
        running = self.trainer(*callbacks, first=first, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            loader = self.loader() if loader is None else loader
            running.fit(
                module, loader, self.loader() if self.validates else None, ckpt_path=ckpt_path, weights_only=True
            )
        return module, running

    def batch(self) -> Any:
        return next(iter(self.loader()))


def _logits(module: Any, batch: Any) -> Tensor:
    with quiet_model(module), torch.no_grad():
        out: Tensor = module(batch[0])
    return out


def _every_exit(module: Any, batch: Any) -> Tensor:
    with quiet_model(module), torch.no_grad():
        return torch.stack(list(module.network(batch[0])))


def _completed(module: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = module(batch["rgb"], batch["sparse"])
    return out


def _with_experts() -> FeedForward:
    from lightning_eff.moe import replace_ffn

    module = FeedForward()
    replace_ffn(module, "net.ffn", EXPERTS)
    return module


def _load_experts(path: Any) -> FeedForward:
    module = _with_experts()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return module


def _glimpse() -> AdaGlimpseModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AdaGlimpseModule(
            CanvasBackbone(num_classes=10, widths=(4, 4, 8, 8)),
            ClassificationTask(10),
            GlimpseConfig(image_size=32, num_glimpses=2, patch_size=4),
            AgentConfig(
                hidden=16,
                heads=4,
                state_parts=("patch", "box"),
                ent_coef="auto_0.1",
                replay=ReplayOptions(buffer_size=64, batch_size=8, random_steps=2),
            ),
            TrainingPlan(pretrain_epochs=1, rl_only_epochs=0, alternate_unit="batch"),
            backbone_optimizer=partial(torch.optim.AdamW, lr=1e-2),
            baselines=(),
        )


def _load_glimpse(path: Any) -> AdaGlimpseModule:
    fresh = _glimpse()
    return AdaGlimpseModule.load_from_checkpoint(
        path,
        weights_only=True,
        backbone=fresh.backbone,
        task=fresh.task,
        backbone_optimizer=fresh.backbone_optimizer,
    )


def _exits() -> EarlyExitModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EarlyExitModule(
            Convolutional().net,
            exits=["1"],
            num_classes=3,
            regime="mixed",
            example_input=torch.zeros(2, 1, 6, 6),
            optimizer=partial(torch.optim.SGD, lr=0.05),
        )


def _load_exits(path: Any) -> EarlyExitModule:
    return EarlyExitModule.load_from_checkpoint(path, weights_only=True, backbone=Convolutional().net)


def _language_model() -> MoEScalingModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = {"vocab_size": 11, "d_model": 8, "n_layers": 1, "n_heads": 2, "max_seq_len": 8}
        module = MoEScalingModule(
            {**decoder, "moe": {"expansion_rate": 2, "granularity": 2}}, partial(torch.optim.SGD, lr=0.05)
        )
        module.configure_model()
        return module


def _generator() -> DPNTKGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DPNTKGenerator(
            math.inf,  # noise of a release comes from no seed, and runs are compared
            1e-3,
            num_classes=3,
            input_shape=(36,),
            feature_widths=(8,),
            latent_dim=3,
            samples_per_class=4,
            steps_per_epoch=4,
        )


def vectors() -> TensorDataset:
    x, y = images(120).tensors
    return TensorDataset(torch.sigmoid(x.flatten(1)), y)


def _private(**options: Any) -> DPGradientDropStrategy:
    chosen = PrivateTrainingOptions(noise_seed=7, isolation_check="off", accountant="rdp")
    return DPGradientDropStrategy(noise_multiplier=0.5, drop_rate=0.5, options=chosen, **options)


def _selector() -> LidarSaSSelector:
    return LidarSaSSelector(
        Filling(),
        [2],
        4,
        estimation=EstimationOptions(budget=20, rounds=2),
        game=LineGameOptions(metric="mae"),
        baselines=("uniform",),
    )


def _cut(module: Any, trainer: pl.Trainer) -> bool:
    """Whether channels are gone and the module computes with what is left."""
    widths = module.net[0].out_channels, module.net[2].out_channels
    return widths < (8, 4) and module.net[2].in_channels == widths[0] and module.net[5].in_features == 16 * widths[1]


def _selected(module: Any, trainer: pl.Trainer) -> bool:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(one, LidarSaSCallback) and one.result is not None for one in callbacks)


def _accounted(module: Any, trainer: pl.Trainer) -> bool:
    """Whether every optimizer step is in the ledger."""
    strategy = trainer.strategy
    return isinstance(strategy, DPGradientDropStrategy) and strategy.ledger.steps == trainer.global_step > 0


NOISE = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "noise_seed makes noise and sampling repeatable",
        "the loss .* is that of guessing among",
        ".*the switches of all channels are equal",
        "fewer calibration rows than weights",
        "found . different configurations near the budget",
        ".*players have fewer than two samples",
        "without any line the error is",
        "the coalitions drawn do not tell all players apart",
        "class .* the signal of the release is below its noise",
        "no signal",
        "NOT PRIVATE",
        ".*fit.ckpt_path=None.. was called without a model",
        ".*fit.ckpt_path=.last.. is set, but there is no last checkpoint",
        "ModelCheckpoint monitors 'val/loss' over phases",
        "the checkpoint is of phase 1 of 2",
        "optimizer. not plain data, so not in the checkpoint",
        "You're using the WeightAveraging callback with a model that overrides the configure_model",
    )
]
"""Marks of a file of tests: what techniques say of runs as small as these."""
PRUNING_CASES = ["ShapleyPruningCallback", "DirichletPruneCallback", "RandomChannelPruningCallback"]
PRIVATE_CASES = ["DPGradientDropStrategy", "DPPrePruneCallback"]
EXPERTS = {"expansion_rate": 2, "granularity": 2}
PRUNING: dict[str, Any] = {
    "schedule": Schedule(start=1),
    "calibration": Calibration(samples=16),
    "verbose": False,
}

CASES: dict[str, Case] = {
    "ShapleyPruningCallback": Case(
        Convolutional,
        images,
        partial(load_pruned, Convolutional),
        _logits,
        done=_cut,
        callbacks=lambda: [ShapleyPruningCallback(0.5, estimator=PermutationShapley(walks=2), **PRUNING)],
    ),
    "DirichletPruneCallback": Case(
        Convolutional,
        images,
        partial(load_pruned, Convolutional),
        _logits,
        done=_cut,
        callbacks=lambda: [DirichletPruneCallback(0.5, **{**PRUNING, "calibration": Calibration(loader=fixed())})],
    ),
    "RandomChannelPruningCallback": Case(
        Convolutional,
        images,
        partial(load_pruned, Convolutional),
        _logits,
        done=_cut,
        callbacks=lambda: [
            RandomChannelPruningCallback(
                0.5, search=Search(candidates=3, top_k=1, score_batches=1),
                repair=Repair(samples=16, bn_samples=16, positions=4), **PRUNING,
            )
        ],
    ),
    "EarlyExitModule": Case(
        _exits, images, _load_exits, _every_exit,
        done=lambda m, t: m.phase.train == "all",
    ),
    "DPGradientDropStrategy": Case(
        Convolutional, images, partial(Convolutional.load_from_checkpoint, weights_only=True), _logits,
        strategy=_private, done=_accounted,
    ),
    "DPPrePruneCallback": Case(
        Convolutional, images, partial(Convolutional.load_from_checkpoint, weights_only=True), _logits,
        callbacks=lambda: [DPPrePruneCallback(0.5)], strategy=_private,
        done=lambda m, t: _accounted(m, t) and sum(int((p == 0).sum()) for p in m.parameters()) >= 276,
    ),
    "DPNTKGenerator": Case(
        _generator, vectors, partial(DPNTKGenerator.load_from_checkpoint, weights_only=True),
        lambda m, b: m.generate(8, seed=0).x, monitor="train/mmd2", validates=False,
        done=lambda m, t: m.steps_trained == t.fit_loop.epoch_loop.total_batch_idx + 1,
    ),
    "MoEScalingModule": Case(
        _language_model, windows,
        partial(MoEScalingModule.load_from_checkpoint, weights_only=True), _logits, batch_size=2,
        done=lambda m, t: m.tokens_seen > 0,
    ),
    "ReplaceFFN": Case(
        FeedForward, images, _load_experts, _logits, callbacks=lambda: [ReplaceFFN("net.ffn", EXPERTS)],
        done=lambda m, t: isinstance(m.net.ffn, FineGrainedMoE),
    ),
    "AdaGlimpseModule": Case(
        _glimpse, scenes, _load_glimpse, _logits, batch_size=4, monitor="val/avg_glimpses",
        done=lambda m, t: m.counts.env_steps > 0,
    ),
    "LidarSaSSelector": Case(
        _selector, frames, lambda path: LidarSaSSelector.load_from_checkpoint(path, weights_only=True, model=Filling()),
        lambda m, b: m.result.values, batch_size=2, monitor="lidar/max_se", validates=False,
    ),
    "LidarSaSCallback": Case(
        lambda: DepthCompletionModule(Filling(), lr=1e-2), frames,
        lambda path: DepthCompletionModule.load_from_checkpoint(path, weights_only=True, net=Filling()),
        _completed, batch_size=2, done=_selected,
        callbacks=lambda: [LidarSaSCallback([2], 4, estimation=EstimationOptions(budget=20),
                                            game=LineGameOptions(metric="mae"), baselines=("uniform",))],
    ),
}  # fmt: skip
