"""Candidates of a search from scratch: narrow networks with fresh weights, and their training for a while each."""

from __future__ import annotations

import copy
import itertools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from lightning_eff.pruning.random_channel.candidates import Candidate
from lightning_eff.pruning.random_channel.journal import Journal
from lightning_eff.pruning.random_channel.sampling import config_of
from lightning_eff.surgery import ChannelGraph, PruningPlan, apply_plan, prunable
from lightning_eff.surgery.graph import axis_masks

_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class CandidateNetworks:
    """Narrow networks with fresh weights: a number gives the same one each time.

    Attributes:
        make_model: builds the whole network.
        graph: its channel graph.
        configs: channel counts ``[n, G]``.
        submodule: the part of the module that is narrower.
        initialise: gives fresh weights; None resets the layers that are narrower.
        seed: of the weights.
    """

    make_model: Callable[[], LightningModule]
    graph: ChannelGraph
    configs: Tensor
    submodule: str
    initialise: Callable[[LightningModule], object] | None
    seed: int

    def plan(self, number: int) -> PruningPlan:
        """Keep the first channels: their weights are drawn anew."""
        config = config_of(self.graph, self.configs[number])
        return PruningPlan({name: range(kept) for name, kept in config.items()}, self.graph.sizes)

    def build(self, number: int) -> LightningModule:
        """Make one."""
        seed_everything(self.seed)
        model = self.make_model()
        part, plan = model.get_submodule(self.submodule), self.plan(number)
        apply_plan(part, plan, None, graph=self.graph, verify=False)
        prunable(type(model))  # checkpoints carry the shapes
        if self.initialise is not None:
            self.initialise(model)
        else:
            _reset(part, {path for path, _ in axis_masks(self.graph, plan.keep_masks(self.graph))})
        return model


def _reset(model: nn.Module, paths: set[str]) -> None:
    """Draw the weights of layers anew; bare parameters stay the part of the old ones that was kept."""
    for path, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if path in paths and callable(reset):
            reset()


class CandidateTrainings:
    """Trains candidates for a while, keeps their checkpoints, and enters their scores in a journal.

    A checkpoint's name says its rung: where the search breaks off before the score is entered, that training is
    repeated from the checkpoint before.
    """

    def __init__(
        self,
        networks: CandidateNetworks,
        datamodule: LightningDataModule,
        monitor: str,
        trainer_kwargs: Mapping[str, Any] | None,
        folder: Path,
        journal: Journal,
    ) -> None:
        self._networks, self._datamodule, self._monitor = networks, datamodule, monitor
        self._trainer_kwargs, self._folder, self._journal = trainer_kwargs, folder, journal
        graph, configs = networks.graph, networks.configs
        self._macs, self._params = (cost(configs).round().long().tolist() for cost in (graph.macs, graph.params))

    def train(self, number: int, rung: int, epochs: int) -> Candidate:
        """Train a candidate up to ``epochs`` epochs in all, from where the last rung left it."""
        stage = f"rung {rung}"
        done = self._journal.known.get((stage, number))
        if done is not None:
            return done
        start, seed = time.perf_counter(), self._networks.seed
        model, trainer = self._networks.build(number), quiet_trainer(epochs, self._trainer_kwargs)
        trainer.callbacks.append(_Shuffle(seed + rung))  # type: ignore[attr-defined]
        seed_everything(seed)
        # files of our own, which may hold hyperparameters of any type
        resume: dict[str, Any] = {"ckpt_path": self._path(number, rung - 1), "weights_only": False} if rung else {}
        trainer.fit(model, datamodule=self._datamodule, **resume)
        trainer.save_checkpoint(self._path(number, rung))
        config = config_of(self._networks.graph, self._networks.configs[number])
        macs, params, score = self._macs[number], self._params[number], self._score(trainer)
        done = Candidate(number, config, macs, params, score, math.nan, time.perf_counter() - start, stage)
        self._journal.add(done)
        return done

    def forget(self, alive: Sequence[int], rung: int) -> None:
        """Delete the checkpoints of earlier rungs, and of candidates that do not go on from this one."""
        for number, earlier in itertools.product(range(len(self._macs)), range(rung + 1)):
            if earlier < rung or number not in alive:
                self._path(number, earlier).unlink(missing_ok=True)

    def load(self, number: int, rung: int) -> tuple[LightningModule, Path]:
        """Return a trained candidate and its checkpoint."""
        last, path = self._path(number, rung), self._folder / f"candidate-{number}.ckpt"
        if last.exists():
            last.replace(path)
        model = self._networks.build(number)
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        return model, path

    def _path(self, number: int, rung: int) -> Path:
        return self._folder / f"candidate-{number}.rung{rung}.ckpt"

    def _score(self, trainer: Trainer) -> float:
        logged = trainer.callback_metrics
        if self._monitor not in logged:
            raise ValueError(
                f"monitor={self._monitor!r} was not logged: expected one of {', '.join(sorted(logged)) or 'nothing'}. "
                "Log it in validation_step, and give the data module a validation loader"
            )
        score = float(logged[self._monitor])
        return score if math.isfinite(score) else math.nan


def quiet_trainer(epochs: int, trainer_kwargs: Mapping[str, Any] | None) -> Trainer:
    """Build the Trainer of one candidate; MisconfigurationException where it is of several processes."""
    given = dict(trainer_kwargs or {})
    if "callbacks" in given:
        given["callbacks"] = copy.deepcopy(given["callbacks"])
    trainer = Trainer(max_epochs=epochs, **{**_QUIET, **given})
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"search_from_scratch trains every candidate in one process, this Trainer has {trainer.world_size}: pass "
            'trainer_kwargs={"devices": 1, ...}, or train the best configuration by itself in several processes'
        )
    return trainer


class _Shuffle(Callback):
    """Seed the order of samples once the data module is set up, whose split is to be the same in every rung."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed_everything(self._seed)


def seed_everything(seed: int) -> None:
    """Seed the global generators, which whoever searches puts back."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
