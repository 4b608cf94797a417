"""Search from scratch: narrow networks with fresh weights are trained for a while each, and the best one goes on.

Y. Li et al., Revisiting Random Channel Pruning for Neural Network Compression, CVPR 2022, arXiv 2205.05676: nothing of
a trained network is used. Successive halving: K. Jamieson, A. Talwalkar, AISTATS 2016, arXiv 1502.07943. It needs one
Trainer a candidate, so it is a function and no callback.
"""

from __future__ import annotations

import inspect
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor

from lightning_eff.arguments import check_choice, check_whole
from lightning_eff.batch import SplitBatch, take
from lightning_eff.batch import split_batch as split_pair
from lightning_eff.pruning.memory import digest
from lightning_eff.pruning.random_channel.candidate_training import (
    CandidateNetworks,
    CandidateTrainings,
    quiet_trainer,
    seed_everything,
)
from lightning_eff.pruning.random_channel.candidates import Candidate, Candidates, Mode, rank
from lightning_eff.pruning.random_channel.journal import Journal, fingerprint_of
from lightning_eff.pruning.random_channel.sampling import sample_configs
from lightning_eff.pruning.random_channel.search import described
from lightning_eff.pruning.settings import Layers
from lightning_eff.reporting import progress as progress_bar
from lightning_eff.surgery import ChannelGraph, PruningPlan
from lightning_eff.surgery.state import untouched_generators


@dataclass
class ScratchResult(Candidates):
    """What a search from scratch found.

    Attributes:
        plan: channels that the best candidate keeps, always the first ones of each group.
        model: the best candidate, trained as far as the search went.
        checkpoint: file to train it on from with optimizer state, ``Trainer(max_epochs=...).fit(result.model,
            ckpt_path=result.checkpoint)``; None where no ``dirpath`` was given.
        epochs: epochs it was trained for.
    """

    plan: PruningPlan = field(default_factory=lambda: PruningPlan({}))
    model: LightningModule | None = field(default=None, repr=False)
    checkpoint: Path | None = None
    epochs: int = 0


def search_from_scratch(
    make_model: Callable[[], LightningModule],
    datamodule: LightningDataModule,
    *,
    monitor: str,
    mode: Mode = "min",
    amount: float | None = None,
    n: int = 20,
    configs: Tensor | None = None,
    warm_epochs: int = 1,
    eta: int | None = None,
    trainer_kwargs: Mapping[str, Any] | None = None,
    layers: Layers = Layers(),  # noqa: B008 (frozen)
    example_inputs: Any = None,
    initialise: Callable[[LightningModule], object] | None = None,
    split_batch: SplitBatch | None = None,
    seed: int = 0,
    dirpath: str | Path | None = None,
    progress: bool = True,
) -> ScratchResult:
    """Train many narrow networks for a short while and return the best one.

    Args:
        make_model: builds the whole network with new weights.
        datamodule: what every candidate is trained and validated on.
        monitor: logged quantity that decides, e.g. ``"val_loss"``.
        mode: whether the ``"min"`` or the ``"max"`` of it is best.
        amount: fraction of the multiply-adds removed, in [0, 1): ``n`` configurations are drawn by the power law.
        n: candidates, >= 1.
        configs: channel counts ``[n, G]`` of :func:`sample_configs` for the graph of ``make_model()`` instead.
        warm_epochs: epochs that every candidate is trained for, >= 1.
        eta: successive halving, >= 2: one in ``eta`` candidates goes on, for ``eta`` times as many epochs in all, and
            so forth until one is left. None trains all once. Schedules of the learning rate that count on the number
            of epochs see it grow.
        trainer_kwargs: for every ``Trainer`` (``accelerator``, ``precision``, ``limit_train_batches`` ...), one process
            and without ``max_epochs``; callbacks are copied for each.
        layers: which channel groups may be narrower.
        example_inputs: for the trace; by default ``example_input_array``, or else inputs of the first training batch.
        initialise: gives a candidate its fresh weights; by default ``reset_parameters`` of every layer that is
            narrower, the others are as ``make_model`` made them.
        split_batch: ``batch -> (inputs, target)``, for batches of another form; for the example.
        seed: of configurations, weights, the split of the data and the order of samples; the same for every candidate.
        dirpath: where to keep the checkpoint of the best candidate, and the scores of all in ``candidates.csv``; None
            keeps none. A search that broke off and is called again with the same folder and arguments goes on behind
            the last training that was done, and the result says so. What neither arguments, nor initial weights, nor
            hyperparameters and settings of module and data module show, such as other files of the same name, is
            not noticed.
        progress: show a bar over candidates.

    Raises:
        ValueError: an argument out of range, or ``monitor`` is not logged; the message lists what is.
        FileExistsError: ``dirpath`` holds candidates of another search; told before any training, nothing is deleted.
        MisconfigurationException: a Trainer of several processes.
        RuntimeError: not a single candidate has a score that is a number.
    """
    _check(monitor, mode, amount, n, configs, warm_epochs, eta, trainer_kwargs)
    with _silence(), untouched_generators(), tempfile.TemporaryDirectory() as temporary:
        quiet_trainer(warm_epochs, trainer_kwargs)  # raises before any work where it cannot be built
        folder = Path(temporary if dirpath is None else dirpath)
        folder.mkdir(parents=True, exist_ok=True)
        seed_everything(seed)
        whole = make_model()
        example = example_inputs if example_inputs is not None else _example(whole, datamodule, split_batch)
        graph = ChannelGraph.from_model(
            whole.get_submodule(layers.submodule),
            example,
            include=layers.include,
            exclude=layers.exclude,
            allow_norm_coupled=layers.allow_norm_coupled,
        )
        if configs is None:
            assert amount is not None
            configs = sample_configs(graph, n, amount, seed=seed)
        told = (configs.tolist(), graph.sizes, monitor, mode, warm_epochs, eta, layers, seed)
        given = {"initialise": initialise, **(trainer_kwargs or {})}
        settings = [*_described(given), *_settings(whole), *_settings(datamodule)]
        fingerprint = digest(told, settings, *whole.state_dict().values())
        journal = _journal(None if dirpath is None else folder, fingerprint, graph)
        networks = CandidateNetworks(make_model, graph, configs, layers.submodule, initialise, seed)
        trainings = CandidateTrainings(networks, datamodule, monitor, trainer_kwargs, folder, journal)
        rungs = _rungs(len(configs), eta)
        alive, epochs, tried = list(range(len(configs))), warm_epochs, list[Candidate]()
        with progress_bar("search from scratch", sum(rungs), enabled=progress, unit="trainings") as bar:
            for rung, count in enumerate(rungs):
                epochs = warm_epochs * (eta or 1) ** rung
                results = []
                for number in alive[:count]:
                    results.append(trainings.train(number, rung, epochs))
                    bar.advance(1, f"best {rank(results, mode)[0].score:.4g}")
                tried += results
                ranked = [c.number for c in rank(results, mode) if not math.isnan(c.score)]
                if not ranked:
                    raise RuntimeError(f"not a single candidate has a {monitor} that is a number: look at the training")
                following = rungs[rung + 1] if rung + 1 < len(rungs) else 1
                alive = ranked[:following]
                trainings.forget(alive, rung)
        model, checkpoint = trainings.load(alive[0], len(rungs) - 1)
    return ScratchResult(
        candidates=tried,
        mode=mode,
        sizes={name: graph.sizes[name] for name in graph.prunable},
        macs=round(graph.macs().item()),
        params=round(graph.params().item()),
        notes=[f"{len(journal.known)} trainings were found in {folder}."] if journal.known else [],
        plan=networks.plan(alive[0]),
        model=model,
        checkpoint=None if dirpath is None else checkpoint,
        epochs=epochs,
    )


