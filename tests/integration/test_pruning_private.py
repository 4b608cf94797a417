"""Channels removed in, before and beside private training: what the ledger says, and what is refused before a step."""

from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from private_runs import private
from together import classifier, exits, images, loader, trainer, widths
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff import (
    Calibration,
    DirichletOptions,
    DirichletPruneCallback,
    DPPrePruneCallback,
    Layers,
    RandomChannelPruningCallback,
    Schedule,
    Search,
    ShapleyPruningCallback,
)
from lightning_eff.surgery import PruningPlan

pytestmark = pytest.mark.filterwarnings("ignore:the loss .* is that of guessing")

PUBLIC = {"calibration": Calibration(samples=16, loader=DataLoader(TensorDataset(*images(32, 7)), batch_size=16))}


def shapley(**options: Any) -> ShapleyPruningCallback:
    given = {"calibration": Calibration(samples=16), **options}
    return ShapleyPruningCallback(0.5, value="neg_loss", budget="4n", verbose=False, **given)


def dirichlet(**options: Any) -> DirichletPruneCallback:
    return DirichletPruneCallback(0.5, switches=DirichletOptions(lr=0.5), verbose=False, **options)


def random(**options: Any) -> RandomChannelPruningCallback:
    return RandomChannelPruningCallback(0.5, search=Search(candidates=3, top_k=1), verbose=False, **options)


REFUSED = (
    r"would choose or report by private training data, which epsilon of DPGradientDropStrategy does not cover: .*plan="
)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (shapley, {"calibration": Calibration(source="train")}),
        (shapley, {"calibration": Calibration(source="train"), "schedule": Schedule(physical="at_end")}),
        (shapley, {"calibration": Calibration(loader=loader())}),
        (dirichlet, {}),
        (random, {}),
    ],
)
def test_channels_are_not_chosen_by_private_training_data(make: Any, options: dict[str, Any]) -> None:
    strategy, module = private(), classifier()
    with pytest.raises(ValueError, match=f"{type(make()).__name__} {REFUSED}"):
        trainer(make(**options), strategy=strategy).fit(module, loader(), loader(24, 2))
    assert strategy.ledger.steps == 0
    assert widths(module) == [8, 8, 12, 3]


def test_training_data_that_stand_in_for_missing_validation_data_are_refused_too() -> None:
    module = classifier()
    module.validation_step = None  # type: ignore[assignment]
    with (
        pytest.warns(UserWarning, match="training data is used instead"),
        pytest.raises(ValueError, match=REFUSED),
    ):
        trainer(shapley(), strategy=private(), limit_val_batches=0).fit(module, loader())


@pytest.mark.parametrize("make", [shapley, dirichlet, random])
def test_a_cut_by_public_data_costs_nothing_and_the_run_stays_private(make: Any) -> None:
    plain, strategy, module = private(), private(drop_rate=0.3, granularity="row"), classifier()
    trainer(strategy=plain, max_epochs=2).fit(classifier(), loader(), loader(24, 2))
    trainer(make(schedule=Schedule(start=1), **PUBLIC), strategy=strategy, max_epochs=2).fit(
        module, loader(), loader(24, 2)
    )
    assert widths(module)[0] < 8
    assert strategy.epsilon == plain.epsilon
    assert strategy.ledger.steps == plain.ledger.steps == 6
    assert strategy.ledger.caveats == plain.ledger.caveats == []
    told = [one for one in strategy.ledger.assumptions if "chose during training which channels stay" in one]
    assert told == [
        f"{type(make()).__name__} chose during training which channels stay, on data that were given to it as public."
    ]


@pytest.mark.parametrize("physical", ["immediate", "at_end", "never"])
def test_a_cut_by_validation_data_is_a_caveat_also_where_channels_are_only_masked(physical: Any) -> None:
    strategy, module = private(), classifier()
    with pytest.warns(UserWarning, match="on validation data: what it looked at is not covered"):
        trainer(shapley(schedule=Schedule(physical=physical)), strategy=strategy).fit(module, loader(), loader(24, 2))
    (caveat,) = strategy.ledger.caveats
    assert "ShapleyPruningCallback chose during training which channels stay, on validation data" in caveat
    assert strategy.ledger.steps == 3


def test_a_plan_from_before_is_followed_in_private_training(tmp_path: Path) -> None:
    plan = PruningPlan({"net.0": [0, 1, 2]}, {"net.0": 8, "net.2": 8, "net.4": 12, "net.8": 3})
    plan.save(tmp_path / "plan.json")
    strategy, module = private(), classifier()
    trainer(shapley(plan=tmp_path / "plan.json"), strategy=strategy).fit(module, loader(), loader(24, 2))
    assert widths(module) == [3, 8, 12, 3]
    assert strategy.ledger.caveats == []
    assert any("by a plan that was made before" in one for one in strategy.ledger.assumptions)


