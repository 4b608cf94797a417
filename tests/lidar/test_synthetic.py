"""Synthetic streets: what is seen is what stands there."""

import numpy as np
import pytest
import torch

from lightning_eff.lidar.batches import LidarKeys, check_lines
from lightning_eff.lidar.lines import LaserTable
from lightning_eff.lidar.projection import back_project
from lightning_eff.lidar.synthetic import CAMERA_POSITION, Scene, SyntheticLidarDataset, synthetic_calibration

NOTHING = Scene(np.zeros((0, 2, 3)), np.zeros((0, 3)))
BOX = Scene(np.array([[[10.0, -2, -1.73], [12.0, 2, 1.0]]]), np.array([[1.0, 0, 0]]))


def test_a_ray_hits_the_nearest_face():
    length, hit = BOX.cast((0.0, 0.0, 0.0), (1.0, np.array([0.0, 0.0, 0.5]), np.array([0.0, -0.5, 0.0])))
    # ahead: the box; half a metre down a metre: the ground after 3.46 m; half to the side: past the box
    np.testing.assert_allclose(length, [10, 3.46, np.inf])
    assert hit.tolist() == [1, 0, -1]


def test_a_ray_sees_neither_what_is_behind_it_nor_the_box_around_it():
    length, _ = BOX.cast((20.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    assert np.isinf(length)
    length, _ = BOX.cast((11.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    assert np.isinf(length)


def test_ground_has_the_depth_its_row_tells():
    _, depth = NOTHING.photograph()
    row, column = 300, 100
    # f * height of the camera / rows below the principal point
    expected = 721.5377 * (1.73 + CAMERA_POSITION[2]) / (row - (172.85 - 23))
    assert depth[0, row, column] == pytest.approx(expected, rel=1e-5)


def test_sky_has_no_depth():
    _, depth = NOTHING.photograph()
    assert not depth[0, :150].any()
    assert depth[0, 200:].all()


def test_true_depth_lies_on_the_surfaces_of_the_scene():
    _, depth = BOX.photograph(scale=8)
    points, _ = back_project(depth, synthetic_calibration(8))
    on_ground = (points[:, 2] + 1.73).abs() < 1e-4
    on_face = (points[:, 0] - 10).abs() < 1e-4
    assert (on_ground | on_face).all()
    assert 0 < on_face.sum() < on_ground.sum()


def test_image_shows_what_the_depth_measures():
    image, depth = BOX.photograph(scale=8)
    red = (image[0] > 0.5) & (image[1] == 0)
    assert torch.equal(red, (depth[0] - (10 - CAMERA_POSITION[0])).abs() < 1e-4)
    assert (image.min(), image.max() <= 1) == (0, True)


def test_lines_of_the_scan_have_their_angles_and_heights():
    table = LaserTable((1.0, -5.0), (0.3, 0.1))
    points, lines = BOX.scan(table, azimuths=np.array([0.0]))
    # upward beam: 0.3 + 10 tan(1 deg); downward: 0.1 - 10 tan(5 deg)
    torch.testing.assert_close(points, torch.tensor([[10, 0, 0.47455], [10, 0, -0.77489]]), atol=1e-4, rtol=0)
    assert lines.tolist() == [0, 1]


def test_noise_is_along_the_ray_and_dropout_is_a_share():
    generator = np.random.default_rng(0)
    clean, lines = NOTHING.scan()
    noisy, _ = NOTHING.scan(noise=0.02, max_range=1e9, generator=generator)
    clean, _ = NOTHING.scan(max_range=1e9)
    error = noisy.double().norm(dim=1) - clean.double().norm(dim=1)
    near = clean.norm(dim=1) < 80
    assert error[near].std() == pytest.approx(0.02, rel=0.02)
    kept, _ = NOTHING.scan(dropout=0.05, generator=generator)
    assert len(kept) / len(lines) == pytest.approx(0.95, abs=0.003)


def test_scans_need_a_source_of_chance_and_boxes_their_corners_in_order():
    with pytest.raises(ValueError, match="expected a generator for noise and dropout"):
        NOTHING.scan(noise=0.1)
    with pytest.raises(ValueError, match="expected the first corner of every box to be the lower one"):
        Scene(np.array([[[1, 1, 1], [0, 2, 2]]]), np.ones((1, 3)))
    with pytest.raises(ValueError, match="expected a colour for each box, got 2 and 1"):
        Scene(BOX.boxes, np.ones((2, 3)))


def test_moving_forward_brings_the_scene_nearer():
    _, before = BOX.photograph(scale=8)
    _, after = BOX.moved(3.0).photograph(scale=8)
    assert before[0, 20, 76] - after[0, 20, 76] == pytest.approx(3.0)


@pytest.fixture(scope="module")
def frames():
    return SyntheticLidarDataset(3, scale=4, seed=1)


def test_frames_are_lidar_samples(frames):
    batch = torch.utils.data.default_collate([frames[0], frames[2]])
    inputs, target = LidarKeys()(batch)
    shapes = [(value.shape, value.dtype) for value in (inputs["rgb"], inputs["sparse"], inputs["line_idx"], target)]
    assert shapes == [
        ((2, 3, 88, 304), torch.float32),
        ((2, 1, 88, 304), torch.float32),
        ((2, 1, 88, 304), torch.uint8),
        ((2, 1, 88, 304), torch.float32),
    ]
    assert inputs["sample_id"] == ["train/000000", "train/000002"]
    check_lines(inputs["line_idx"], 64)
    assert torch.equal(inputs["line_idx"] == 255, inputs["sparse"] == 0)


def test_most_lines_above_the_lower_border_of_the_image_are_seen(frames):
    lines = frames[0]["line_idx"]
    seen = lines[lines != 255].unique()
    # KITTI has 0 to 45 of 64; this camera looks straight ahead and sees two more
    assert seen.tolist() == list(range(len(seen)))
    assert 44 <= len(seen) <= 48


def test_sparse_depth_is_the_true_depth_up_to_noise_and_pixel(frames):
    fine = SyntheticLidarDataset(3, scale=1, seed=1)[0]
    both = (fine["sparse"] > 0) & (fine["gt"] > 0)
    error = (fine["sparse"] - fine["gt"])[both].abs()
    # the rest sees past an edge that hides it from the camera
    assert error.median() < 0.03
    assert (error < 0.5).float().mean() > 0.95


def test_frames_depend_on_seed_part_and_index_alone(frames):
    again = SyntheticLidarDataset(50, scale=4, seed=1)
    assert all(torch.equal(again[1][name], frames[1][name]) for name in ("rgb", "sparse", "gt", "line_idx"))
    others = (
        SyntheticLidarDataset(3, scale=4, seed=2)[1],
        SyntheticLidarDataset(3, "val", scale=4, seed=1)[1],
        frames[0],
    )
    assert not any(torch.equal(other["gt"], frames[1]["gt"]) for other in others)


def test_making_frames_leaves_the_global_generators_alone(frames):
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    frames[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_scale_divides_the_resolution_of_the_same_scene():
    fine, coarse = (SyntheticLidarDataset(1, scale=scale)[0] for scale in (4, 8))
    assert coarse["gt"].shape == (1, 44, 152)
    # depth at the centre of a block of 2 x 2 lies between the depths of its pixels
    blocks = fine["gt"].unfold(1, 2, 2).unfold(2, 2, 2).flatten(-2)
    inside = (blocks.amin(-1) <= coarse["gt"] + 1e-4) & (coarse["gt"] <= blocks.amax(-1) + 1e-4)
    assert inside.float().mean() > 0.98


def test_sequences_show_one_scene_from_places_apart():
    frames = SyntheticLidarDataset(6, scale=8, sequence_length=3, step=2.0)
    assert [frames[i]["sequence"][-1] for i in range(6)] == list("000111")
    np.testing.assert_allclose(frames.scene(0).boxes[:, :, 0] - frames.scene(2).boxes[:, :, 0], 4.0)
    assert not np.array_equal(frames.scene(3).boxes, frames.scene(0).boxes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length must be a whole number >= 1, got 0"),
        ({"length": 2.5}, "length must be a whole number >= 1, got 2.5"),
        ({"noise": float("nan")}, "noise must be >= 0, got nan"),
        ({"part": "dev"}, "part must be one of train, val, test, got 'dev'"),
        ({"scale": 3}, "expected scale to divide 352 and 1216, got 3"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"noise": -0.1}, "noise must be >= 0, got -0.1"),
        ({"sequence_length": 0}, "sequence_length must be a whole number >= 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticLidarDataset(**arguments)


def test_frames_outside_the_set_are_refused(frames):
    with pytest.raises(IndexError, match="expected an index from 0 to 2, got 3"):
        frames[3]
