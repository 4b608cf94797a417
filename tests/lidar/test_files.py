"""Reading and writing KITTI's files."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_eff.lidar.files import (
    MAX_DEPTH,
    read_calibration,
    read_depth_png,
    read_image,
    read_intrinsics,
    read_numbers,
    read_velodyne,
    write_depth_png,
)

OBJECT = """P0: 700 0 600 0 0 700 180 0 0 0 1 0
P2: 707.0493 0 604.0814 45.75831 0 707.0493 180.5066 -0.3454157 0 0 1 0.004981016
R0_rect: 1 0 0 0 0 -1 0 1 0
Tr_velo_to_cam: 0 -1 0 0.1 0 0 -1 0.2 1 0 0 0.3
"""


def test_all_65536_values_of_a_depth_image_survive(tmp_path):
    depth = torch.arange(65536).view(1, 256, 256) / 256
    read = read_depth_png(write_depth_png(tmp_path / "new" / "depth.png", depth))
    assert (read.dtype, read.shape) == (torch.float32, (1, 256, 256))
    assert torch.equal(read, depth)
    with Image.open(tmp_path / "new" / "depth.png") as image:
        assert np.array_equal(np.asarray(image), np.arange(65536).reshape(256, 256))


def test_depth_is_rounded_to_the_nearest_unit(tmp_path):
    depth = torch.tensor([[1.0 + 0.4 / 256, 1.0 + 0.6 / 256]])
    assert read_depth_png(write_depth_png(tmp_path / "d.png", depth)).tolist() == [[[1.0, 257 / 256]]]


def test_a_depth_image_without_returns_is_allowed(tmp_path):
    assert not read_depth_png(write_depth_png(tmp_path / "d.png", torch.zeros(1, 3, 4))).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_depth_saved_with_8_bits_is_refused(tmp_path, dtype):
    path = tmp_path / "eight.png"
    Image.fromarray(np.full((3, 4), 200, dtype)).save(path)
    with pytest.raises(
        ValueError, match=r"expected a depth image of 16 bits.* at .*eight.png, got .*(mode L|up to 200)"
    ):
        read_depth_png(path)


@pytest.mark.parametrize("wrong", [MAX_DEPTH + 0.01, -1.0, float("nan"), float("inf")])
def test_depths_no_png_can_hold_are_refused_and_nothing_is_written(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"expected depths from 0 to 255.996 m"):
        write_depth_png(tmp_path / "d.png", torch.tensor([[1.0, wrong]]))
    assert not list(tmp_path.iterdir())


def test_only_images_are_written(tmp_path):
    with pytest.raises(ValueError, match=r"expected a depth image \[1, H, W\] or \[H, W\], got \[2, 3, 4\]"):
        write_depth_png(tmp_path / "d.png", torch.ones(2, 3, 4))


@pytest.mark.parametrize("read", [read_depth_png, read_image, read_velodyne, read_calibration, read_intrinsics])
def test_missing_files_are_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"expected a file at .*nothing.here, got none"):
        read(tmp_path / "nothing.here")


def test_colours_lie_between_0_and_1(tmp_path):
    Image.fromarray(np.array([[[0, 51, 255]]], np.uint8)).save(tmp_path / "i.png")
    torch.testing.assert_close(read_image(tmp_path / "i.png"), torch.tensor([0, 0.2, 1]).view(3, 1, 1))


def test_scans_are_read_as_they_were_written(tmp_path):
    points = np.arange(20, dtype="<f4").reshape(4, 5)
    points.tofile(tmp_path / "scan.bin")
    assert torch.equal(read_velodyne(tmp_path / "scan.bin", columns=5), torch.from_numpy(points))
    with pytest.raises(ValueError, match=r"expected points of 3 float32 values in .*, got 80 bytes"):
        read_velodyne(tmp_path / "scan.bin", columns=3)


def test_object_calibration_rectifies_after_moving_to_the_camera(tmp_path):
    (tmp_path / "c.txt").write_text(OBJECT)
    calibration = read_calibration(tmp_path / "c.txt")
    assert calibration.projection[0].tolist() == [707.0493, 0, 604.0814, 45.75831]
    # (1, 2, 3) is (-1.9, -2.8, 1.3) in camera axes, then R0 makes it (x, -z, y)
    point = calibration.lidar_to_camera @ torch.tensor([1.0, 2, 3, 1], dtype=torch.float64)
    torch.testing.assert_close(point.tolist(), [-1.9, -1.3, -2.8, 1.0])


def test_odometry_calibration_holds_the_rectified_transform(tmp_path):
    (tmp_path / "c.txt").write_text(OBJECT.split("R0_rect")[0] + "Tr: 0 -1 0 0.1 0 0 -1 0.2 1 0 0 0.3\n")
    assert read_calibration(tmp_path / "c.txt").lidar_to_camera[2].tolist() == [1, 0, 0, 0.3]


def test_raw_calibration_is_a_folder_of_two_files(tmp_path):
    (tmp_path / "calib_cam_to_cam.txt").write_text(
        "calib_time: 09-Jan-2012 13:57:47\ncorner_dist: 9.950000e-02\nR_rect_00: 1 0 0 0 0 -1 0 1 0\n"
        "P_rect_03: 721.5 0 609.6 -339.5 0 721.5 172.9 2.2 0 0 1 0.003\n"
    )
    (tmp_path / "calib_velo_to_cam.txt").write_text("R: 0 -1 0 0 0 -1 1 0 0\nT: 0.1 0.2 0.3\ndelta_f: 0 0\n")
    calibration = read_calibration(tmp_path, camera=3)
    assert calibration.projection[0, 3] == -339.5
    point = calibration.lidar_to_camera @ torch.tensor([1.0, 2, 3, 1], dtype=torch.float64)
    torch.testing.assert_close(point.tolist(), [-1.9, -1.3, -2.8, 1.0])


def test_calibration_names_what_is_missing_and_what_is_there(tmp_path):
    (tmp_path / "c.txt").write_text(OBJECT)
    with pytest.raises(ValueError, match=r"expected an entry P3 in .*c.txt, got P0, P2, R0_rect, Tr_velo_to_cam"):
        read_calibration(tmp_path / "c.txt", camera=3)
    (tmp_path / "c.txt").write_text(OBJECT.replace("R0_rect: 1 0", "R0_rect: 1"))
    with pytest.raises(ValueError, match=r"expected 9 numbers of R0_rect in .*, got 8"):
        read_calibration(tmp_path / "c.txt")


def test_entries_that_are_no_numbers_are_skipped(tmp_path):
    (tmp_path / "c.txt").write_text("calib_time: 09-Jan-2012 13:57:47\nS_02: 1.4e+03 5.12e+02\nempty:\nno colon\n")
    assert {key: value.tolist() for key, value in read_numbers(tmp_path / "c.txt").items()} == {"S_02": [1400, 512]}


def test_intrinsics_are_nine_numbers(tmp_path):
    (tmp_path / "k.txt").write_text("7 0 5 0 7 3 0 0 1")
    assert read_intrinsics(tmp_path / "k.txt").tolist() == [[7, 0, 5], [0, 7, 3], [0, 0, 1]]
    (tmp_path / "k.txt").write_text("7 0 5")
    with pytest.raises(ValueError, match=r"expected nine numbers in .*, got 3"):
        read_intrinsics(tmp_path / "k.txt")


def test_the_calibration_of_a_real_frame_is_read(kitti):
    calibration = read_calibration(kitti / "000000.txt")
    assert calibration.projection[0, 0] == 707.0493
    rotation = calibration.lidar_to_camera[:3, :3]
    # the file has seven digits
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
