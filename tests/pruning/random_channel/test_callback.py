"""Random channel pruning inside a Trainer: searched, cut, repaired, resumed; and what is refused before any work."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import run_cli, run_ddp
from lightning.pytorch.callbacks import ModelCheckpoint
from magnitude import Net, digits, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_eff.batch import BatchKeys
from lightning_eff.models import ImageClassifier
from lightning_eff.pruning import (
    Allocation,
    Calibration,
    RandomChannelPruningCallback,
    Repair,
    Schedule,
    Search,
    StructuredPruningCallback,
)
from lightning_eff.pruning.validation import ValidationScore
from lightning_eff.surgery import BudgetError, ChannelGraph, PruningPlan, load_pruned

HERE = Path(__file__).parents[1]
FEW = Search(candidates=6, top_k=2, score_batches=2)
LIGHT = Repair(samples=128, bn_samples=128, positions=8)


class Judged(Net):
    """Logs an accuracy by torchmetrics, and a loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_acc", self.accuracy)
        self.log_dict({"val_loss": F.cross_entropy(logits, batch[1])})

    def on_validation_epoch_end(self) -> None:
        self.log("val_error", 1 - self.accuracy.compute())


def callback(amount: float = 0.5, **options: Any) -> RandomChannelPruningCallback:
    defaults: dict[str, Any] = {"search": FEW, "repair": LIGHT, "verbose": False}
    return RandomChannelPruningCallback(amount, **{**defaults, **options})


def fitted(prune: RandomChannelPruningCallback, model: pl.LightningModule | None = None, **options: Any) -> Any:
    model = model or Net()
    trainer(prune, **options).fit(model, *digits())
    return model


def lists(plan: PruningPlan) -> dict[str, list[int]]:
    return {name: list(kept) for name, kept in plan.keep.items()}


def macs(model: nn.Module) -> int:
    return round(ChannelGraph.from_model(model, torch.randn(2, 1, 8, 8)).macs().item())


def test_half_of_the_multiply_adds_goes_and_training_goes_on() -> None:
    prune = callback(schedule=Schedule(start=1))
    model = fitted(prune, max_epochs=3)
    assert macs(model) == prune.search.best.macs <= 0.51 * macs(Net())
    assert [candidate.stage for candidate in prune.search.candidates] == ["ranked"] * 6 + ["final"] * 2
    assert len({tuple(candidate.config.values()) for candidate in prune.search.candidates}) == 6
    assert [stage.name for stage in prune.report.stages] == ["dense", "pruned, step 1", "fine-tuned"]


def test_what_is_cut_is_the_best_candidate_with_its_corrected_weights() -> None:
    prune = callback(schedule=Schedule(start=1), search=Search(candidates=6, top_k=2, monitor="val_acc", mode="max"))
    model = Judged()

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Judged, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 0:
                self.score = ValidationScore(module, "val_acc", digits()[1])()

    look = Look()
    trainer(prune, look).fit(model, *digits())
    best = prune.search.best
    assert look.score == pytest.approx(best.score, abs=1e-6)
    assert model.body[0].out_channels == best.config["body.0"]
    assert model.body[4].out_channels == best.config["body.4"]


def test_repaired_candidates_beat_unrepaired_ones() -> None:
    scores = {}
    for update in ("none", "gram"):
        prune = callback(
            schedule=Schedule(start=4), repair=Repair(update, samples=256, bn_samples=0), search=Search(6, top_k=0)
        )
        fitted(prune, Net(), max_epochs=5)
        scores[update] = prune.search.quantities()["median_score"]
    assert scores["gram"] < 0.7 * scores["none"]


def test_accuracy_of_a_metric_is_the_score_and_the_metric_is_left_alone() -> None:
    model = Judged()
    model.accuracy.update(torch.eye(10), torch.arange(10))
    before = {name: value.clone() for name, value in model.accuracy.metric_state.items()}
    batches = list(digits()[1])
    wanted = sum(int((model.eval()(x).argmax(1) == y).sum()) for x, y in batches) / 256
    for name in ("val_acc", "val_error"):
        score = ValidationScore(model, name, batches)()
        assert score == pytest.approx(wanted if name == "val_acc" else 1 - wanted, abs=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.accuracy.metric_state.items())
    assert "log" not in vars(model)


