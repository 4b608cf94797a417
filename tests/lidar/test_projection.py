"""Points to pixels and back, with the counts known of KITTI's two frames."""

import math
from types import SimpleNamespace

import pytest
import torch

from lightning_eff.lidar.batches import BottomCrop
from lightning_eff.lidar.files import read_calibration, read_depth_png, read_image, read_velodyne, write_depth_png
from lightning_eff.lidar.lines import LidarWarning, assign_lines
from lightning_eff.lidar.projection import (
    Calibration,
    back_project,
    depth_lines,
    in_image,
    nearest_pixels,
    project_points,
    rasterize,
)
from lightning_eff.lidar.synthetic import SyntheticLidarDataset, synthetic_calibration


def load(folder, frame):
    points = read_velodyne(folder / f"{frame}.bin")
    calibration = read_calibration(folder / f"{frame}.txt")
    size = tuple(read_image(folder / f"{frame}.png").shape[1:])
    pixels, depth = project_points(points, calibration)
    lines = assign_lines(points, "scan_order").lines
    sparse, line_idx = rasterize(pixels, depth, lines, size)
    return SimpleNamespace(**locals())


@pytest.fixture(scope="module", params=["000000", "000001"])
def frame(request, kitti):
    return load(kitti, request.param)


COUNTS = {
    "000000": ((370, 1224), 20_259, 20_209, 11.630, [443, 451, 169], 20_130),
    "000001": ((375, 1242), 18_608, 18_600, 16.546, [241, 478, 161], 18_328),
}


def test_kitti_frames_have_the_known_pixels(frame):
    size, points, pixels, mean, of_lines, cropped = COUNTS[frame.frame]
    assert frame.size == size
    assert in_image(nearest_pixels(frame.pixels), frame.depth, size).sum() == points
    valid = frame.sparse > 0
    assert valid.sum() == pixels
    assert frame.sparse[valid].mean() == pytest.approx(mean, abs=5e-4)
    assert [(frame.line_idx == line).sum().item() for line in (0, 20, 45)] == of_lines
    assert (BottomCrop()({"sparse": frame.sparse})["sparse"] > 0).sum() == cropped


def test_only_lines_0_to_45_reach_the_image_in_kitti(frame):
    seen = frame.line_idx[frame.sparse > 0].unique()
    assert seen.tolist() == list(range(46))
    assert torch.equal(frame.line_idx == 255, frame.sparse == 0)


def test_floor_gives_the_known_pixels_too(kitti):
    frame = load(kitti, "000001")
    sparse, _ = rasterize(frame.pixels, frame.depth, frame.lines, frame.size, rounding="floor")
    assert in_image(nearest_pixels(frame.pixels, "floor"), frame.depth, frame.size).sum() == 18_630
    assert (sparse > 0).sum() == 18_609


def test_official_bins_leave_some_of_the_image_without_line_in_kitti(frame):
    official = assign_lines(frame.points, "official").lines
    inside = in_image(nearest_pixels(frame.pixels), frame.depth, frame.size)
    assert 0.025 <= (official[inside] == 255).float().mean() <= 0.08


def test_lines_are_found_from_the_depth_image_alone(frame, tmp_path):
    depth = read_depth_png(write_depth_png(tmp_path / "depth.png", frame.sparse))
    line_idx, found = depth_lines(depth, frame.calibration)
    assert (line_idx == frame.line_idx)[frame.sparse > 0].float().mean() >= 0.999
    assert torch.equal(line_idx == 255, depth == 0)
    assert found.median_residual < 0.03  # degrees; half a pixel is 0.04


@pytest.mark.parametrize("wrong", ["crop", "camera"])
def test_lines_found_with_the_wrong_calibration_are_reported(frame, kitti, wrong):
    other = frame.calibration.cropped(23, 13)
    if wrong == "camera":
        other = read_calibration(kitti / f"{frame.frame}.txt", camera=3)
    with pytest.warns(LidarWarning, match="from another camera than the calibration's"):
        line_idx, _ = depth_lines(frame.sparse, other)
    assert (line_idx == frame.line_idx)[frame.sparse > 0].float().mean() < 0.9


