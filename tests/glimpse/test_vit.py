"""The transformer for patches of any place and size, against torchvision's where the two are the same network."""

import copy
import pickle

import pytest
import torch
from jsonargparse import ArgumentParser
from torchvision.models import VisionTransformer

from lightning_eff.glimpse.backbones import ClassHead, ElasticViT, GlimpseBackbone, ImageDecoder, SegmentationHead
from lightning_eff.glimpse.config import GlimpseConfig, ViTSize
from lightning_eff.glimpse.crop import take_glimpse
from lightning_eff.glimpse.evaluation import count_flops
from lightning_eff.glimpse.geometry import views_of
from lightning_eff.glimpse.policies import RandomPolicy
from lightning_eff.glimpse.position import box_codes, cell_boxes
from lightning_eff.glimpse.tasks import ClassificationTask
from lightning_eff.glimpse.world import GlimpseWorld

TINY = ViTSize(16, 3, 2)
CONFIG = GlimpseConfig(32, patch_size=8)


def make(head=5, scene=32, channels=3, **options):
    torch.manual_seed(0)
    # branches that count from the start, or differences would drown
    return ElasticViT(head, scene, TINY, 8, channels, **{"layer_scale": 1.0, **options}).eval()


def some_images(count=4, scene=(32, 32), channels=3):
    return torch.rand(count, channels, *scene, generator=torch.Generator().manual_seed(1))


def look(backbone, images, glimpses, config=CONFIG, seed=0):
    generator = torch.Generator().manual_seed(seed)
    seen = backbone.begin(images, config.patch_size)
    for _ in range(glimpses):
        views = views_of(torch.rand(len(images), 3, generator=generator), config)
        seen = backbone.observe(seen, take_glimpse(images, views, config))
    return seen


def torchvisions():
    """A network of torchvision's with weights of ordinary size and the codes of its cells as positions."""
    torch.manual_seed(0)
    network = VisionTransformer(32, 8, TINY.depth, TINY.heads, TINY.dim, 4 * TINY.dim, num_classes=5).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
        network.encoder.pos_embedding[0, 1:] = box_codes(cell_boxes((32, 32), 8), TINY.dim, unit=8)
    return network


def whole_grid(backbone, images):
    """One glimpse that is the whole image, cut as a plain transformer cuts it."""
    config = GlimpseConfig(32, patch_size=8, grid=4)
    views = torch.tensor([[0.0, 0.0, 32.0]]).expand(len(images), -1)
    return backbone.observe(backbone.begin(images, 8), take_glimpse(images, views, config))


def test_on_the_plain_grid_it_is_torchvisions_network():
    network, backbone, images = torchvisions(), make(), some_images()
    assert backbone.load_vit_weights(network.state_dict()) == ["encoder.pos_embedding"]
    seen = whole_grid(backbone, images)
    expected = network(images)
    torch.testing.assert_close(backbone.predict(backbone.encode(seen), seen), expected, atol=1e-5, rtol=1e-5)
    assert expected.std(0).min() > 1e-2  # images are told apart


def test_weights_named_as_in_timm_are_taken():
    source, backbone = make(), make()
    with torch.no_grad():
        for weight in source.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    weights = {
        name.replace("patch_embed.", "patch_embed.proj.").replace("head.head.", "head."): tensor
        for name, tensor in source.state_dict().items()
    }
    weights["cls_token"] = weights["cls_token"].view(1, 1, -1)
    weights["pos_embed"] = torch.ones(1, 16, 16)  # 16 cells, none for the class token
    assert backbone.load_vit_weights(weights) == ["pos_embed"]
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), backbone.parameters(), strict=True))


def test_another_number_of_classes_keeps_its_own_head():
    backbone = make(head=7)
    before = backbone.head.head.weight.clone()
    left = backbone.load_vit_weights(torchvisions().state_dict())
    assert left == ["encoder.pos_embedding", "heads.head.weight", "heads.head.bias"]
    assert torch.equal(backbone.head.head.weight, before)


def test_weights_of_another_size_are_refused_and_nothing_is_taken():
    backbone = make(channels=1)
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(ValueError, match=r"patch_embed.weight of shape \[16, 1, 8, 8\], got \[16, 3, 8, 8\]"):
        backbone.load_vit_weights(torchvisions().state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        (5, (4, 5)),
        (ClassHead(5, pool="mean"), (4, 5)),
        (ImageDecoder(ViTSize(32, 2, 4)), (4, 3, 32, 32)),
        (SegmentationHead(6, ViTSize(32, 2, 4), 8), (4, 6, 32, 32)),
    ],
    ids=["class token", "mean", "image", "segmentation"],
)
@pytest.mark.parametrize("glimpses", [0, 1, 3])
def test_every_head_predicts_from_any_number_of_glimpses(head, shape, glimpses):
    backbone = make(copy.deepcopy(head))
    seen = look(backbone, some_images(), glimpses)
    encoded = backbone.encode(seen, importance=True)
    prediction = backbone.predict(encoded, seen)
    assert prediction.shape == shape
    assert prediction.isfinite().all()
    assert encoded.latents.shape == (4, 4 * glimpses, 16)
    assert encoded.importance.shape == (4, 4 * glimpses, 1)


