"""Mixtures of experts in networks that have exits, are pruned, are trained privately, or look at glimpses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from glimpse_runs import make_data, make_module, make_trainer
from private_runs import private
from together import classifier, images, loader, trainer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

from lightning_eff import Calibration, EarlyExitModule, ReplaceFFN, ShapleyPruningCallback, replace_ffn
from lightning_eff.glimpse import ElasticViT, ViTSize
from lightning_eff.moe import DecoderConfig, MoEScalingModule, RunRecorder
from lightning_eff.moe.layer import FineGrainedMoE
from lightning_eff.surgery import ChannelGraph, PruningGraphError

X, _ = images(channels=3)
EXPERTS = {"expansion_rate": 4, "granularity": 2}
EXIT = "encoder.layers.encoder_layer_0"


def vit() -> VisionTransformer:
    """Two blocks of width 16 on four patches, always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=3)
        nn.init.normal_(net.heads.head.weight)  # torchvision's begins at zero, where every answer is the same
        return net


def shapley() -> ShapleyPruningCallback:
    few = Calibration(samples=16)
    return ShapleyPruningCallback(0.5, value="neg_loss", calibration=few, budget="4n", verbose=False)


def exits(net: nn.Module, **options: Any) -> EarlyExitModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return EarlyExitModule(net, [EXIT], 3, "joint", thresholds=0.4, **options)


@pytest.mark.parametrize("given", [{}, {"example_input": X[:4]}])
def test_exits_leave_a_network_of_experts_as_all_outputs_say_and_costs_count_experts(given: dict[str, Any]) -> None:
    module = exits(vit(), **given)
    trainer(ReplaceFFN("network.backbone.encoder.layers.*.mlp", EXPERTS)).fit(
        module, loader(channels=3), loader(24, 2, channels=3)
    )
    assert sum(isinstance(layer, FineGrainedMoE) for layer in module.modules()) == 2
    answer = module.network.predict(X)
    with torch.no_grad():
        outputs = torch.stack(module.eval()(X))
    assert len(answer.exit_index.unique()) == 2
    assert torch.allclose(answer.logits, outputs[answer.exit_index, torch.arange(len(X))], atol=1e-5)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        module.network.backbone(X[:1])
    assert module.network.costs.base == counter.get_total_flops()


def test_experts_cannot_be_cut_and_the_message_says_prune_before() -> None:
    module = classifier(vit())
    replace_ffn(module, "net.encoder.layers.*.mlp", EXPERTS)
    with pytest.raises(PruningGraphError, match=r"mlp \(DropInMoE\) in it: the experts' .* Prune the dense net"):
        trainer(shapley()).fit(module, loader(channels=3), loader(24, 2, channels=3))
    with pytest.raises(PruningGraphError, match="DropInMoE"):
        ChannelGraph.from_model(module, X[:2])


def test_a_pruned_transformer_becomes_experts_that_compute_the_same() -> None:
    module = classifier(vit())
    trainer(shapley()).fit(module, loader(channels=3), loader(24, 2, channels=3))
    assert module.net.encoder.layers[0].mlp[0].out_features == 16
    before = module.eval()(X)
    replace_ffn(module, "net.encoder.layers.*.mlp", EXPERTS, init="upcycle")
    assert torch.allclose(module(X), before, atol=1e-4)  # logits of about 10


@pytest.mark.parametrize("routing", [{}, {"router": "expert_choice"}])
def test_experts_are_not_trained_privately(routing: dict[str, Any]) -> None:
    strategy = private()
    with pytest.raises(ValueError, match=r"\(DropInMoE\): an expert works on tokens of several samples .*upcycle"):
        trainer(ReplaceFFN("net.encoder.layers.*.mlp", {**EXPERTS, **routing}), strategy=strategy).fit(
            classifier(vit()), loader(channels=3), loader(24, 2, channels=3)
        )
    assert strategy.ledger.steps == 0


def test_a_scaling_module_of_experts_is_not_trained_privately_nor_cut(tmp_path: Path) -> None:
    tokens = torch.randint(16, (8, 9), generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=4)
    decoder = DecoderConfig(vocab_size=16, d_model=16, n_layers=1, n_heads=2, max_seq_len=8, moe=EXPERTS)
    with pytest.raises(ValueError, match=r"FineGrainedMoE\): an expert works on tokens of several samples"):
        trainer(strategy=private()).fit(MoEScalingModule(decoder), data, data)
    with pytest.raises(ValueError, match="there is nothing to prune in MoEScalingModule"):
        trainer(shapley()).fit(MoEScalingModule(decoder), data, data)
    with pytest.raises(
        ValueError, match=r"ShapleyPruningCallback changes the size of the network .* RunRecorder's row"
    ):
        trainer(shapley(), RunRecorder(tmp_path / "runs.csv")).fit(MoEScalingModule(decoder), data, data)


def test_a_privately_trained_network_becomes_experts_that_compute_the_same() -> None:
    strategy, module = private(), classifier(vit())
    trainer(strategy=strategy).fit(module, loader(channels=3), loader(24, 2, channels=3))
    before = module.eval()(X)
    replace_ffn(module, "net.encoder.layers.*.mlp", EXPERTS, init="upcycle")
    assert torch.allclose(module(X), before, atol=1e-4)  # logits of about 10


def test_a_head_on_frozen_experts_is_trained_privately_each_sample_by_itself() -> None:
    module = classifier(vit())
    replace_ffn(module, "net.encoder.layers.*.mlp", EXPERTS)
    module.requires_grad_(False)
    module.net.heads.requires_grad_(True)
    strategy = private(isolation_check="error")
    trainer(strategy=strategy).fit(module, loader(channels=3), loader(24, 2, channels=3))
    assert strategy.ledger.steps == 3
    assert strategy.ledger.caveats == []


@pytest.mark.slow
def test_a_backbone_of_experts_learns_to_explore(tmp_path: Path) -> None:
    backbone = ElasticViT(10, 32, ViTSize(16, 1, 2), patch_size=4, channels=1)
    module = make_module(backbone)
    put = ReplaceFFN("backbone.blocks.*.mlp", EXPERTS)
    run = make_trainer(tmp_path, max_epochs=2, callbacks=[put])
    run.fit(module, make_data(train_size=16))
    (layer,) = [one for one in module.modules() if isinstance(one, FineGrainedMoE)]
    assert put.names == ["backbone.blocks.0.mlp"]
    assert layer.w1 in run.optimizers[-1].state  # the backbone's optimizer has stepped it
