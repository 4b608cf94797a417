"""Crops of boxes of any place and size, held against torchvision's one patch at a time."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2.functional import resized_crop

from lightning_eff.glimpse import crop
from lightning_eff.glimpse.config import GlimpseConfig
from lightning_eff.glimpse.crop import take_glimpse
from lightning_eff.glimpse.geometry import views_of


@pytest.fixture(scope="module")
def photographs():
    """Two photographs of 427 x 640 pixels, from 0 to 1."""
    images = np.stack(load_sample_images().images)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).contiguous()


@pytest.fixture(params=[False, True], ids=["all at once", "one by one"])
def method(request, monkeypatch):
    monkeypatch.setattr(crop, "_ALONE_PAYS", 0 if request.param else 10**12)


def one_by_one(images, glimpse, side, antialias):
    return torch.stack(
        [
            torch.stack(
                [resized_crop(image, y, x, b - y, r - x, [side, side], antialias=antialias) for y, x, b, r in boxes]
            )
            for image, boxes in zip(images, glimpse.boxes.int().tolist(), strict=True)
        ]
    )


def some_actions(count, seed=0):
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed))


# shrinking factors 1, 1.5, 2, 3.5 and 7 of patches of 16 pixels
@pytest.mark.parametrize("factor", [1, 1.5, 2, 3.5, 7])
@pytest.mark.usefixtures("method")
def test_antialiased_patches_are_torchvisions(photographs, factor):
    config = GlimpseConfig((427, 640))
    views = torch.tensor([[31.0, 200.0, 32 * factor], [100.0, 57.0, 32 * factor]])
    glimpse = take_glimpse(photographs, views, config)
    expected = one_by_one(photographs, glimpse, 16, antialias=True)
    torch.testing.assert_close(glimpse.patches, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("grid", [1, 2, 3])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.usefixtures("method")
def test_patches_of_any_view_are_torchvisions(photographs, grid, antialias):
    config = GlimpseConfig((427, 640), patch_size=8, grid=grid, antialias=antialias)
    images = photographs.repeat(8, 1, 1, 1)
    glimpse = take_glimpse(images, views_of(some_actions(16), config), config)
    expected = one_by_one(images, glimpse, 8, antialias)
    # views shrink up to 53 times; without antialiasing, places of up to 640 px are held in float32
    torch.testing.assert_close(glimpse.patches, expected, atol=5e-6 if antialias else 5e-5, rtol=0)


@pytest.mark.usefixtures("method")
def test_all_at_once_and_one_by_one_agree_on_views_of_no_whole_pixels():
    images = torch.rand(6, 2, 50, 70, generator=torch.Generator().manual_seed(0))
    config = GlimpseConfig((50, 70), patch_size=5, grid=3, quantize=False)
    views = views_of(some_actions(6), config)
    rows, columns = crop.patch_edges(views, config)
    down, across = crop.filter_weights(rows, 5, 50), crop.filter_weights(columns, 5, 70)
    expected = torch.einsum("bih,bchw,bjw->bcij", down, images, across)
    patches = take_glimpse(images, views, config).patches
    assembled = patches.view(6, 3, 3, 2, 5, 5).permute(0, 3, 1, 4, 2, 5).reshape(6, 2, 15, 15)
    torch.testing.assert_close(assembled, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("quantize", [True, False])
def test_a_slope_is_read_exactly_without_antialiasing(quantize):
    y, x = torch.meshgrid(torch.arange(60.0) + 0.5, torch.arange(80.0) + 0.5, indexing="ij")
    image = (2 * y - 3 * x + 7).expand(4, 1, -1, -1)
    config = GlimpseConfig((60, 80), patch_size=4, antialias=False, quantize=quantize)
    # away from the border, where there are no pixels to read between
    views = views_of(some_actions(4) * 0.8 + 0.1, config).clamp(max=45)
    glimpse = take_glimpse(image, views, config)
    place = (torch.arange(4) + 0.5) / 4
    y0, x0, y1, x1 = glimpse.boxes[..., None, None].unbind(2)
    expected = 2 * (y0 + (y1 - y0) * place[:, None]) - 3 * (x0 + (x1 - x0) * place) + 7
    torch.testing.assert_close(glimpse.patches[:, :, 0], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.usefixtures("method")
def test_an_even_image_stays_even(antialias, quantize):
    config = GlimpseConfig((40, 60), patch_size=3, grid=3, antialias=antialias, quantize=quantize)
    glimpse = take_glimpse(torch.full((64, 2, 40, 60), 0.7), views_of(some_actions(64), config), config)
    torch.testing.assert_close(glimpse.patches, torch.full((64, 9, 2, 3, 3), 0.7))


@pytest.mark.parametrize("antialias", [True, False])
def test_full_zoom_copies_pixels(antialias):
    images = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    glimpse = take_glimpse(
        images, torch.tensor([[3.0, 5, 8]] * 2), GlimpseConfig(20, patch_size=4, antialias=antialias)
    )
    torch.testing.assert_close(glimpse.patches[:, 1], images[..., 3:7, 9:13], atol=1e-6, rtol=0)


def test_nothing_from_outside_of_a_patch_enters_it():
    images = torch.zeros(1, 1, 64, 64)
    images[..., 20:41, 20:41] = 1
    inside = take_glimpse(images, torch.tensor([[20.0, 20.0, 21.0]]), GlimpseConfig(64, patch_size=8))
    torch.testing.assert_close(inside.patches, torch.ones(1, 4, 1, 8, 8))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_may_have_any_number_of_channels(channels):
    config = GlimpseConfig((40, 60), patch_size=8)
    images = torch.rand(3, channels, 40, 60, generator=torch.Generator().manual_seed(0))
    views = views_of(some_actions(3), config)
    patches = take_glimpse(images, views, config).patches
    assert patches.shape == (3, 4, channels, 8, 8)
    torch.testing.assert_close(patches[:, :, :1], take_glimpse(images[:, :1], views, config).patches)


def test_bytes_are_divided_by_255():
    config = GlimpseConfig(32, patch_size=8)
    images = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = views_of(some_actions(5), config)
    assert torch.equal(
        take_glimpse(images, views, config).patches, take_glimpse(images.float() / 255, views, config).patches
    )


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.usefixtures("method")
def test_gradients_reach_the_image_where_it_was_looked_at(antialias):
    config = GlimpseConfig(12, patch_size=2, antialias=antialias)
    images = torch.rand(1, 1, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    views = torch.tensor([[2.0, 4.0, 7.0]])
    assert torch.autograd.gradcheck(lambda image: take_glimpse(image, views, config).patches, images)
    (gradient,) = torch.autograd.grad(take_glimpse(images, views, config).patches.sum(), images)
    outside = gradient.clone()
    outside[..., 2:9, 4:11] = 0
    assert gradient.sum() == pytest.approx(16)
    assert not outside.any()


def test_half_precision_of_autocast_does_not_blur_pixels():
    config = GlimpseConfig(32, patch_size=8)
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    views = views_of(some_actions(2), config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        patches = take_glimpse(images, views, config).patches
    assert torch.equal(patches, take_glimpse(images, views, config).patches)


@pytest.mark.parametrize("shape", [(2, 1, 100, 96), (2, 1, 16, 16), (1, 96, 96)])
def test_images_of_another_size_are_refused_with_both_sizes(shape):
    with pytest.raises(ValueError, match=rf"\[B, C, 96, 96\], as image_size=96 says, got \[{shape[0]}, {shape[1]}"):
        take_glimpse(torch.zeros(shape), torch.zeros(shape[0], 3), GlimpseConfig(96, patch_size=8))


def test_a_view_an_image_is_asked_for():
    with pytest.raises(ValueError, match=r"views of shape \[2, 3\], one an image, got \[3, 3\]"):
        take_glimpse(torch.zeros(2, 1, 96, 96), torch.zeros(3, 3), GlimpseConfig(96, patch_size=8))