def test_lines_are_found_from_a_cropped_and_rounded_synthetic_depth_image():
    sample = SyntheticLidarDataset(1, scale=1)[0]
    depth = (sample["sparse"] * 256).round() / 256
    line_idx, _ = depth_lines(depth, synthetic_calibration())
    # rays at the edge of two lines in one pixel are rounded towards each other
    assert (line_idx == sample["line_idx"]).float().mean() > 0.9999


def camera(focal=100.0, center=(10.0, 5.0), offset=(0.3, -0.2, 0.01)):
    projection = torch.tensor([[focal, 0, center[0], 0], [0, focal, center[1], 0], [0, 0, 1, 0]])
    projection = projection.double()
    projection[:, 3] = torch.tensor(offset)
    turn = 0.02
    to_camera = torch.tensor([[0, -1, 0, 0.1], [0, 0, -1, -0.2], [1, 0, 0, 0.3], [0, 0, 0, 1]], dtype=torch.float64)
    pitch = torch.eye(4, dtype=torch.float64)
    pitch[1, 1] = pitch[2, 2] = math.cos(turn)
    pitch[1, 2], pitch[2, 1] = -math.sin(turn), math.sin(turn)
    return Calibration(projection, pitch @ to_camera)


def test_back_projection_undoes_projection():
    depth = torch.zeros(1, 20, 40)
    depth[0, ::3, ::5] = torch.rand(7, 8, generator=torch.Generator().manual_seed(0)) * 50 + 1
    points, where = back_project(depth, camera())
    pixels, w = project_points(points, camera())
    rows, columns = where.nonzero(as_tuple=True)
    torch.testing.assert_close(pixels, torch.stack([columns, rows], 1).double())
    torch.testing.assert_close(w.float(), depth[0][where])


def test_nearest_point_wins_a_pixel():
    pixels = torch.tensor([[2.4, 1.0], [1.6, 1.4], [2.0, 0.6], [0.0, 0.0]])
    sparse, lines = rasterize(pixels, torch.tensor([5.0, 3.0, 4.0, 9.0]), torch.tensor([7, 8, 9, 1]).byte(), (3, 4))
    assert (sparse[0, 1, 2], lines[0, 1, 2]) == (3, 8)
    assert (sparse[0, 0, 0], lines[0, 0, 0]) == (9, 1)
    assert (sparse > 0).sum() == (lines != 255).sum() == 2


def test_points_behind_the_camera_or_beside_the_image_leave_no_pixel():
    pixels = torch.tensor([[1.0, 1.0], [-0.6, 0.0], [3.6, 0.0], [0.0, 2.51]])
    sparse, lines = rasterize(pixels, torch.tensor([-5.0, 3.0, 4.0, 9.0]), torch.zeros(4).byte(), (3, 4))
    assert (sparse.shape, sparse.any(), lines.unique().tolist()) == ((1, 3, 4), False, [255])


def test_crop_of_the_calibration_shifts_pixels():
    points = torch.tensor([[10.0, 1.0, 0.5], [20.0, -3.0, 1.0]])
    whole, _ = project_points(points, camera())
    window, _ = project_points(points, camera().cropped(top=4, left=7))
    torch.testing.assert_close(window, whole - torch.tensor([7.0, 4.0]))


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_downscaled_calibration_puts_a_pixel_into_its_block(factor):
    depth = torch.ones(1, 12, 24) * 7
    points, where = back_project(depth, camera())
    pixels, _ = project_points(points, camera().downscaled(factor))
    rows, columns = where.nonzero(as_tuple=True)
    assert torch.equal(pixels.round().long(), torch.stack([columns // factor, rows // factor], 1))


def test_intrinsics_of_the_cropped_image_are_as_good_as_the_crop():
    cropped = camera().cropped(top=3, left=5)
    given = camera().with_intrinsics(cropped.projection[:, :3])
    torch.testing.assert_close(given.projection, cropped.projection)


def test_matrices_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected projection to be \[3, 4\], got \[3, 3\]"):
        Calibration(torch.eye(3), torch.eye(4))
    with pytest.raises(ValueError, match=r"expected a depth image \[1, H, W\], got \[4, 4\]"):
        back_project(torch.ones(4, 4), camera())
    with pytest.raises(ValueError, match="rounding must be one of round, floor, got 'up'"):
        nearest_pixels(torch.zeros(2), "up")
    with pytest.raises(ValueError, match="expected a method that works on pixels, got 'scan_order'"):
        depth_lines(torch.ones(1, 4, 4), camera(), "scan_order")