def test_pruned_on_public_data_pre_pruned_and_trained_privately() -> None:
    module, strategy = classifier(), private()
    public = DataLoader(TensorDataset(*images(32, 7)), batch_size=16)
    trainer(shapley()).fit(module, public, loader(24, 2))
    masks = DPPrePruneCallback(0.5, score="snip", public_data=public)
    trainer(masks, strategy=strategy).fit(module, loader(), loader(24, 2))
    assert widths(module) == [4, 4, 6, 3]
    assert all(masks.masks[name].shape == dict(module.named_parameters())[name].shape for name in masks.masks)
    assert all(not dict(module.named_parameters())[name][~mask].any() for name, mask in masks.masks.items())
    assert strategy.ledger.caveats == []


@pytest.mark.parametrize("options", [{}, {"strategy": "private"}])
@pytest.mark.parametrize("physical", ["immediate", "at_end"])
def test_pre_pruning_beside_a_cut_is_refused_and_says_what_to_do(options: dict[str, Any], physical: Any) -> None:
    options = {"strategy": private()} if options else {}
    cut, module = shapley(schedule=Schedule(start=1, physical=physical)), classifier()
    with pytest.raises(ValueError, match="makes tensors smaller that DPPrePruneCallback has masks for: prune first"):
        trainer(DPPrePruneCallback(0.5), cut, **options).fit(module, loader(), loader(24, 2))


def test_pre_pruning_beside_masks_holds_both() -> None:
    module, masks = classifier(), DPPrePruneCallback(0.5)
    trainer(masks, shapley(schedule=Schedule(physical="never"))).fit(module, loader(), loader(24, 2))
    parameters = dict(module.named_parameters())
    assert all(not parameters[name][~mask].any() for name, mask in masks.masks.items())
    assert int((module.net[2].weight.flatten(2).abs().sum((0, 2)) == 0).sum()) >= 4  # half of what conv 0 makes is gone


@pytest.mark.parametrize("regime", ["mixed", "disjoint"])
def test_pre_pruned_coordinates_stay_out_when_exits_take_another_optimizer(regime: str) -> None:
    module, masks = exits(regime), DPPrePruneCallback(0.5)
    trainer(masks, max_epochs=2).fit(module, loader(), loader(24, 2))
    assert module.phase_index == 1
    parameters = dict(module.named_parameters())
    assert {name.split(".")[1] for name in masks.masks} == {"backbone"}
    assert all(not parameters[name][~mask].any() for name, mask in masks.masks.items())


def test_two_prunings_of_one_network_in_one_fit_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="ShapleyPruningCallback and DirichletPruneCallback prune the"):
        trainer(shapley(), dirichlet(schedule=Schedule(start=1))).fit(classifier(), loader(), loader(24, 2))
    with pytest.raises(MisconfigurationException, match="one fit after the other"):
        trainer(shapley(), random(layers=Layers(submodule="net"))).fit(classifier(), loader(), loader(24, 2))


def test_two_prunings_one_fit_after_the_other() -> None:
    module = classifier()
    trainer(shapley()).fit(module, loader(), loader(24, 2))
    trainer(second := dirichlet()).fit(module, loader(), loader(24, 2))
    assert widths(module) == [2, 2, 3, 3]
    assert second.plan is not None
    assert second.plan.sizes["net.0"] == 4


def test_exits_are_trained_privately_each_sample_by_itself() -> None:
    strategy, module = private(isolation_check="error"), exits("mixed")
    trainer(strategy=strategy, max_epochs=2).fit(module, loader(), loader(24, 2))
    assert strategy.ledger.steps == 6
    assert strategy.ledger.caveats == []
    assert any("checked on" in one for one in strategy.ledger.assumptions)


def test_exits_are_trained_privately_on_a_network_that_is_cut_on_the_way() -> None:
    strategy, module = private(drop_rate=0.3, granularity="row"), exits("disjoint")
    trainer(shapley(schedule=Schedule(start=1), **PUBLIC), strategy=strategy, max_epochs=2).fit(
        module, loader(), loader(24, 2)
    )
    assert widths(module.network) == [4, 4, 6, 3, 3, 3]
    assert strategy.ledger.steps == 6
    assert strategy.ledger.caveats == []
    assert module.network.costs == module.network.measure_costs(images()[0][:2])
