"""The canvas: what is painted, over what, and what is predicted from it."""

import pytest
import torch
from torch.nn import functional as F

from lightning_eff.glimpse.backbones import CanvasBackbone, Glimpse
from lightning_eff.glimpse.backbones.canvas import assembled
from lightning_eff.glimpse.config import GlimpseConfig
from lightning_eff.glimpse.crop import take_glimpse
from lightning_eff.glimpse.geometry import patch_boxes, views_of

CONFIG = GlimpseConfig(64, patch_size=8)


def some_images(count=4, channels=1, side=64, seed=0):
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def even_glimpse(view, value, config=CONFIG):
    """A glimpse that shows one value everywhere."""
    views = torch.tensor([view], dtype=torch.float32)
    side = config.patch_size
    patches = torch.full((1, config.patches_per_glimpse, 1, side, side), float(value))
    return Glimpse(views, patches, patch_boxes(views, config))


def painted(*glimpses):
    backbone = CanvasBackbone()
    seen = backbone.begin(torch.zeros(1, 1, 64, 64), 8)
    for glimpse in glimpses:
        seen = backbone.observe(seen, glimpse)
    return backbone.predict(backbone.encode(seen), seen)[0, 0]


def test_a_full_view_at_full_resolution_is_the_image():
    config = GlimpseConfig(32, patch_size=16)
    images = some_images(channels=3, side=32)
    backbone = CanvasBackbone(3)
    seen = backbone.observe(
        backbone.begin(images, 16), take_glimpse(images, views_of(torch.zeros(4, 3), config), config)
    )
    torch.testing.assert_close(backbone.predict(backbone.encode(seen), seen), images, atol=1e-6, rtol=0)


def test_nothing_seen_is_the_fill():
    backbone = CanvasBackbone(fill=0.25)
    seen = backbone.begin(some_images(), 8)
    assert torch.equal(backbone.predict(backbone.encode(seen), seen), torch.full((4, 1, 64, 64), 0.25))


def test_a_glimpse_is_painted_into_its_view_and_nowhere_else():
    canvas = painted(even_glimpse([10, 20, 30], 1))
    expected = torch.zeros(64, 64)
    expected[10:40, 20:50] = 1
    torch.testing.assert_close(canvas, expected)


def test_a_finer_glimpse_wins_and_a_coarser_one_never_overwrites_it():
    fine, coarse = even_glimpse([0, 0, 20], 1), even_glimpse([0, 0, 40], 2)
    expected = torch.zeros(64, 64)
    expected[:40, :40] = 2
    expected[:20, :20] = 1
    torch.testing.assert_close(painted(coarse, fine), expected)
    torch.testing.assert_close(painted(fine, coarse), expected)


def test_of_two_equally_fine_glimpses_the_newer_one_is_seen():
    canvas = painted(even_glimpse([0, 0, 40], 1), even_glimpse([20, 20, 40], 2))
    assert (canvas[19, 19], canvas[20, 20], canvas[59, 59]) == (1, 2, 2)


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_painting_is_reading_each_patch_between_its_pixels(grid):
    """Against grid_sample of the whole glimpse, on views whose patches are of equal size."""
    config = GlimpseConfig(48, patch_size=4, grid=grid)
    images = some_images(2, 2, 48)
    side = 6 * 4 * grid / 2
    views = torch.tensor([[3.0, 7.0, side], [10.0, 0.0, side]])
    glimpse = take_glimpse(images, views, config)
    backbone = CanvasBackbone(2)
    canvas = backbone.encode(backbone.observe(backbone.begin(images, 4), glimpse)).pooled
    for image, (y, x, d), picture in zip(canvas, views.int().tolist(), assembled(glimpse)[0], strict=True):
        place = (torch.arange(d) + 0.5) / d * 2 - 1
        where = torch.stack(torch.meshgrid(place, place, indexing="xy"), dim=-1).unsqueeze(0)
        expected = F.grid_sample(picture.unsqueeze(0), where, padding_mode="border", align_corners=False)[0]
        torch.testing.assert_close(image[:, y : y + d, x : x + d], expected, atol=1e-5, rtol=0)


def test_patches_of_unequal_size_are_painted_where_they_were_taken():
    # 51 px are patches of 25 and 26 px: each shows its own value up to its own border
    views = torch.tensor([[0.0, 0.0, 51.0]])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    patches = values.view(1, 4, 1, 1, 1).expand(-1, -1, -1, 8, 8)
    glimpse = Glimpse(views, patches, patch_boxes(views, CONFIG))
    canvas = painted(glimpse)
    # bilinear reading mixes neighbours within half a camera pixel, 1.6 px, of the border
    assert canvas[10, 22] == pytest.approx(1)
    assert canvas[10, 27] == pytest.approx(2)
    assert canvas[24, 5] == pytest.approx(1.5, abs=0.25)
    assert canvas[50, 50] == pytest.approx(4)
    assert canvas[51, 51] == 0


