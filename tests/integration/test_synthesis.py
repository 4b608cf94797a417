"""Data that a private release gave: public for whoever prunes, pre-prunes or trains, and a generator that is cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from private_runs import private
from together import classifier, exits, first_half, images, loader, masked, same_state, trainer, widths
from torch.utils.data import DataLoader

from lightning_eff import (
    Calibration,
    DirichletOptions,
    DirichletPruneCallback,
    DPNTKGenerator,
    DPPrePruneCallback,
    ShapleyPruningCallback,
    load_pruned,
)
from lightning_eff.surgery import ChannelGraph, apply_plan
from lightning_eff.synthesis import MLPGenerator

pytestmark = [
    pytest.mark.filterwarnings("ignore:the loss .* is that of guessing"),
    pytest.mark.filterwarnings("ignore:.*the switches of all channels are equal"),
]


def generator_net() -> MLPGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLPGenerator(3, 3, (1, 8, 8), (16, 12))


@pytest.fixture(scope="module")
def generator() -> DPNTKGenerator:
    """Trained on a release of the images that the classifiers train on privately."""
    module = DPNTKGenerator(
        100.0,  # of so few records a release of a smaller one tells nothing
        num_classes=3,
        input_shape=(1, 8, 8),
        feature_widths=(8,),
        latent_dim=3,
        samples_per_class=4,
        steps_per_epoch=4,
        generator=generator_net(),
    )
    x, y = images()
    trainer().fit(module, DataLoader(list(zip(x.sigmoid(), y, strict=True)), batch_size=16))
    return module


def batches(generator: DPNTKGenerator) -> DataLoader[Any]:
    return DataLoader(generator.generate(32, seed=0).as_dataset(), batch_size=16)


@pytest.mark.parametrize("callback", [ShapleyPruningCallback, DirichletPruneCallback])
def test_synthetic_data_judge_channels_in_private_training_and_cost_nothing_more(
    generator: DPNTKGenerator, callback: Any
) -> None:
    strategy, module = private(), classifier()
    options = {"switches": DirichletOptions(lr=0.5)} if callback is DirichletPruneCallback else {"budget": "4n"}
    pruning = callback(
        0.5, calibration=Calibration(samples=16, loader=batches(generator)), value="neg_loss", verbose=False, **options
    )
    plain = private()
    trainer(strategy=plain).fit(classifier(), loader(), loader(24, 2))
    trainer(pruning, strategy=strategy).fit(module, loader(), loader(24, 2))
    assert widths(module) == [4, 4, 6, 3]
    assert strategy.ledger.caveats == []
    assert strategy.epsilon == plain.epsilon
    assert generator.ledger.steps == 1


def test_synthetic_data_are_the_public_data_of_pre_pruning(generator: DPNTKGenerator) -> None:
    strategy, module = private(), classifier()
    masks = DPPrePruneCallback(0.5, score="snip", public_data=generator.generate(32, seed=0).as_dataset())
    trainer(masks, strategy=strategy).fit(module, loader(), loader(24, 2))
    parameters = dict(module.named_parameters())
    assert masks.masks
    assert all(not parameters[name][~mask].any() for name, mask in masks.masks.items())
    assert strategy.ledger.caveats == []


def test_classifiers_of_synthetic_data_are_cut_and_have_exits(generator: DPNTKGenerator) -> None:
    module = exits()
    pruning = ShapleyPruningCallback(
        0.5, value="neg_loss", calibration=Calibration(samples=16), budget="4n", verbose=False
    )
    trainer(pruning).fit(module, batches(generator), batches(generator))
    assert widths(module.network) == [4, 4, 6, 3, 3, 3]
    run = trainer()
    run.test(module, loader(), verbose=False)
    assert 0 <= float(run.callback_metrics["test/accuracy"]) <= 1
    assert generator.ledger.steps == 1


def test_a_generator_is_cut_and_trained_on_without_looking_at_the_data(
    generator: DPNTKGenerator, tmp_path: Path
) -> None:
    net = generator.generator
    example = torch.randn(8, 3), torch.arange(8) % 3
    graph = ChannelGraph.from_model(net, example)
    plan = first_half(graph)
    expected = masked(net, graph, plan, example)
    before, epsilon = generator.steps_trained, generator.ledger.epsilon()
    apply_plan(net, plan, example, graph=graph)
    assert widths(net) == [8, 6, 64]
    with torch.no_grad():
        assert torch.allclose(net.eval()(*example), expected, atol=1e-6)
    run = trainer(max_epochs=2)
    run.fit(generator.train())
    assert generator.steps_trained > before
    assert generator.ledger.steps == 1
    assert generator.ledger.epsilon() == epsilon
    run.save_checkpoint(tmp_path / "cut.ckpt", weights_only=True)
    loaded = load_pruned(DPNTKGenerator, tmp_path / "cut.ckpt", generator=generator_net())
    assert same_state(loaded, generator)
    assert torch.equal(loaded.generate(4, seed=1).x, generator.generate(4, seed=1).x)


def test_a_generator_is_not_cut_by_a_callback_nor_trained_privately_once_more() -> None:
    module = DPNTKGenerator(1.0, num_classes=3, input_shape=(1, 8, 8))
    with pytest.raises(MisconfigurationException, match=r"in a fit of DPNTKGenerator: .* with apply_plan"):
        trainer(ShapleyPruningCallback(0.5, verbose=False)).fit(module, loader())
    with pytest.raises(ValueError, match="in a fit of DPNTKGenerator: its release is private already"):
        trainer(strategy=private()).fit(module, loader())
    assert module.ledger.steps == 0