@pytest.mark.parametrize("head", [ImageDecoder(ViTSize(32, 1, 4)), SegmentationHead(6, ViTSize(32, 1, 4), 8)])
@pytest.mark.parametrize("channels", [1, 4])
def test_scenes_need_not_be_square_nor_multiples_of_patches(head, channels):
    config = GlimpseConfig((30, 44), patch_size=8, grid=3)
    backbone = make(copy.deepcopy(head), (30, 44), channels)
    seen = look(backbone, some_images(2, (30, 44), channels), 2, config)
    prediction = backbone.predict(backbone.encode(seen), seen)
    assert prediction.shape == (2, 6 if isinstance(head, SegmentationHead) else channels, 30, 44)


@pytest.mark.parametrize("patch", [1, 6, 16, 32])
def test_segmentation_reaches_full_resolution_from_any_patch(patch):
    torch.manual_seed(0)
    backbone = ElasticViT(SegmentationHead(3, ViTSize(16, 1, 2), 4), 64, ViTSize(16, 1, 2), patch)
    seen = backbone.begin(torch.zeros(1, 3, 64, 64), patch)
    assert backbone.eval().predict(backbone.encode(seen), seen).shape == (1, 3, 64, 64)


def test_the_order_of_patches_changes_nothing():
    backbone = make(ImageDecoder(ViTSize(32, 2, 4)))
    seen = look(backbone, some_images(), 3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = type(seen)(seen.views, seen.patches[:, order], seen.boxes[:, order])
    one, other = backbone.encode(seen, importance=True), backbone.encode(shuffled, importance=True)
    torch.testing.assert_close(one.pooled, other.pooled, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.latents[:, order], other.latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(backbone.predict(one, seen), backbone.predict(other, shuffled), atol=1e-5, rtol=1e-4)


def test_place_and_size_of_a_patch_count():
    backbone = make()
    seen = look(backbone, some_images(), 1)
    moved, larger = seen.boxes.clone(), seen.boxes.clone()
    moved += 3
    larger[..., 2:] += 3
    results = [
        backbone.encode(type(seen)(seen.views, seen.patches, boxes)).pooled for boxes in (seen.boxes, moved, larger)
    ]
    assert not torch.allclose(results[0], results[1], atol=1e-4)
    assert not torch.allclose(results[0], results[2], atol=1e-4)


@pytest.mark.parametrize("kind", ["rollout", "rollout_softmax", "cls"])
def test_importance_is_a_share_of_each_patch(kind):
    backbone = make(importance=kind)
    seen = look(backbone, some_images(), 3)
    importance = backbone.encode(seen, importance=True).importance
    torch.testing.assert_close(importance.sum(1), torch.ones(4, 1))
    assert (importance >= 0).all()
    assert not importance.requires_grad


def test_after_a_softmax_importance_is_nearly_even():
    seen = look(make(), some_images(), 3)
    plain, soft = (
        make(importance=kind).encode(seen, importance=True).importance for kind in ("rollout", "rollout_softmax")
    )
    assert soft.std() < plain.std() / 5


def test_asking_for_importance_changes_nothing_else():
    backbone = make()
    seen = look(backbone, some_images(), 3)
    without, asked = backbone.encode(seen), backbone.encode(seen, importance=True)
    assert without.importance is None
    assert torch.equal(without.latents, asked.latents)
    assert make(importance="none").encode(seen, importance=True).importance is None
    assert [make(importance=kind).has_importance for kind in ("rollout", "none")] == [True, False]


def test_importance_of_the_last_block_is_what_its_class_token_attends_to():
    backbone = make(importance="cls")
    seen = look(backbone, some_images(), 2)
    inputs = []
    backbone.blocks[-1].attn.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    importance = backbone.encode(seen, importance=True).importance
    query, key, _ = backbone.blocks[-1].attn.qkv(inputs[0]).view(4, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    row = (query @ key.mT / 8**0.5).softmax(-1).mean(1)[:, 0, 1:]
    torch.testing.assert_close(importance[..., 0], row / row.sum(1, keepdim=True))


def test_gradients_reach_every_weight_of_encoder_and_decoder():
    backbone = make(ImageDecoder(ViTSize(32, 2, 4))).train()
    seen = look(backbone, some_images(), 2)
    backbone.predict(backbone.encode(seen, importance=True), seen).square().mean().backward()
    assert not [name for name, weight in backbone.named_parameters() if weight.grad is None or not weight.grad.any()]


def test_entropy_of_the_decoders_attention_lies_between_none_and_that_of_even_attention():
    backbone = make(ImageDecoder(ViTSize(32, 2, 4)))
    seen = look(backbone, some_images(), 2)
    encoded = backbone.encode(seen)
    entropy = backbone.head.cell_entropy(encoded.pooled, encoded.latents, seen.boxes)
    tokens = 1 + 8 + 16
    assert entropy.shape == (4, 4, 4)
    assert (entropy > 0).all()
    assert (entropy <= torch.tensor(tokens).log() + 1e-5).all()
    with torch.no_grad():
        # a last block that attends to everything evenly
        backbone.head.blocks[-1].attn.qkv.weight.zero_()
    entropy = backbone.head.cell_entropy(encoded.pooled, encoded.latents, seen.boxes)
    torch.testing.assert_close(entropy, torch.full((4, 4, 4), float(torch.tensor(tokens).log())))


def test_operations_are_those_of_its_layers():
    """Counted as the table of policies counts them: two glimpses encoded at the end, once, attention included."""
    config = GlimpseConfig(32, num_glimpses=2, patch_size=8, antialias=False)
    world = GlimpseWorld(make(), ClassificationTask(5), config)
    tokens, dim = 1 + 8, TINY.dim
    blocks = TINY.depth * (2 * tokens * 12 * dim**2 + 4 * tokens**2 * dim)
    embedding, head = 8 * 2 * 3 * 8 * 8 * dim, 2 * dim * 5
    assert count_flops(world, some_images(), RandomPolicy(config)) == blocks + embedding + head


def test_it_can_be_copied_and_pickled():
    backbone = make(ImageDecoder(ViTSize(32, 1, 4)))
    seen = look(backbone, some_images(), 2)
    expected = backbone.predict(backbone.encode(seen), seen)
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(other.predict(other.encode(seen), seen), expected)


def test_named_sizes_are_those_of_the_literature():
    assert ElasticViT(10, 32, "small", importance="none").size == ViTSize(384, 12, 6)
    with pytest.raises(ValueError, match="size must be one of small, base, large, or a ViTSize, got 'huge'"):
        ElasticViT(10, 32, "huge")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": 1}, "num_classes must be >= 2, got 1"),
        ({"channels": 0}, "patch_size and channels must be >= 1, got 8 and 0"),
        ({"importance": "gradient"}, "importance must be one of rollout, .*, got 'gradient'"),
        ({"discard_ratio": 1.0}, r"discard_ratio must lie in \[0, 1\), got 1.0"),
        ({"position_unit": 0.0}, "position_unit, .* must be > 0, got 0.0"),
        ({"position_temperature": -1.0}, "position_temperature .* must be > 0, got None, -1.0"),
        ({"layer_scale": 0.0}, "layer_scale must be > 0, got .* 0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("make_head", "message"),
    [
        (lambda: ClassHead(5, pool="max"), "pool must be 'token' or 'mean', got 'max'"),
        (lambda: SegmentationHead(1), "num_classes must be >= 2 and width >= 1, got 1 and 256"),
    ],
)
def test_heads_refuse_what_they_cannot_be(make_head, message):
    with pytest.raises(ValueError, match=message):
        make_head()


@pytest.mark.parametrize(("scene", "channels", "patch"), [((40, 32), 3, 8), ((32, 32), 1, 8), ((32, 32), 3, 16)])
def test_images_and_patches_of_another_size_are_refused_with_both(scene, channels, patch):
    with pytest.raises(ValueError, match=rf"= \[3, 32, 32, 8\], got \[{channels}, {scene[0]}, {scene[1]}, {patch}\]"):
        make().begin(some_images(1, scene, channels), patch)


@pytest.mark.parametrize(
    ("given", "head"),
    [
        ("5", ClassHead),
        (
            "{class_path: ImageDecoder, init_args: {size: {dim: 32, depth: 1, heads: 4}}}",
            ImageDecoder,
        ),
        (
            "{class_path: SegmentationHead, init_args: {num_classes: 4}}",
            SegmentationHead,
        ),
    ],
    ids=["classes", "image", "segmentation"],
)
# newer versions of jsonargparse have another name for it, older ones this one alone
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_yaml_builds_it_with_any_head(given, head):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(GlimpseBackbone, "backbone")
    text = f"""
backbone:
  class_path: lightning_eff.glimpse.backbones.ElasticViT
  init_args: {{image_size: [40, 56], patch_size: 8, size: {{dim: 16, depth: 1, heads: 2}}, head: {given}}}
"""
    backbone = parser.instantiate_classes(parser.parse_string(text)).backbone
    assert isinstance(backbone.head, head)
    assert (backbone.scene, backbone.size) == ((40, 56), ViTSize(16, 1, 2))
