"""Dirichlet pruning inside a Trainer: the module's own training step as the likelihood, and nothing else changes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from magnitude import Net, digits, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_eff.batch import BatchKeys
from lightning_eff.pruning import (
    Allocation,
    Calibration,
    DirichletOptions,
    DirichletPruneCallback,
    Layers,
    Prior,
    Schedule,
    Scoring,
    dirichlet_scores,
)
from lightning_eff.pruning.samples import samples_in
from lightning_eff.pruning.training_loss import check_training_step
from lightning_eff.reporting import new_figure, save_figure
from lightning_eff.surgery import ChannelGraph, PruningPlan, load_pruned

TRAIN, VAL = digits()
BOLD = DirichletOptions(lr=0.1)  # few batches: small steps would teach nothing


def lists(plan: PruningPlan) -> dict[str, list[int]]:
    return {name: list(kept) for name, kept in plan.keep.items()}


def callback(amount: Any = 0.5, **options: Any) -> DirichletPruneCallback:
    return DirichletPruneCallback(amount, **{"switches": BOLD, "verbose": False, **options})


@pytest.fixture(scope="module")
def trained() -> Net:
    model = Net()
    trainer(max_epochs=3).fit(model, TRAIN, VAL)
    return model


def like(trained: Net, model: Net) -> Net:
    """Another class with the weights of the trained network."""
    model.load_state_dict(trained.state_dict(), strict=False)
    return model


def fit(prune: pl.Callback, model: Net, *others: pl.Callback, **options: Any) -> Net:
    ckpt_path = options.pop("ckpt_path", None)
    torch.manual_seed(0)
    trainer(prune, *others, **{"max_epochs": 1, **options}).fit(model, TRAIN, VAL, ckpt_path=ckpt_path)
    return model


def test_half_of_every_layer_goes_and_training_continues(trained: Net) -> None:
    prune = callback()
    model = fit(prune, copy.deepcopy(trained), max_epochs=3)
    assert [model.body[i].out_channels for i in (0, 4, 7)] == [4, 8, 8]
    values = [stage.value for stage in prune.report.stages]
    assert values[2] > values[1] + 0.2
    for name, posterior in prune.posterior.items():
        assert set(prune.plan.keep[name]) == set(posterior.rank()[: len(posterior.mean) // 2])


def test_training_step_and_loss_function_give_the_scores_of_the_bare_function(trained: Net) -> None:
    graph = ChannelGraph.from_model(trained, VAL.dataset.tensors[0][:2])
    expected = dirichlet_scores(
        trained, graph, TRAIN, lambda net, b: F.cross_entropy(net(b[0]), b[1]), options=BOLD, progress=False
    )
    for loss_fn in (None, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1])):
        prune = callback(loss_fn=loss_fn)
        fit(prune, copy.deepcopy(trained))
        assert prune.posterior.keys() == expected.keys()
        for name, posterior in expected.items():
            torch.testing.assert_close(prune.posterior[name].concentration, posterior.concentration)


class Watched(Net):
    """Logs, keeps a metric and a list, and notes in which mode it is asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.accuracy = MulticlassAccuracy(10)
        self.losses: list[float] = []
        self.asked: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict({"train_loss": loss}, on_step=False, on_epoch=True)
        self.losses.append(float(loss.detach()))
        return {"loss": loss, "logits": logits}


def test_run_with_scoring_that_removes_nothing_is_the_run_without(tmp_path: Path) -> None:
    results = []
    for extra in ([], [callback(0.0, schedule=Schedule(start=1))]):
        torch.manual_seed(0)
        model = Watched(dropout=0.5)
        loader = DataLoader(TRAIN.dataset, 64, shuffle=True)
        run = trainer(*extra, max_epochs=3, logger=pl.loggers.CSVLogger(tmp_path))
        run.fit(model, loader, VAL)
        results.append((model.state_dict(), model.losses, run.logged_metrics, run.global_step))
    (weights, losses, logged, steps), (weights2, losses2, logged2, steps2) = results
    assert all(torch.equal(value, weights2[key]) for key, value in weights.items())
    assert (losses, steps) == (losses2, steps2)
    assert all(torch.equal(value, logged2[key]) for key, value in logged.items())


