"""The brute force follows ``fill_in_fast`` of the published code (kujason/ip_basic), with scipy's filters."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from lightning_eff.lidar.completion.ip_basic import IPBasicCompletion

DIAMOND = np.array([[0, 0, 1, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0]], bool)
GAUSS = np.array([1, 4, 6, 4, 1]) / 16


def square(size: int) -> np.ndarray:
    return np.ones((size, size), bool)


def dilate(x: np.ndarray, footprint: np.ndarray) -> np.ndarray:
    return ndimage.grey_dilation(x, footprint=footprint, mode="constant", cval=-np.inf)


def bilateral(x: np.ndarray) -> np.ndarray:
    wide, out = np.pad(x, 2, mode="reflect"), np.zeros_like(x)
    for (i, j), here in np.ndenumerate(x):
        total = weights = 0.0
        for di in range(-2, 3):
            for dj in range(-2, 3):
                if di * di + dj * dj <= 4:
                    other = wide[i + 2 + di, j + 2 + dj]
                    weight = np.exp(-((other - here) ** 2) / (2 * 1.5**2) - (di * di + dj * dj) / (2 * 2.0**2))
                    total, weights = total + weight * other, weights + weight
        out[i, j] = total / weights
    return out


def brute_force(depth: np.ndarray, blur: str, extrapolate: bool) -> np.ndarray:
    x = np.where(depth > 0.1, 100 - depth, 0)
    x = dilate(x, DIAMOND)
    x = ndimage.grey_erosion(dilate(x, square(5)), footprint=square(5), mode="constant", cval=np.inf)
    x = np.where(x < 0.1, dilate(x, square(7)), x)
    if extrapolate:
        for column in x.T:
            top = np.argmax(column > 0.1)
            column[:top] = column[top]
        x = np.where(x < 0.1, dilate(x, square(31)), x)
    x = ndimage.median_filter(x, size=5, mode="nearest")
    if blur == "bilateral":
        x = bilateral(x)
    else:
        blurred = ndimage.correlate1d(ndimage.correlate1d(x, GAUSS, 0, mode="mirror"), GAUSS, 1, mode="mirror")
        x = np.where(x > 0.1, blurred, x)
    return np.where(x > 0.1, 100 - x, 0)


def scattered(height: int, width: int, share: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    depth = 2 + 70 * torch.rand(1, 1, height, width, generator=generator, dtype=torch.float64)
    return depth * (torch.rand(1, 1, height, width, generator=generator) < share)


@pytest.mark.parametrize("extrapolate", [True, False])
@pytest.mark.parametrize("blur", ["gaussian", "bilateral"])
@pytest.mark.parametrize("share", [0.004, 0.05, 0.5])
def test_completion_is_that_of_the_published_steps(blur, extrapolate, share):
    sparse = scattered(31, 44, share, seed=1)
    dense = IPBasicCompletion(blur, extrapolate)(None, sparse)
    expected = brute_force(sparse[0, 0].numpy(), blur, extrapolate)
    np.testing.assert_allclose(dense[0, 0].numpy(), expected, atol=1e-9)


def test_holes_stay_where_nothing_is_extrapolated():
    sparse = torch.zeros(1, 1, 40, 40)
    sparse[..., 20, 20] = 10.0
    dense = IPBasicCompletion(extrapolate=False)(None, sparse)
    assert (dense[..., 18:23, 18:23] > 0).all()
    assert (dense[..., :5, :] == 0).all()


def test_large_holes_are_filled_to_the_last_pixel():
    sparse = torch.zeros(1, 1, 200, 150)
    sparse[..., 3, 7] = 10.0
    assert torch.allclose(IPBasicCompletion()(None, sparse), torch.full_like(sparse, 10.0))


def test_the_nearer_of_two_points_wins_a_hole():
    sparse = torch.zeros(1, 1, 9, 9)
    sparse[..., 4, 3], sparse[..., 4, 5] = 40.0, 5.0
    assert IPBasicCompletion("bilateral")(None, sparse)[..., 4, 4] == pytest.approx(5.0, abs=1e-4)
    # one of sixteen parts comes from two columns to the left
    assert IPBasicCompletion("gaussian")(None, sparse)[..., 4, 4] == pytest.approx(5 + 35 / 16)


def test_images_of_a_batch_do_not_touch_and_an_empty_one_takes_the_depth_it_is_told():
    sparse = torch.cat([scattered(30, 40, share, seed=2) for share in (0.002, 0.0, 0.3)]).float()
    model = IPBasicCompletion(empty_depth=20.0)
    dense = model(None, sparse)
    assert (dense[1] == 20).all()
    assert torch.equal(dense, torch.cat([model(None, image[None]) for image in sparse]))


def test_depth_beyond_the_greatest_is_none():
    sparse = torch.full((1, 1, 8, 8), 120.0)
    assert (IPBasicCompletion(extrapolate=False)(None, sparse) == 0).all()
    assert IPBasicCompletion(extrapolate=False, max_depth=200)(None, sparse).mean() == pytest.approx(120)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="blur must be one of gaussian, bilateral, got 'median'"):
        IPBasicCompletion("median")
    with pytest.raises(ValueError, match=r"max_depth must be > 0\.1"):
        IPBasicCompletion(max_depth=0)
    with pytest.raises(ValueError, match=r"at least 3 x 3 pixels, got \[1, 1, 2, 9\]"):
        IPBasicCompletion()(None, torch.zeros(1, 1, 2, 9))
