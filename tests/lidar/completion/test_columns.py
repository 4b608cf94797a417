import itertools

import numpy as np
import pytest
import torch

from lightning_eff.lidar.completion.columns import ColumnInterpolation


def plane(height: int, width: int) -> torch.Tensor:
    """Depth of a slanted road: inverse depth is affine in image coordinates, 3.3 m to 60 m."""
    row, column = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    return (1 / (1 / 60 + 0.25 * row + 0.03 * column)).view(1, 1, height, width)


def numpy_completion(sparse: np.ndarray) -> np.ndarray:
    """Columns by ``numpy.interp``, then empty columns between their neighbours; ``[H, W]``."""
    inverse = np.full_like(sparse, np.nan)
    for column in range(sparse.shape[1]):
        rows = np.flatnonzero(sparse[:, column])
        if len(rows):
            inverse[:, column] = np.interp(np.arange(len(sparse)), rows, 1 / sparse[rows, column])
    full = np.flatnonzero(~np.isnan(inverse[0]))
    return 1 / np.stack([np.interp(np.arange(sparse.shape[1]), full, row[full]) for row in inverse])


def test_plane_is_exact_between_any_two_lines():
    depth = plane(24, 40)
    for first, last in itertools.combinations(range(0, 24, 5), 2):
        sparse = torch.zeros_like(depth)
        sparse[..., [first, last], :] = depth[..., [first, last], :]
        error = (ColumnInterpolation()(None, sparse) - depth)[..., first : last + 1, :].abs().max()
        assert error < 1e-3, (first, last)  # metres


def test_plane_is_exact_where_lines_hit_only_some_columns():
    depth = plane(24, 40)
    sparse = torch.zeros_like(depth)
    sparse[..., 2, ::3], sparse[..., 2, -1] = depth[..., 2, ::3], depth[..., 2, -1]
    sparse[..., 20, 1::4], sparse[..., 20, [0, -1]] = depth[..., 20, 1::4], depth[..., 20, [0, -1]]
    inside = slice(2, 21)
    assert (ColumnInterpolation()(None, sparse) - depth)[..., inside, :].abs().max() < 1e-3
    # not joined, most columns have one point alone
    assert (ColumnInterpolation(max_gap=1)(None, sparse) - depth)[..., inside, :].abs().max() > 1


def test_columns_are_those_of_numpy():
    generator = torch.Generator().manual_seed(0)
    sparse = 2 + 60 * torch.rand(17, 30, generator=generator, dtype=torch.float64)
    sparse *= torch.rand(17, 30, generator=generator) < 0.08
    assert (sparse == 0).all(0).any()  # an empty column is among them
    dense = ColumnInterpolation(max_gap=1)(None, sparse[None, None])
    np.testing.assert_allclose(dense[0, 0].numpy(), numpy_completion(sparse.numpy()), rtol=1e-12)


def test_points_of_a_row_are_joined_up_to_a_gap():
    sparse = torch.zeros(1, 1, 2, 12, dtype=torch.float64)
    sparse[..., 0, 0], sparse[..., 0, 4], sparse[..., 0, 9] = 2.0, 4.0, 10.0
    sparse[..., 1, :] = 20.0
    row = ColumnInterpolation(max_gap=4)(None, sparse)[0, 0, 0]
    expected = [2, 1 / (0.75 / 2 + 0.25 / 4), 1 / (0.5 / 2 + 0.5 / 4), 1 / (0.25 / 2 + 0.75 / 4), 4]
    torch.testing.assert_close(row[:5], torch.tensor(expected, dtype=torch.float64))
    assert (row[5:9] == 20).all()  # five apart: these columns have the lower row alone


def test_leaving_a_line_out_changes_nothing_beyond_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    lines = torch.arange(0, 40, 4)
    sparse = torch.zeros(1, 1, 40, 16)
    sparse[..., lines, :] = 2 + 60 * torch.rand(10, 16, generator=generator)
    without = sparse.clone()
    without[..., lines[5], :] = 0
    changed = (ColumnInterpolation()(None, sparse) != ColumnInterpolation()(None, without)).any(-1).flatten()
    assert changed.nonzero().flatten().tolist() == list(range(17, 24))


def test_measured_points_are_kept_and_an_empty_image_takes_the_depth_it_is_told():
    generator = torch.Generator().manual_seed(0)
    sparse = 2 + 60 * torch.rand(3, 1, 9, 14, generator=generator)
    sparse *= torch.rand(3, 1, 9, 14, generator=generator) < 0.2
    sparse[1] = 0
    model = ColumnInterpolation(empty_depth=20.0)
    dense = model(None, sparse)
    assert torch.equal(dense[sparse > 0], sparse[sparse > 0])
    assert torch.allclose(dense[1], torch.tensor(20.0))
    assert torch.equal(dense, torch.cat([model(None, image[None]) for image in sparse]))


def test_gradients_are_right():
    generator = torch.Generator().manual_seed(0)
    sparse = 2 + 60 * torch.rand(1, 1, 4, 5, generator=generator, dtype=torch.float64)
    known = torch.rand(1, 1, 4, 5, generator=generator) < 0.5
    sparse *= known
    model = ColumnInterpolation()
    assert torch.autograd.gradcheck(lambda depth: model(None, torch.where(known, depth, 0)), sparse.requires_grad_())


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="max_gap must be a whole number >= 1, got 0"):
        ColumnInterpolation(max_gap=0)