def test_scoring_asks_the_training_step_in_evaluation_mode_with_frozen_weights(trained: Net) -> None:
    class Asked(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.scoring:
                modes.append((self.training, self.body[1].training, any(p.requires_grad for p in self.parameters())))
            return super().training_step(batch, batch_idx)

    class Telling(DirichletPruneCallback):
        def score(self, scoring: Scoring) -> Any:
            scoring.pl_module.scoring = True
            scores = super().score(scoring)
            scoring.pl_module.scoring = False
            return scores

    modes: list[tuple[bool, ...]] = []
    model = like(trained, Asked())
    model.scoring = False
    fit(Telling(0.5, switches=BOLD, verbose=False), model)
    assert set(modes) == {(False, False, False)}
    assert model.body[1].training
    assert model.body[0].weight.requires_grad


@pytest.mark.parametrize("answer", ["tensor", "dict"])
def test_both_kinds_of_training_step_serve(answer: str, trained: Net) -> None:
    class Answering(Net):
        def training_step(self, batch: Any) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            return loss if answer == "tensor" else {"loss": loss}

    assert fit(callback(), like(trained, Answering())).body[0].out_channels == 4


def test_training_step_without_a_loss_asks_for_a_loss_function() -> None:
    class Silent(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.raises(ValueError, match=r"training_step returned NoneType in batch 0.* give loss_fn"):
        fit(callback(), Silent())


class ByHand(Net):
    def __init__(self) -> None:
        super().__init__(optimizer="sgd")
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimization_asks_for_a_loss_function_and_works_with_one(trained: Net) -> None:
    model = like(trained, ByHand())
    with pytest.raises(ValueError, match=r"ByHand optimizes by hand.* give loss_fn"):
        fit(callback(), model)
    assert model.body[0].out_channels == 8
    loss_fn = lambda net, batch: F.cross_entropy(net(batch[0]), batch[1])  # noqa: E731
    assert fit(callback(loss_fn=loss_fn), like(trained, ByHand())).body[0].out_channels == 4


@pytest.mark.parametrize("mode", ["uniform", "global", "mass"])
@pytest.mark.parametrize("target", ["macs", "params"])
def test_every_allocation_meets_the_target(mode: Any, target: Any, trained: Net) -> None:
    prune = callback(0.5, allocation=Allocation(mode=mode, target=target))
    fit(prune, copy.deepcopy(trained))
    first, last = prune.report.stages[0], prune.report.stages[-1]
    assert 0.35 < getattr(last, target) / getattr(first, target) <= 0.5


def test_given_widths_are_met(trained: Net) -> None:
    model = fit(callback({"body.0": 3, "body.4": 0.25}), copy.deepcopy(trained))
    assert [model.body[i].out_channels for i in (0, 4, 7)] == [3, 4, 16]


def test_every_step_scores_anew_and_ends_at_the_amount(trained: Net) -> None:
    sizes: list[dict[str, int]] = []

    class Telling(DirichletPruneCallback):
        def score(self, scoring: Scoring) -> Any:
            scores = super().score(scoring)
            sizes.append({name: len(posterior.mean) for name, posterior in self.posterior.items()})
            return scores

    prune = Telling(0.75, switches=BOLD, schedule=Schedule(steps=3), verbose=False)
    model = fit(prune, copy.deepcopy(trained), max_epochs=4)
    assert [size["body.4"] for size in sizes] == [16, 8, 5]
    assert model.body[4].out_channels == 4
    assert len(prune.plan.keep["body.4"]) == 4


@pytest.mark.parametrize("physical", ["at_end", "never"])
def test_masked_channels_stay_masked_over_the_steps(physical: Any, trained: Net) -> None:
    prune = callback(0.5, schedule=Schedule(steps=2, physical=physical))
    model = fit(prune, copy.deepcopy(trained), max_epochs=3)
    if physical == "at_end":
        assert model.body[0].out_channels == 4
    else:
        assert (model.body[4].weight.abs().sum((0, 2, 3)) == 0).sum() == 4


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}, {"precision": "64-true"}],
    ids=lambda options: next(iter(options)) + "=" + str(next(iter(options.values()))),
)
def test_composes_with_trainer_features(options: dict[str, Any], trained: Net) -> None:
    prune = callback()
    model = fit(prune, copy.deepcopy(trained), max_epochs=2, **options)
    assert model.body[0].out_channels == 4
    assert all(bool(posterior.concentration.isfinite().all()) for posterior in prune.posterior.values())


def test_scores_under_bf16_are_close_to_those_of_float32(trained: Net) -> None:
    full, half = callback(), callback()
    fit(full, copy.deepcopy(trained))
    fit(half, copy.deepcopy(trained), precision="bf16-mixed")
    for name, posterior in full.posterior.items():
        assert torch.corrcoef(torch.stack([posterior.mean, half.posterior[name].mean]))[0, 1] > 0.9