def test_loss_is_averaged_over_samples_not_batches() -> None:
    model = Judged().eval()
    batches = [(torch.randn(n, 1, 8, 8), torch.randint(0, 10, (n,))) for n in (7, 1)]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert ValidationScore(model, "val_loss", batches)() == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-5)


def test_every_hook_of_validation_is_called_and_the_trainer_says_it_validates() -> None:
    class Collecting(Net):
        """Clears in on_validation_start, collects in on_validation_batch_end."""

        def on_validation_start(self) -> None:
            self.right: list[Tensor] = []

        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            assert self.trainer.validating or self.trainer.sanity_checking
            return (self(batch[0]).argmax(1) == batch[1]).float()

        def on_validation_batch_end(self, outputs: Tensor, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.right.append(outputs)

        def on_validation_epoch_end(self) -> None:
            self.log("val_acc", torch.cat(self.right).mean())

    model = Collecting()
    prune = callback(search=Search(candidates=4, top_k=1, score_batches=1.0, monitor="val_acc", mode="max"))
    fitted(prune, model)
    plain = callback(search=Search(candidates=4, top_k=1, score_batches=1.0, monitor="val_acc", mode="max"))
    fitted(plain, Judged())
    scores = [[round(c.score, 6) for c in one.search.candidates] for one in (prune, plain)]
    assert scores[0] == scores[1]


def test_only_means_can_be_monitored() -> None:
    class Summing(Net):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self.log("right", (self(batch[0]).argmax(1) == batch[1]).sum().float(), reduce_fx="sum")
            self.log("loss", F.cross_entropy(self(batch[0]), batch[1]), on_step=True, on_epoch=True)

    batches = list(digits()[1])
    with pytest.raises(ValueError, match="'right' is logged with another reduce_fx than the mean"):
        ValidationScore(Summing(), "right", batches)()
    assert ValidationScore(Summing(), "loss_epoch", batches)() == ValidationScore(Summing(), "loss", batches)()


def test_first_of_several_validation_loaders_judges_and_the_report_says_so() -> None:
    class Two(Net):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    train, val = digits()
    prune = callback(search=Search(candidates=2, top_k=0, monitor="val_loss/dataloader_idx_0"))
    trainer(prune).fit(Two(), train, [val, train])
    assert "Candidates are judged on the first of 2 validation loaders." in prune.report.notes


def test_impossible_draws_and_missing_norms_are_told_before_training() -> None:
    search = Search(sampler="rejection", min_ratio=0.98, monitor="val_loss")
    model = torch.nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    for options, message in (
        ({"search": search}, 'use sampler="power"'),
        ({"criterion": "bn_scale"}, "norm"),
    ):
        prune = callback(schedule=Schedule(start=1), **options)
        with pytest.raises(ValueError, match=message):
            fitted(prune, ImageClassifier(model) if "criterion" in options else Net())
        assert prune._steps_done == 0


def test_unknown_monitor_lists_what_is_logged_before_training_begins() -> None:
    prune = callback(search=Search(monitor="val_f1", mode="max"), schedule=Schedule(start=1))
    with pytest.raises(ValueError, match="does not log 'val_f1'; it logs 'val_loss', 'val_error', 'val_acc'"):
        fitted(prune, Judged())
    assert prune._steps_done == 0


def test_monitor_without_validation_step_is_refused() -> None:
    class Blind(pl.LightningModule):
        pass

    with pytest.raises(ValueError, match="Blind has no validation_step that could log 'val_acc'"):
        ValidationScore(Blind(), "val_acc", [])


@pytest.mark.filterwarnings("ignore")  # Lightning tells it too
def test_monitor_without_validation_loader_is_refused() -> None:
    prune = callback(search=Search(monitor="val_loss"))
    with pytest.raises(ValueError, match="monitor='val_loss' needs a validation loader"):
        trainer(prune, limit_val_batches=0).fit(Net(), digits()[0])


class Regression(Net):
    """No classes: predicts the mean brightness of an image, and logs the error of it."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0])[:, :1], batch[0].mean((2, 3)))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_mse", F.mse_loss(self(batch[0])[:, :1], batch[0].mean((2, 3))))


def images() -> list[torch.utils.data.DataLoader]:
    """The digits with themselves as targets."""
    return [
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(loader.dataset.tensors[0], loader.dataset.tensors[0]), 64
        )
        for loader in digits()
    ]


@pytest.mark.parametrize("calibration", [Calibration("train", 128), Calibration(samples=128, loader=images()[0])])
def test_report_is_of_the_monitored_quantity(calibration: Calibration, tmp_path: Path) -> None:
    search = Search(candidates=3, top_k=1, monitor="val_mse")
    prune = callback(search=search, calibration=calibration, schedule=Schedule(start=1), dirpath=tmp_path)
    model = Regression()
    trainer(prune).fit(model, *images())
    x = images()[1].dataset.tensors[0]
    with torch.no_grad():
        wanted = float(F.mse_loss(model.eval()(x)[:, :1], x.mean((2, 3))))
    stages = prune.report.stages
    assert stages[-1].value == pytest.approx(wanted, rel=1e-5)
    assert stages[1].value == pytest.approx(prune.search.best.score, rel=1e-5)
    assert stages[0].value == pytest.approx(prune.search.dense_score, rel=1e-5)
    course = prune.report.table("course")
    assert [column.name for column in course.columns][2] == "val_mse"
    assert course.caption.startswith("val_mse on the whole validation set")
    assert PruningPlan.load(tmp_path / "plan.json").meta["settings"]["value"] == "val_mse"


def test_a_value_of_ones_own_is_reported_though_something_else_is_monitored() -> None:
    search = Search(candidates=3, top_k=1, monitor="val_loss")
    prune = callback(search=search, value="neg_loss")
    fitted(prune)
    assert prune.report.value_name == "neg_loss"
    assert prune.report.stages[1].value == pytest.approx(-prune.search.best.score, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"value": "accuracy", "search": Search(monitor="val_mse")}])
def test_a_value_that_does_not_suit_the_network_is_told_before_training(options: dict[str, Any]) -> None:
    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            raise AssertionError("training has begun")

    with pytest.raises(ValueError, match=r"expected logits .*pass value="):
        trainer(Look(), callback(schedule=Schedule(start=1), **options)).fit(Regression(), *images())


def test_iterative_search_shrinks_what_the_last_one_left() -> None:
    prune = callback(0.6, schedule=Schedule(steps=2, shape="linear"))
    model = fitted(prune)
    kept = [stage.macs / prune.report.stages[0].macs for stage in prune.report.stages]
    assert kept[1] == pytest.approx(0.7, abs=0.03)
    assert kept[2] == pytest.approx(0.4, abs=0.03)
    assert macs(model) == prune.report.stages[-1].macs


def test_parameters_can_be_the_budget() -> None:
    prune = callback(0.5, allocation=Allocation(target="params"))
    model = fitted(prune)
    params = [sum(p.numel() for p in one.parameters()) for one in (model, Net())]
    assert params[0] == pytest.approx(0.5 * params[1], rel=0.05)


def test_resumed_training_never_searches_again(tmp_path: Path) -> None:
    prune = callback(schedule=Schedule(start=1))
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(prune, keep, max_epochs=3, enable_checkpointing=True).fit(Net(), *digits())
    again = callback(schedule=Schedule(start=1))
    model = Net()
    trainer(again, max_epochs=4).fit(model, *digits(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert lists(again.plan) == lists(prune.plan)
    assert again.search.to_dict()["candidates"] == prune.search.to_dict()["candidates"]
    loaded = load_pruned(Net, tmp_path / "epoch=2.ckpt")
    assert macs(loaded) == macs(model)


def test_search_that_broke_off_goes_on_and_ends_as_if_it_had_not(tmp_path: Path) -> None:
    search = Search(candidates=6, top_k=2, score_batches=1, monitor="val_loss")
    whole = callback(search=search, dirpath=tmp_path / "whole")
    fitted(whole)
    broken = callback(search=search, dirpath=tmp_path / "broken")
    calls = []
    original = Net.validation_step

    def counting(self: Net, batch: Any, batch_idx: int) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("stopped")
        original(self, batch, batch_idx)

    Net.validation_step = counting  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError, match="stopped"):
            trainer(broken, num_sanity_val_steps=0).fit(Net(), *digits())
        first = len(calls)
        resumed = callback(search=search, dirpath=tmp_path / "broken")
        fitted(resumed, num_sanity_val_steps=0, limit_val_batches=1.0)
    finally:
        Net.validation_step = original  # type: ignore[method-assign]
    assert first == 6
    assert lists(resumed.plan) == lists(whole.plan)
    scores = [[c.score for c in one.search.candidates] for one in (whole, resumed)]
    assert scores[0] == scores[1]


def test_files_tell_what_was_tried(tmp_path: Path) -> None:
    prune = callback(dirpath=tmp_path)
    fitted(prune)
    for name in (
        "candidates.csv",
        "search.csv",
        "search.md",
        "candidates.png",
        "ratios.png",
        "plan.json",
        "pruned.ckpt",
    ):
        assert (tmp_path / name).is_file(), name
    lines = (tmp_path / "candidates.csv").read_text().splitlines()
    assert len(lines) == 1 + 6 + 2
    stored = PruningPlan.load(tmp_path / "plan.json")
    assert lists(stored) == lists(prune.plan)


def test_generators_modes_and_flags_are_as_if_there_had_been_no_search() -> None:
    states = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 0:
                states.append((torch.get_rng_state(), module.training, [p.requires_grad for p in module.parameters()]))

    for callbacks in ([Look()], [callback(), Look()]):
        pl.seed_everything(1)
        trainer(*callbacks, max_epochs=1).fit(Net(dropout=0.3), *digits())
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1:] == states[1][1:]


@pytest.mark.parametrize("criterion", ["random", "taylor", "kl_fisher", "dirichlet"])
def test_criteria_take_the_modules_own_training_step_as_loss(criterion: str) -> None:
    prune = callback(criterion=criterion, search=Search(candidates=2, top_k=0, score_batches=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network that has learnt nothing yet
        fitted(prune, max_epochs=1)
    scored = set(prune.report.scores)
    assert scored
    assert scored <= {"body.0", "body.4", "body.7"}


class DictNet(Net):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step((batch["image"], batch["label"]), batch_idx)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        super().validation_step((batch["image"], batch["label"]), batch_idx)


def test_dict_batches_need_only_the_keys() -> None:
    loaders = [
        torch.utils.data.DataLoader([{"image": x, "label": y} for x, y in loader.dataset], 64) for loader in digits()
    ]
    prune = callback(calibration=Calibration("train", 128), split_batch=BatchKeys("image", "label"))
    model = DictNet()
    trainer(prune, max_epochs=1).fit(model, *loaders)
    assert macs(model) < 0.55 * macs(Net())


def test_mixed_precision_searches_and_trains() -> None:
    model = fitted(callback(), precision="bf16-mixed", max_epochs=1)
    assert macs(model) < 0.55 * macs(Net())


class ByHand(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_manual_optimization_asks_for_a_loss_or_for_what_validation_logs_where_that_would_do() -> None:
    with pytest.raises(ValueError, match=r"ByHand optimizes by hand.* give loss_fn.* or search by .*monitor="):
        fitted(callback(), ByHand())
    with pytest.raises(ValueError, match=r"ByHand optimizes by hand.* give loss_fn, .* -> loss$"):
        fitted(callback(criterion="taylor"), ByHand())


def test_another_number_of_calibration_samples_does_not_move_to_the_data_that_judge() -> None:
    assert callback().calibration == Calibration("train", 512)
    assert callback(calibration=Calibration(samples=64)).calibration == Calibration("train", 64)
    assert callback(calibration=Calibration("val")).calibration.source == "val"


def test_unreachable_budget_is_told_before_training_with_what_can_be_reached() -> None:
    prune = callback(0.95, allocation=Allocation(target="macs", min_keep=0.5), schedule=Schedule(start=1))
    with pytest.raises(BudgetError, match="macs"):
        fitted(prune)
    assert prune._steps_done == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 1.0}, r"amount must lie in \[0, 1\)"),
        ({"amount": {"body.0": 4}}, "the search finds the counts"),
        ({"criterion": "l7"}, r"criterion must be one of .*'l1'.* got 'l7'"),
        ({"allocation": Allocation(target="channels")}, 'allocation.target must be "macs" or "params"'),
        ({"allocation": Allocation(mode="global", target="macs")}, "the search shares the amount out"),
        ({"schedule": Schedule(physical="at_end")}, 'needs schedule.physical="immediate"'),
        ({"schedule": Schedule(steps=2), "search": Search(sampler=[{"body.0": 4}])}, "goes with schedule.steps=1"),
    ],
)
def test_bad_settings_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        callback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates must be a whole number >= 1, got 0"),
        ({"sampler": "grid"}, "sampler must be one of power, rejection, uniform, or a list"),
        ({"min_ratio": 0}, r"min_ratio must lie in \(0, 1\)"),
        ({"tolerance": 0}, "tolerance must be > 0"),
        ({"top_k": -1}, "top_k must be a whole number >= 0, got -1"),
        ({"score_batches": 0}, "score_batches must be"),
        ({"score_batches": True}, "score_batches must be"),
        ({"candidates": 2.5}, "candidates must be a whole number >= 1, got 2.5"),
        ({"candidates": float("nan")}, "candidates must be a whole number >= 1, got nan"),
        ({"tolerance": "1%"}, "tolerance must be > 0, got '1%'"),
        ({"score_batches": 1.5}, "score_batches must be"),
        ({"mode": "best"}, "mode must be one of"),
        ({"mode": "max"}, 'mode="max" needs monitor'),
    ],
)
def test_bad_searches_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Search(**options)


class Uniform(StructuredPruningCallback):
    """Ranks by L1 norm."""

    def score(self, scoring: Any) -> Any:
        from lightning_eff.pruning import Scores

        return {name: Scores(norms) for name, norms in scoring.graph.weight_norms(scoring.model, p=1).items()}


def test_repair_serves_every_pruning_callback() -> None:
    trained = Net()
    trainer(max_epochs=4).fit(trained, *digits())
    kept = {}
    for name, repair in (("raw", None), ("repaired", Repair(samples=256, bn_samples=256))):
        prune = Uniform(0.5, repair=repair, value="neg_loss", verbose=False)
        trainer(prune, max_epochs=1).fit(copy.deepcopy(trained), *digits())
        kept[name] = prune.report.stages[1].value
    assert kept["repaired"] > 0.6 * kept["raw"]  # both are below zero


def test_optimizer_forgets_what_it_knew_of_corrected_weights_and_nothing_else() -> None:
    states = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Net, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 0:
                known = {id(p) for p in trainer.optimizers[0].state}
                states.append({name for name, p in module.named_parameters() if id(p) in known})

    for repair in (None, Repair(samples=128, bn_samples=0)):
        prune = Uniform({"body.4": 8}, repair=repair, schedule=Schedule(start=1), verbose=False)
        trainer(prune, Look()).fit(Net(), *digits())
    every = {name for name, _ in Net().named_parameters()}
    assert states[0] == every
    assert "body.7.weight" not in states[1]  # reads what was cut
    assert {"head.weight", "body.0.weight"} <= states[1]


def test_repair_of_masks_is_refused() -> None:
    with pytest.raises(ValueError, match='repair corrects what a cut leaves: it needs physical="immediate"'):
        Uniform(0.5, repair=Repair(), schedule=Schedule(physical="at_end"))


SCRIPT = f"""
import os, sys; sys.path.insert(0, {str(HERE)!r})
import torch, lightning.pytorch as pl
from magnitude import Net, digits
from lightning_eff.pruning import RandomChannelPruningCallback, Repair, Schedule, Search
model = Net()
prune = RandomChannelPruningCallback(
    0.5, search=Search(5, top_k=2, score_batches=2, monitor="val_loss"), repair=Repair(samples=128, bn_samples=128),
    schedule=Schedule(start=1), verbose=False, dirpath="out")
class Look(pl.Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            module.eval()
            x, y = digits()[1].dataset.tensors
            with torch.no_grad():
                self.whole = float(torch.nn.functional.cross_entropy(module(x), y))
            module.train()
look = Look()
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[look, prune])
trainer.fit(model, *digits())
found = {{"plan": prune.plan.to_dict(), "weights": model.state_dict(), "search": prune.search.to_dict(),
          "dense": prune.search.dense_scores["final"], "whole": look.whole,
          "values": [stage.value for stage in prune.report.stages]}}
torch.save(found, f"rank{{trainer.global_rank}}.pt")
"""


def test_two_processes_share_the_candidates_and_end_with_one_network(tmp_path: Path) -> None:
    run_ddp(SCRIPT, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["plan"] == second["plan"]
    assert first["search"] == second["search"]
    assert [c["number"] for c in first["search"]["candidates"][:5]] == list(range(5))
    assert first["dense"] == pytest.approx(first["whole"], abs=1e-5)  # on all of the validation data, in each process
    assert first["values"] == second["values"]  # of the monitored loss
    assert first["values"][0] == first["dense"]
    for key, value in first["weights"].items():
        if "running" not in key:
            assert torch.equal(value, second["weights"][key]), key


SAMPLERS = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import torch, lightning.pytorch as pl
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler, TensorDataset
from magnitude import Net, digits
from lightning_eff.pruning.settings import Calibration
from lightning_eff.pruning.trainer_data import TrainerData
class Later(Sampler):
    def __iter__(self): return iter(range(40, 101))
    def __len__(self): return 61
class Growing(BatchSampler):
    def __iter__(self):
        left, size = list(self.sampler), 1
        while left:
            yield left[:size]
            left, size = left[size:], size + 1
    def __len__(self): return len(list(iter(self)))
data = TensorDataset(torch.randn(101, 1, 8, 8), torch.arange(101) % 10)
growing = Growing(SequentialSampler(data), 1, False)
loaders = {{"sampler": DataLoader(data, 8, sampler=Later()), "batch_sampler": DataLoader(data, batch_sampler=growing)}}
found = {{}}
class Look(pl.Callback):
    def on_train_start(self, trainer, module):
        numbered = {{x.sum().item(): number for number, (x, _) in enumerate(data)}}
        for most in (None, 3):
            batches = TrainerData(trainer, module, Calibration(), []).whole_validation(most)
            found[name, most] = [[numbered[x.sum().item()] for x in batch[0]] for batch in batches]
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=0, logger=False, limit_train_batches=1,
    num_sanity_val_steps=0, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[Look()])
for name, loader in loaders.items():
    trainer.fit_loop.max_epochs += 1
    trainer.fit(Net(), digits()[0], loader)
torch.save(found, f"rank{{trainer.global_rank}}.pt")
"""


def test_two_processes_see_all_that_samplers_of_their_own_give(tmp_path: Path) -> None:
    run_ddp(SAMPLERS, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
    for name, samples in (("sampler", range(40, 101)), ("batch_sampler", range(101))):
        assert sorted(number for batch in first[name, None] for number in batch) == list(samples), name
        assert first[name, 3] == first[name, None][:3]
    assert [len(batch) for batch in first["batch_sampler", 3]] == [1, 1, 2]


def test_options_typed_in_the_shell_reach_the_callback(tmp_path: Path) -> None:
    shown = run_cli(
        "fit", "--print_config", "--model=ImageClassifier", "--model.net=LeNet", "--data=DigitsDataModule",
        "--trainer.callbacks=RandomChannelPruningCallback",
        "--trainer.callbacks.criterion=kl_fisher",
        "--trainer.callbacks.search.monitor=val_acc",
        "--trainer.callbacks.search.mode=max",
        "--trainer.callbacks.repair.update=sequential",
        cwd=tmp_path,
    ).stdout  # fmt: skip
    for line in ("criterion: kl_fisher", "monitor: val_acc", "mode: max", "update: sequential", "target: macs"):
        assert line in shown
