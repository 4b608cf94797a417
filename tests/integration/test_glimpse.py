"""Backbones that look at glimpses: cut before they explore, with exits outside of exploring, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from glimpse_runs import make_backbone, make_data, make_module, make_trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from private_runs import private
from together import masked, same_state
from torch import Tensor, nn

from lightning_eff import AdaGlimpseModule, DirichletPruneCallback, EarlyExitModule, Layers, ShapleyPruningCallback
from lightning_eff.early_exit.inference.leaving import select_from_all
from lightning_eff.glimpse import ClassificationTask, ElasticViT, ViTSize
from lightning_eff.glimpse.backbones.base import Glimpse, GlimpseBackbone
from lightning_eff.models import ImageClassifier
from lightning_eff.pruning.criteria import importance
from lightning_eff.surgery import ChannelGraph, PruningPlan, apply_plan

pytestmark = pytest.mark.filterwarnings("ignore:backbone_optimizer. not plain data")

IMAGES = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))
PATCH = 4


class Whole(nn.Module):
    """A backbone as a network of whole images: it is shown all of their patches, in full resolution, as one glimpse."""

    def __init__(self, backbone: GlimpseBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, side, _ = images.shape
        grid = side // PATCH
        patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5)
        y, x = (torch.arange(grid) * PATCH).repeat_interleave(grid), (torch.arange(grid) * PATCH).repeat(grid)
        boxes = torch.stack([y, x, y + PATCH, x + PATCH], 1).float().expand(batch, -1, -1)
        view = torch.tensor([0.0, 0.0, float(side)]).expand(batch, -1)
        patches = patches.reshape(batch, grid * grid, channels, PATCH, PATCH)
        seen = self.backbone.observe(self.backbone.begin(images, PATCH), Glimpse(view, patches, boxes))
        return self.backbone.predict(self.backbone.encode(seen), seen)


def canvas() -> GlimpseBackbone:
    torch.manual_seed(0)
    return make_backbone()


def vit() -> GlimpseBackbone:
    torch.manual_seed(0)
    return ElasticViT(10, 32, ViTSize(16, 1, 2), patch_size=PATCH, channels=1)


@pytest.mark.parametrize("make", [canvas, vit])
def test_a_backbone_that_was_cut_explores_and_its_checkpoint_loads(make: Any, tmp_path: Path) -> None:
    whole = Whole(make())
    graph = ChannelGraph.from_model(whole, IMAGES[:2])
    best = importance(whole, graph, "shapley" if make is canvas else "l1", _batches())
    keep = {name: scores.topk(len(scores) // 2).indices.sort().values.tolist() for name, scores in best.items()}
    plan = PruningPlan(keep, graph.sizes)
    expected = masked(whole, graph, plan, IMAGES)
    apply_plan(whole, plan, IMAGES[:2], graph=graph)
    assert torch.allclose(whole(IMAGES), expected, atol=1e-5)
    module, run = make_module(whole.backbone.train()), make_trainer(tmp_path)
    run.fit(module, make_data(train_size=16))
    run.save_checkpoint(tmp_path / "cut.ckpt", weights_only=True)
    loaded = AdaGlimpseModule.load_from_checkpoint(
        tmp_path / "cut.ckpt", backbone=make(), task=ClassificationTask(10), weights_only=True
    )
    assert same_state(loaded, module)
    assert torch.equal(loaded.eval()(IMAGES), module.eval()(IMAGES))


def _batches() -> list[tuple[Tensor, Tensor]]:
    return [(IMAGES, torch.arange(6))]


@pytest.mark.parametrize("layers", [Layers(), Layers(submodule="backbone")])
@pytest.mark.parametrize("callback", [ShapleyPruningCallback, DirichletPruneCallback])
def test_a_backbone_is_not_cut_while_it_explores(callback: Any, layers: Layers, tmp_path: Path) -> None:
    run = make_trainer(tmp_path, callbacks=[callback(0.5, layers=layers, verbose=False)])
    with pytest.raises(
        MisconfigurationException,
        match=f"{callback.__name__} in a fit of AdaGlimpseModule: its backbone is called with glimpses.*before",
    ):
        run.fit(make_module(), make_data())


def test_exploring_is_not_trained_privately(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"DPGradientDropStrategy in a fit of AdaGlimpseModule: the agent .* privately"
    ):
        make_trainer(tmp_path, strategy=private()).fit(make_module(), make_data())


@pytest.mark.parametrize("make", [canvas, vit])
def test_exits_stand_on_a_backbone_that_sees_whole_images(make: Any) -> None:
    name = "backbone.features.1" if make is canvas else "backbone.blocks.0"
    torch.manual_seed(1)
    module = EarlyExitModule(Whole(make()), [name], 10, "joint", thresholds=0.105, example_input=IMAGES[:2])
    answer = module.network.predict(IMAGES)
    with torch.no_grad():
        expected = select_from_all(module.network.rule, module.eval()(IMAGES))
    assert torch.equal(answer.exit_index, expected.exit_index)
    assert torch.allclose(answer.logits, expected.logits, atol=1e-5)


@pytest.mark.slow
def test_a_backbone_is_trained_privately_before_it_explores(tmp_path: Path) -> None:
    strategy, whole = private(), Whole(vit())
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, torch.arange(6)), batch_size=3)
    make_trainer(tmp_path, strategy=strategy).fit(ImageClassifier(whole), batches, batches)
    assert strategy.ledger.steps == 2
    make_trainer(tmp_path).fit(make_module(whole.backbone), make_data(train_size=16))
    assert strategy.ledger.steps == 2