def test_compiled_module_is_scored_and_cut(trained: Net) -> None:
    model, plain, compiled = copy.deepcopy(trained), callback(), callback()
    trainer(compiled, max_epochs=1).fit(torch.compile(model, backend="eager"), TRAIN, VAL)
    fit(plain, copy.deepcopy(trained))
    assert compiled.plan.keep == plain.plan.keep


def test_loader_with_persistent_workers_still_trains_after_scoring(trained: Net) -> None:
    loader = DataLoader(TRAIN.dataset, 128, num_workers=1, persistent_workers=True)
    steps: list[int] = []

    class Count(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            steps.append(1)

    trainer(callback(), Count(), max_epochs=2).fit(copy.deepcopy(trained), loader, VAL)
    assert len(steps) == 8


def test_straight_run_equals_interrupted_and_resumed_run(tmp_path: Path) -> None:
    def prune() -> DirichletPruneCallback:
        return callback(0.75, schedule=Schedule(start=1, steps=2))

    saved = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    straight_callback = prune()
    straight = fit(straight_callback, Net(), saved, max_epochs=4, enable_checkpointing=True)
    for epoch in (0, 1, 2):  # before the first step, between the two, after the last
        again = prune()
        resumed = fit(again, Net(), max_epochs=4, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        for key, value in straight.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), (epoch, key)
        for name, posterior in straight_callback.posterior.items():
            assert torch.equal(posterior.concentration, again.posterior[name].concentration)
    assert load_pruned(Net, tmp_path / "epoch=3.ckpt").body[0].out_channels == 2


def test_state_is_plain_and_loads_with_weights_only(trained: Net, tmp_path: Path) -> None:
    prune = callback()
    fit(prune, copy.deepcopy(trained))
    torch.save(prune.state_dict(), tmp_path / "state.pt")
    other = callback()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name, posterior in prune.posterior.items():
        assert torch.equal(posterior.concentration, other.posterior[name].concentration)


def breaking_after(batches: int) -> Callable[[nn.Module, Any], Tensor]:
    """A loss that breaks off once so many batches were scored; what it is called with is counted."""

    def loss(net: nn.Module, batch: Any) -> Tensor:
        key = float(batch[0].double().sum())
        if key not in loss.seen and len(loss.seen) == batches:
            raise RuntimeError("power cut")
        loss.seen.add(key)
        return F.cross_entropy(net(batch[0]), batch[1])

    loss.seen = set()
    return loss


def cross_entropy(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


class Named(DirichletPruneCallback):
    """Its loss is told from another one by its name, however it is made."""

    def _memory(self, scoring: Scoring) -> Any:
        loss, self.loss_fn = self.loss_fn, cross_entropy
        try:
            return super()._memory(scoring)
        finally:
            self.loss_fn = loss


@pytest.mark.parametrize("shuffle", [False, True])
def test_scoring_that_broke_off_goes_on_to_the_same_bits(shuffle: bool, trained: Net, tmp_path: Path) -> None:
    loader = DataLoader(TRAIN.dataset, 64, shuffle=shuffle)
    options = {"switches": replace(BOLD, epochs=2), "verbose": False, "calibration": Calibration(loader=loader)}
    whole = Named(0.5, loss_fn=cross_entropy, **options)
    fit(whole, copy.deepcopy(trained))
    broken = breaking_after(5)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(Named(0.5, loss_fn=broken, dirpath=tmp_path, **options), copy.deepcopy(trained))
    rest = breaking_after(99)
    resumed = Named(0.5, loss_fn=rest, dirpath=tmp_path, **options)
    fit(resumed, copy.deepcopy(trained))
    for name, posterior in whole.posterior.items():
        assert torch.equal(resumed.posterior[name].concentration, posterior.concentration)
    assert lists(resumed.plan) == lists(whole.plan)


def test_scores_of_a_step_that_is_done_are_never_taken_up_again(trained: Net, tmp_path: Path) -> None:
    losses = [breaking_after(99) for _ in range(2)]
    for loss in losses:
        fit(Named(0.5, loss_fn=loss, dirpath=tmp_path, switches=BOLD, verbose=False), copy.deepcopy(trained))
    assert len(losses[0].seen) == len(losses[1].seen) >= 8
    assert not list((tmp_path / "scores").glob("*"))


@pytest.mark.parametrize("other", ["weights", "options", "layers"])
def test_what_another_network_or_other_options_left_is_not_taken_up(other: str, trained: Net, tmp_path: Path) -> None:
    options: dict[str, Any] = {"switches": BOLD, "dirpath": tmp_path, "verbose": False}
    with pytest.raises(RuntimeError, match="power cut"):
        fit(Named(0.5, loss_fn=breaking_after(5), **options), copy.deepcopy(trained))
    assert len(list((tmp_path / "scores").glob("step0-switches.pt"))) == 1
    model, now = copy.deepcopy(trained), breaking_after(99)
    if other == "weights":
        with torch.no_grad():
            model.body[0].weight[0, 0, 0, 0] += 0.5
    elif other == "options":
        options["switches"] = DirichletOptions(lr=0.2)
    else:
        options["layers"] = Layers(exclude=["body.4"])
    prune, fresh = Named(0.5, loss_fn=now, **options), Named(0.5, loss_fn=cross_entropy, **{**options, "dirpath": None})
    fit(prune, copy.deepcopy(model))
    fit(fresh, model)
    assert all(torch.equal(prune.posterior[n].concentration, one.concentration) for n, one in fresh.posterior.items())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_broken_scoring_leaves_the_model_as_it_was_and_writes_what_it_had(
    error: type[BaseException], trained: Net, tmp_path: Path
) -> None:
    calls = []

    def loss(net: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 20:
            raise error("stop")
        return F.cross_entropy(net(batch[0]), batch[1])

    model = copy.deepcopy(trained)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SystemExit if error is KeyboardInterrupt else RuntimeError):
        fit(callback(loss_fn=loss, dirpath=tmp_path), model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert json.loads((tmp_path / "scores.json").read_text()).keys() == {"body.0", "body.4", "body.7"}


def test_loss_that_is_no_number_prunes_nothing(trained: Net) -> None:
    model = copy.deepcopy(trained)
    data = TensorDataset(*(tensor.clone() for tensor in TRAIN.dataset.tensors))
    data.tensors[0][70] = torch.nan
    with pytest.raises(FloatingPointError, match=r"body\.0 is nan.* in batch 1: nothing was pruned"):
        trainer(callback(), max_epochs=1).fit(model, DataLoader(data, 64), VAL)
    assert model.body[0].out_channels == 8


def test_what_is_written_can_be_read(trained: Net, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prune = callback(dirpath=tmp_path, verbose=True)
    fit(prune, copy.deepcopy(trained))
    assert "importance switches" in capsys.readouterr().out
    groups = json.loads((tmp_path / "scores.json").read_text())
    for name, posterior in prune.posterior.items():
        assert groups[name]["phi"] == posterior.concentration.tolist()
        assert groups[name]["rank"] == posterior.rank()
    header, *rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert header == "batches,layer,loss,kl,phi_min,phi_max,phi_sum"
    assert len(rows) == 8 * 3
    save_figure(new_figure()[0], tmp_path / "blank.png")
    blank = (tmp_path / "blank.png").stat().st_size
    for name in ("posterior", "cut", "shares", "features", "scores"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1.2 * blank, name


def test_global_ranking_compares_shares_of_layers(trained: Net) -> None:
    prune = callback(0.5, allocation=Allocation(mode="global", target="channels"))
    fit(prune, copy.deepcopy(trained))
    kept, gone = [], []
    for name, posterior in prune.posterior.items():
        share = posterior.relative
        keep = list(prune.plan.keep[name])
        kept += share[keep].tolist()
        removed = share[[c for c in range(len(share)) if c not in keep]].tolist()
        gone += removed if len(keep) > max(1, 0.1 * len(share)) + 1 else []
    assert min(kept) >= max(gone) - 1e-6


def test_curves_are_not_to_be_had() -> None:
    with pytest.raises(ValueError, match='mode "budget" needs measured curves'):
        DirichletPruneCallback(allocation=Allocation(mode="budget"))


def test_validation_data_or_a_loader_of_ones_own_serve_as_well(trained: Net) -> None:
    own = DataLoader(TRAIN.dataset, 32)
    for calibration in (Calibration(source="val"), Calibration(loader=own)):
        assert fit(callback(calibration=calibration), copy.deepcopy(trained)).body[0].out_channels == 4


def test_empty_loader_is_refused() -> None:
    empty = DataLoader(TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0)), 4)
    with pytest.raises(ValueError, match="no batch"):
        fit(callback(calibration=Calibration(loader=empty)), Net())


def test_submodule_alone_is_pruned(trained: Net) -> None:
    prune = callback(layers=Layers(submodule="body"), value=lambda out, y: out.flatten(1).mean(1))
    model = fit(prune, copy.deepcopy(trained))
    assert set(prune.posterior) == {"0", "4"}
    assert model.body[0].out_channels == 4


class DictNet(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["image"], batch["label"]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((batch["image"], batch["label"]), batch_idx)


class Dicts(IterableDataset):
    """Whole batches, as dicts, without a length."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        return ({"image": x, "label": y} for x, y in self.loader)


def test_dict_batches_reach_the_training_step_as_they_are(trained: Net) -> None:
    loaders = [DataLoader(Dicts(loader), batch_size=None) for loader in (TRAIN, VAL)]
    options = {"calibration": Calibration(source="train"), "split_batch": BatchKeys("image", "label")}
    with pytest.raises(ValueError, match=r"give Prior\(dataset_size"):
        trainer(callback(**options), max_epochs=1).fit(like(trained, DictNet()), *loaders)
    model = like(trained, DictNet())
    switches = DirichletOptions(lr=0.1, prior=Prior(dataset_size=512))
    trainer(callback(switches=switches, **options), max_epochs=1).fit(model, *loaders)
    assert model.body[0].out_channels == 4


def test_given_plan_needs_no_training_step(tmp_path: Path, trained: Net) -> None:
    first = callback(dirpath=tmp_path)
    fit(first, copy.deepcopy(trained))
    model = fit(callback(plan=tmp_path / "plan.json"), ByHand())
    assert model.body[0].out_channels == 4


def test_batch_hooks_of_the_module_are_called(trained: Net) -> None:
    class Hooked(Net):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"packed": batch}

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch["packed"]

    assert fit(callback(), like(trained, Hooked())).body[0].out_channels == 4


def test_front_doors_agree_that_switches_are_trained_on_training_data() -> None:
    assert DirichletPruneCallback(0.5, calibration=Calibration(samples=10)).calibration.source == "train"
    assert DirichletPruneCallback(0.5, calibration=Calibration("val")).calibration.source == "val"


def test_loggers_and_lists_of_the_module_see_training_only(trained: Net, tmp_path: Path) -> None:
    class Recorder(CSVLogger):
        rows = 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            Recorder.rows += "raw" in metrics

    class Noting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.outs: dict[str, list[float]] = {"train": []}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.outs["train"].append(float(loss.detach()))
            self.logger.log_metrics({"raw": 1.0})
            return loss

    model = Noting()
    model.load_state_dict(trained.state_dict())
    trainer(callback(), max_epochs=1, logger=Recorder(tmp_path)).fit(model, TRAIN, VAL)
    assert len(model.outs["train"]) == 8
    assert Recorder.rows == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loader": IterableDataset}, r"give Prior\(dataset_size"),
        ({"step": None}, "expected the loss or a dict with 'loss': give loss_fn"),
        ({"several": True}, r"there are 2 loaders: give Calibration\(loader="),
    ],
    ids=["size of the data set", "no loss", "several loaders"],
)
def test_what_cannot_work_is_told_before_training(change: dict[str, Any], message: str) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(TRAIN.dataset)

    class Silent(Net):
        steps = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            Silent.steps += self.trainer.fit_loop.epoch_loop.batch_progress.current.started
            if isinstance(batch, dict):
                batch = batch["a"]
            loss = super().training_step(batch, batch_idx)
            return None if "step" in change else loss

    loader: Any = DataLoader(Stream(), 64) if "loader" in change else TRAIN
    loader = {"a": TRAIN, "b": TRAIN} if "several" in change else loader
    with pytest.raises(ValueError, match=message):
        trainer(callback(schedule=Schedule(start=1))).fit(Silent(), loader, VAL)
    assert Silent.steps == 0


def test_data_set_of_whole_batches_has_no_known_number_of_samples() -> None:
    batches = list(TRAIN)
    assert samples_in(DataLoader(batches, batch_size=None)) is None
    assert samples_in(TRAIN) == 512


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_training_step_that_draws_its_own_batches_asks_for_a_loss_function() -> None:
    class Drawing(Net):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            raise AssertionError("a batch was drawn")

    with pytest.raises(ValueError, match=r"Drawing\.training_step draws its own batches: give loss_fn"):
        check_training_step(Drawing())
