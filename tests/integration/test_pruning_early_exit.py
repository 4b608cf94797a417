"""Channels removed from a network with early exits: heads follow, costs are those of the smaller network."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from together import classifier, exits, first_half, images, loader, masked, network, same_state, trainer, widths
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_eff import (
    Calibration,
    DirichletOptions,
    DirichletPruneCallback,
    EarlyExitModule,
    Layers,
    RandomChannelPruningCallback,
    Schedule,
    Search,
    ShapleyPruningCallback,
    ThresholdCalibration,
    load_pruned,
)
from lightning_eff.early_exit.inference.leaving import select_from_all
from lightning_eff.pruning.criteria import importance
from lightning_eff.pruning.random_channel.comparison import compare_criteria
from lightning_eff.pruning.random_channel.sampling import sample_configs
from lightning_eff.surgery import ChannelGraph, PruningGraphError, apply_plan

# networks of a few steps and sets of a few images: what is measured on them is not what these tests are about
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")
    for words in (
        "the loss .* is that of guessing",
        "thresholds of single exits are likely to over-fit",
        "ShapleyPruningCallback. 1 of 2 steps ran",
        ".*the switches of all channels are equal",
    )
]
X, Y = images()


def shapley(**options: Any) -> ShapleyPruningCallback:
    few = Calibration(samples=16)
    return ShapleyPruningCallback(0.5, value="neg_loss", calibration=few, budget="4n", verbose=False, **options)


def dirichlet(**options: Any) -> DirichletPruneCallback:
    fast = DirichletOptions(lr=0.5)
    return DirichletPruneCallback(0.5, switches=fast, verbose=False, **options)


def random(**options: Any) -> RandomChannelPruningCallback:
    return RandomChannelPruningCallback(0.5, search=Search(candidates=3, top_k=1), verbose=False, **options)


def counted(module: nn.Module) -> float:
    """Operations of one sample, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        module.eval()(X[:1])
    return float(counter.get_total_flops())


def costs_by_hand(module: EarlyExitModule) -> tuple[list[float], list[float]]:
    """Operations until each output and of each head, from parts of the backbone run one by one."""
    net, heads = module.network.backbone, module.network.heads
    until = [counted(net[: last + 1]) for last in (1, 3, 8)]
    features = [net[: last + 1](X[:1]) for last in (1, 3)]
    each = []
    for head, feature in zip(heads, features, strict=True):
        with FlopCounterMode(display=False) as counter:
            head(feature)
        each.append(float(counter.get_total_flops()))
    return until, each


@pytest.mark.parametrize("callback", [shapley, dirichlet, random])
def test_heads_are_cut_along_and_costs_are_those_of_what_is_left(callback: Any) -> None:
    module = exits()
    before = module.network.costs
    trainer(pruning := callback()).fit(module, loader(), loader(24, 2))
    backbone = module.network.backbone
    assert widths(backbone)[0] < 8
    assert [head.layers.in_features for head in module.network.heads] == [
        backbone[0].out_channels,
        backbone[2].out_channels,
    ]
    until, each = costs_by_hand(module)
    assert list(module.network.costs.backbone) == until
    assert list(module.network.costs.heads) == each
    assert module.network.costs.base < before.base
    assert pruning.plan is not None


