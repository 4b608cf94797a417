"""Unmodified networks of torchvision agree with one backward pass a sample."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from agreement import assert_agrees, draw_selections, run
from per_sample_reference import loop_gradients
from torch import Tensor, nn
from torchvision import models

from lightning_eff.privacy.engine import PerSampleEngine

_swin = partial(models.SwinTransformer, [4, 4], 24, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=5)


def convnext() -> nn.Module:
    return models.ConvNeXt(
        [models.convnext.CNBlockConfig(8, 16, 2), models.convnext.CNBlockConfig(16, None, 1)], num_classes=5
    )


def swin_v2() -> nn.Module:
    return _swin(
        block=models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=models.swin_transformer.PatchMergingV2,
    )


NETWORKS = {
    "resnet": partial(models.resnet18, num_classes=5),
    "vision transformer": partial(models.VisionTransformer, 32, 8, 2, 2, 16, 32, num_classes=5),
    "swin": _swin,
    "swin v2": swin_v2,
    "convnext": convnext,
    "mobilenet v3": partial(models.mobilenet_v3_small, num_classes=5),
    "densenet": partial(models.DenseNet, 8, (2, 2), 16, num_classes=5),
}


def prepared(build: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    """Batch norm evaluates, with statistics that are not trivial; dropout drops nothing."""
    torch.manual_seed(0)
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, torch.randn(2, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("mobilenet v3", "swin"))) for name in NETWORKS]
)
def test_unmodified_network_has_the_gradients_of_single_passes(name: str) -> None:
    model, images = prepared(NETWORKS[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = loop_gradients(model, images, len(images))
    for selections in (None, draw_selections(model, "everything", 0.5)):
        assert_agrees(model, images, gradients, selections, rtol=1e-7)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_frozen_backbone_leaves_only_the_head() -> None:
    model, images = prepared(NETWORKS["resnet"])
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    gradients = loop_gradients(model, images, len(images))
    assert list(gradients) == ["fc.weight", "fc.bias"]
    assert_agrees(model, images, gradients, rtol=1e-9)


def test_float32_agrees_to_its_rounding() -> None:
    model, images = prepared(NETWORKS["vision transformer"])
    gradients = loop_gradients(model, images, len(images))
    exact = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    norms, _ = run(PerSampleEngine(model.float()), images.float(), len(images))
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["vision transformer", "swin v2"])
def test_bfloat16_autocast_has_norms_of_float32_that_bound_what_is_summed(name: str) -> None:
    model, images = prepared(NETWORKS[name])
    model, images = model.float(), images.float()
    with torch.autocast("cpu", torch.bfloat16):
        gradients = loop_gradients(model, images, len(images))
        engine = PerSampleEngine(model)
        norms, _ = run(engine, images, len(images))
        alone = [run(engine, images[i : i + 1], 1, max_norm=0.01)[1] for i in range(len(images))]
    expected = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, expected, rtol=0.05, atol=0)
    for sums in alone:
        assert all(total.dtype == torch.float32 for total in sums.values())
        assert float(torch.stack([total.square().sum() for total in sums.values()]).sum().sqrt()) <= 0.01 * (1 + 1e-5)