def test_views_of_no_whole_pixels_are_painted_where_pixel_centres_lie_in_them():
    config = GlimpseConfig(64, patch_size=8, quantize=False)
    canvas = painted(even_glimpse([10.6, 20.4, 20.0], 1, config))
    rows, columns = canvas.nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (11, 30, 20, 39)


def test_what_was_seen_before_is_left_alone():
    backbone = CanvasBackbone()
    images = some_images()
    first = backbone.begin(images, 8)
    before = first.memory.clone()
    backbone.observe(first, take_glimpse(images, torch.tensor([[0.0, 0.0, 64.0]] * 4), CONFIG))
    assert torch.equal(first.memory, before)
    assert first.boxes.shape == (4, 0, 4)


def test_patches_and_boxes_are_kept_in_the_order_they_were_seen():
    images = some_images()
    backbone = CanvasBackbone()
    seen = backbone.begin(images, 8)
    glimpses = [take_glimpse(images, torch.tensor([[float(n), 0.0, 32.0]] * 4), CONFIG) for n in range(3)]
    for glimpse in glimpses:
        seen = backbone.observe(seen, glimpse)
    assert torch.equal(seen.patches, torch.cat([glimpse.patches for glimpse in glimpses], 1))
    assert torch.equal(seen.views[:, :, 0], torch.tensor([[0.0, 1.0, 2.0]] * 4))


def test_the_canvas_itself_needs_no_weights():
    assert not list(CanvasBackbone(3).parameters())


def same_canvas_at_two_scales():
    images = torch.zeros(2, 1, 64, 64)
    views = torch.tensor([[0.0, 0.0, 64.0], [0.0, 0.0, 32.0]])
    return images, take_glimpse(images, views, CONFIG)


def test_logits_depend_on_the_scale_of_what_is_shown_once_that_is_learnt():
    torch.manual_seed(0)
    backbone = CanvasBackbone(1, 10)
    images, glimpse = same_canvas_at_two_scales()
    seen = backbone.observe(backbone.begin(images, 8), glimpse)
    logits = backbone.predict(backbone.encode(seen), seen)
    assert logits.shape == (2, 10)
    assert torch.allclose(logits[0], logits[1])  # at first only the picture counts
    optimizer = torch.optim.SGD(backbone.parameters(), 0.1)
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    optimizer.step()
    backbone.eval()
    logits = backbone.predict(backbone.encode(seen), seen)
    assert not torch.allclose(logits[0], logits[1])


def test_logits_without_any_glimpse_are_finite():
    torch.manual_seed(0)
    backbone = CanvasBackbone(1, 10).eval()
    seen = backbone.begin(some_images(), 8)
    assert backbone.predict(backbone.encode(seen), seen).isfinite().all()


def test_gradients_reach_every_weight():
    torch.manual_seed(0)
    backbone = CanvasBackbone(1, 10)
    images = some_images()
    seen = backbone.observe(
        backbone.begin(images, 8), take_glimpse(images, torch.tensor([[0.0, 0.0, 64.0]] * 4), CONFIG)
    )
    backbone.predict(backbone.encode(seen), seen).square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in backbone.parameters())


def test_half_precision_of_autocast_does_not_blur_the_canvas():
    images = some_images()
    backbone = CanvasBackbone()
    glimpse = take_glimpse(images, torch.tensor([[0.0, 0.0, 50.0]] * 4), CONFIG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = backbone.observe(backbone.begin(images, 8), glimpse).memory
    assert torch.equal(inside, backbone.observe(backbone.begin(images, 8), glimpse).memory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be a whole number >= 1, got 0"),
        ({"channels": 1.5}, "channels must be a whole number >= 1, got 1.5"),
        ({"num_classes": 10, "widths": (8, 8, 0, 8)}, "each of widths must be a whole number >= 1, got 0"),
        ({"num_classes": 1}, "num_classes must be a whole number >= 2, got 1"),
        ({"fill": float("nan")}, "fill must be a number, got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CanvasBackbone(**arguments)


def test_images_of_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"made for 1 channels, got images \[4, 3, 64, 64\]"):
        CanvasBackbone().begin(some_images(channels=3), 8)
