"""One training run that one process and several can do: the same windows a step, double precision, SGD."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_eff.moe import FineGrainedMoE, MoEScalingModule, replace_ffn, shard_model

#: Auxiliary losses so heavy that a wrong one cannot hide.
AUX = {"method": "aux", "weight": 0.5, "z_weight": 0.1}
EXPERTS = {"expansion_rate": 4, "granularity": 2, "balance": AUX}
BIAS = {"method": "bias", "z_weight": 0.1, "bias_rate": 0.01}
STEPS, EPOCH, WINDOWS, LENGTH, VOCABULARY = 4, 2, 8, 12, 32


def windows() -> TensorDataset:
    tokens = torch.randint(VOCABULARY, (EPOCH * WINDOWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


def module_of(balance: dict[str, Any], experts: str = "gather") -> MoEScalingModule:
    decoder = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "max_seq_len": LENGTH,
        "d_ff": 32,
        "moe": {**EXPERTS, "bias": True, "balance": balance},
    }
    # with momentum: Lightning 2.6 cannot read a whole checkpoint of an optimizer without a state
    return MoEScalingModule(decoder, lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5), experts=experts)


class Somebodys(L.LightningModule):
    """A dense model that knows nothing of experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.ffn = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.ffn(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.training_step(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.5)


class Replacing(Somebodys):
    """The same, with experts of its own making, and shared out."""

    def configure_model(self) -> None:
        if not mixtures(self):
            replace_ffn(self, "ffn", EXPERTS, init="upcycle")
            if self.device_mesh is not None:
                shard_model(self, self.device_mesh["data_parallel"])


class NeverChosen(L.Callback):
    """Keeps tokens off one expert of every layer, and what the weights were."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}
        for layer in mixtures(pl_module):
            layer.balance_bias[3] = -1e9


class SaveHalfWay(L.Callback):
    """Saves a checkpoint after the first epoch."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def mixtures(module: torch.nn.Module) -> list[FineGrainedMoE]:
    return [layer for layer in module.modules() if isinstance(layer, FineGrainedMoE)]


def fit(module: Any, *callbacks: L.Callback, devices: int = 1, ckpt_path: str | Path | None = None, **settings: Any):
    """Train, each process with its part of every step's windows; return the trainer."""
    torch.manual_seed(0)
    defaults = {
        "accelerator": "cpu", "max_steps": STEPS, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
    }  # fmt: skip
    trainer = L.Trainer(devices=devices, callbacks=list(callbacks), **(defaults | settings))
    mine = Subset(windows(), range(int(os.environ.get("LOCAL_RANK", 0)), EPOCH * WINDOWS, devices))
    loader = DataLoader(mine, batch_size=WINDOWS // devices)
    with default_dtype(torch.float64):  # ModelParallelStrategy knows no "64-true"
        trainer.fit(module, loader, loader, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def state(module: Any) -> dict[str, Tensor]:
    """Weights, buffers and what has been counted, whole."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    whole = {name: getattr(t.detach(), "full_tensor", t.detach)().clone() for name, t in tensors.items()}
    if not isinstance(module, MoEScalingModule):
        return whole
    counted = {"tokens": torch.tensor(module.tokens_seen), "smoothed": torch.tensor(module.smoothed_loss())}
    return {**whole, **counted}


def devices() -> int:
    return int(os.environ["DEVICES"])