def _check(
    monitor: str,
    mode: str,
    amount: float | None,
    n: int,
    configs: Tensor | None,
    warm_epochs: int,
    eta: int | None,
    trainer_kwargs: Mapping[str, Any] | None,
) -> None:
    if (amount is None) == (configs is None):
        raise ValueError("pass either amount, a fraction to remove, or configs, rows of sample_configs")
    check_choice("mode", mode, ("max", "min"))
    for name, value, least in (("n", n, 1), ("warm_epochs", warm_epochs, 1), ("eta", eta, 2)):
        if value is not None:
            check_whole(name, value, least)
    if not monitor:
        raise ValueError("monitor must be the name of a logged quantity, got ''")
    if trainer_kwargs and "max_epochs" in trainer_kwargs:
        raise ValueError("trainer_kwargs must not set max_epochs: pass warm_epochs")


def _rungs(n: int, eta: int | None) -> list[int]:
    """Candidates trained in each rung: all, then one in ``eta``, down to one."""
    rungs = [n]
    while eta is not None and rungs[-1] > 1:
        rungs.append(-(-rungs[-1] // eta))
    return rungs


@contextmanager
def _silence() -> Iterator[None]:
    """Keep Lightning from telling the same about every Trainer; warnings come through."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _journal(folder: Path | None, fingerprint: str, graph: ChannelGraph) -> Journal:
    """Open the journal of a folder; FileExistsError where candidates of another search are in it."""
    if folder is None:
        return Journal(None, fingerprint, graph.prunable)
    path = folder / "candidates.csv"
    left = [path, *sorted(folder.glob("candidate-*.ckpt"))]
    first = next((file.name for file in left if file.exists()), None)
    if first is not None and fingerprint_of(path) != fingerprint:
        raise FileExistsError(
            f"dirpath={str(folder)!r} holds {first} of another search (other network, data or options): pass another "
            "folder, or delete what is in it"
        )
    return Journal(path, fingerprint, graph.prunable)


def _settings(built: LightningModule | LightningDataModule) -> list[str]:
    """What an object was made with, as far as it tells: structure, hyperparameters, arguments that it keeps."""
    arguments = inspect.signature(type(built).__init__).parameters
    kept = {name: value for name, value in vars(built).items() if name in arguments}
    return [described(built), *_described({**kept, **built.hparams})]


def _described(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={described(value)}" for name, value in sorted(values.items())]


def _example(model: LightningModule, datamodule: LightningDataModule, split_batch: SplitBatch | None) -> Any:
    if model.example_input_array is not None:
        return model.example_input_array
    datamodule.prepare_data()
    datamodule.setup("fit")
    inputs, _ = (split_batch or split_pair)(next(iter(datamodule.train_dataloader())))
    return take(inputs, slice(0, 2))