def test_the_cut_network_answers_at_every_output_as_the_masked_one() -> None:
    module = exits()
    graph = ChannelGraph.from_model(module, X[:2])
    plan = first_half(graph)
    expected = masked(module, graph, plan, X)
    apply_plan(module, plan, X[:2], graph=graph)
    for got, wanted in zip(module.eval()(X), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("engine", ["hooks", "staged"])
def test_samples_leave_the_cut_network_as_all_outputs_say(engine: Any) -> None:
    module = exits(engine=engine)
    module.network.predict(X[:4])  # cuts stages of the wide network
    graph = ChannelGraph.from_model(module, X[:2])
    apply_plan(module, first_half(graph), X[:2], graph=graph)
    answer = module.network.predict(X)
    with torch.no_grad():
        expected = select_from_all(module.network.rule, module.eval()(X))
    assert len(answer.exit_index.unique()) > 1
    assert torch.equal(answer.exit_index, expected.exit_index)
    assert torch.allclose(answer.logits, expected.logits, atol=1e-6)


@pytest.mark.parametrize(("regime", "start"), [("mixed", 1), ("disjoint", 1)])
def test_a_cut_in_any_phase_is_trained_on(regime: str, start: int) -> None:
    module = exits(regime)
    trainer(shapley(schedule=Schedule(start=start)), max_epochs=2).fit(module, loader(), loader(24, 2))
    assert widths(module.network.backbone) == [4, 4, 6, 3]
    assert module.phase_index == 1


def test_switches_of_a_backbone_that_stands_still_are_refused() -> None:
    module = exits("disjoint")
    with pytest.raises(ValueError, match="the loss does not depend on the channels of"):
        trainer(dirichlet(schedule=Schedule(start=3)), max_epochs=4).fit(module, loader(), loader(24, 2))


def test_masks_until_the_end_then_one_cut() -> None:
    module = exits()
    trainer(shapley(schedule=Schedule(physical="at_end"))).fit(module, loader(), loader(24, 2))
    assert widths(module.network) == [4, 4, 6, 3, 3, 3]
    assert list(module.network.costs.backbone) == costs_by_hand(module)[0]


def test_pruning_the_backbone_alone_is_refused_because_heads_read_it() -> None:
    module = exits()
    with pytest.raises(PruningGraphError, match=r"also read by a LinearHead outside .*leave layers.submodule empty"):
        trainer(shapley(layers=Layers(submodule="network.backbone"))).fit(module, loader(), loader(24, 2))
    assert widths(module.network.backbone) == [8, 8, 12, 3]


@pytest.mark.slow
def test_calibration_at_the_end_of_the_fit_knows_the_smaller_costs() -> None:
    module = exits()
    trainer(shapley(), ThresholdCalibration(budget=0.8)).fit(module, loader(), loader(24, 2))
    found = module.network.predict(images(24, 2)[0]).exit_index
    fractions = torch.tensor(module.network.costs.fractions([one is not None for one in module.network.thresholds]))
    assert float(fractions[found].mean()) <= 0.8 + 1e-6


def test_a_checkpoint_of_the_cut_network_loads_without_data(tmp_path: Path) -> None:
    module = exits()
    run = trainer(shapley())
    run.fit(module, loader(), loader(24, 2))
    run.save_checkpoint(tmp_path / "cut.ckpt", weights_only=True)
    for load in (
        lambda: EarlyExitModule.load_from_checkpoint(tmp_path / "cut.ckpt", backbone=network(), weights_only=True),
        lambda: load_pruned(EarlyExitModule, tmp_path / "cut.ckpt", backbone=network()),
    ):
        loaded = load()
        assert same_state(loaded, module)
        assert loaded.network.costs == module.network.costs
        assert torch.equal(loaded.network.predict(X).exit_index, module.network.predict(X).exit_index)


def test_an_earlier_wider_checkpoint_loads_into_the_cut_network_and_costs_are_wide_again(tmp_path: Path) -> None:
    module, run = exits(), trainer()
    run.fit(module, loader(), loader(24, 2))
    wide = module.network.costs
    run.save_checkpoint(tmp_path / "wide.ckpt", weights_only=True)
    trainer(shapley()).fit(module, loader(), loader(24, 2))
    assert module.network.costs != wide
    trainer().validate(module, loader(24, 2), ckpt_path=tmp_path / "wide.ckpt", weights_only=True, verbose=False)
    assert widths(module.network) == [8, 8, 12, 3, 3, 3]
    assert module.network.costs == wide


class _Stop(pl.Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 1


def test_a_run_that_stops_between_two_cuts_goes_on_to_the_bit(tmp_path: Path) -> None:
    def run(*callbacks: pl.Callback, **options: Any) -> EarlyExitModule:
        module = exits("mixed")
        keep = ModelCheckpoint(tmp_path, save_last=True)
        steps = shapley(schedule=Schedule(start=1, steps=2))
        fit = trainer(steps, keep, *callbacks, max_epochs=3, enable_checkpointing=True)
        fit.fit(module, loader(), loader(24, 2), **options)
        return module

    whole = run()
    (tmp_path / "last.ckpt").unlink()
    run(_Stop())
    resumed = run(ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert widths(whole.network) == [4, 4, 6, 3, 3, 3]
    assert same_state(whole, resumed)
    assert whole.network.costs == resumed.network.costs


def test_exits_stand_on_a_network_that_was_cut_before_and_their_checkpoint_tells(tmp_path: Path) -> None:
    before = classifier()
    trainer(shapley()).fit(before, loader(), loader(24, 2))
    module = exits(net=before.net)
    run = trainer()
    run.fit(module, loader(), loader(24, 2))
    assert list(module.network.costs.backbone) == costs_by_hand(module)[0]
    run.save_checkpoint(tmp_path / "exits.ckpt", weights_only=True)
    loaded = EarlyExitModule.load_from_checkpoint(tmp_path / "exits.ckpt", backbone=network(), weights_only=True)
    assert same_state(loaded, module)


@pytest.mark.slow
def test_the_cut_network_is_exported_and_answers_as_before(tmp_path: Path) -> None:
    module = exits()
    trainer(shapley()).fit(module, loader(), loader(24, 2))
    program = torch.export.export(module.network.eval(), (X[:4],))
    for got, wanted in zip(program.module()(X[:4]), module.network(X[:4]), strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.slow
def test_criteria_are_compared_on_all_outputs_of_one_network() -> None:
    module = exits()
    graph = ChannelGraph.from_model(module, X[:2])
    names = ["l1", "random", "shapley", "dirichlet", "kl"]
    report = compare_criteria(
        module,
        graph,
        names,
        configs=sample_configs(graph, 2, 0.5, target="macs"),
        batches=[(X[:16], Y[:16])],
        score_fn=lambda net: float((net(X)[-1].argmax(1) == Y).double().mean()),
        loss_fn=lambda net, batch: sum(nn.functional.cross_entropy(out, batch[1]) for out in net(batch[0])),
        progress=False,
    )
    assert list(report.criteria) == names
    assert bool(report.before.isfinite().all())


def test_divergence_counts_every_output() -> None:
    module = exits()
    graph = ChannelGraph.from_model(module, X[:2])
    nowhere = nn.init.zeros_(module.network.backbone[8].weight)  # the last output no longer depends on any channel
    assert not nowhere.any()
    scores = importance(module, graph, "kl", [(X[:16], Y[:16])])
    assert all(bool((scores[f"network.backbone.{layer}"] > 0).any()) for layer in (0, 2))
    assert not scores["network.backbone.4"].any()
