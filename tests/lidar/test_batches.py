"""What a lidar batch is, and windows that treat all its images alike."""

import pytest
import torch

from lightning_eff.lidar.batches import BottomCrop, Downscale, LidarKeys, RandomFlip, check_lines


def batch(**changes):
    images = {
        "rgb": torch.rand(2, 3, 4, 6),
        "sparse": torch.rand(2, 1, 4, 6),
        "gt": torch.rand(2, 1, 4, 6),
        "line_idx": torch.zeros(2, 1, 4, 6, dtype=torch.uint8),
    }
    return {name: image for name, image in (images | changes).items() if image is not None}


def test_inputs_and_target_are_split():
    frames = batch(sample_id=["a", "b"])
    inputs, target = LidarKeys()(frames)
    assert list(inputs) == ["rgb", "sparse", "line_idx", "sample_id"]
    assert (target is frames["gt"], inputs["rgb"] is frames["rgb"]) == (True, True)


def test_keys_of_the_user_get_the_names_of_the_house():
    frames = batch(rgb=None, gt=None, image=torch.rand(2, 1, 4, 6), depth=torch.ones(2, 1, 4, 6), drive=["x", "x"])
    inputs, target = LidarKeys(rgb="image", gt="depth", sequence="drive")(frames)
    assert (inputs["rgb"] is frames["image"], inputs["sequence"], target.mean()) == (True, ["x", "x"], 1)


def test_inputs_alone_need_no_truth():
    assert list(LidarKeys().inputs(batch(gt=None))) == ["rgb", "sparse", "line_idx"]
    with pytest.raises(KeyError, match="the batch has no 'gt'"):
        LidarKeys()(batch(gt=None))


def test_a_missing_key_is_named_with_the_way_to_rename_it():
    with pytest.raises(KeyError, match=r"no 'image'; its keys are .*'sparse'\]: name the one .* LidarKeys\(rgb=...\)"):
        LidarKeys(rgb="image")(batch())


def test_missing_lines_come_with_the_ways_to_obtain_them():
    with pytest.raises(KeyError, match=r"KittiScanDataset .* assign_lines.* depth_lines"):
        LidarKeys()(batch(line_idx=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gt": torch.rand(2, 1, 4, 7)},
            r"expected gt and sparse to agree in B, H, W, got \[2, 1, 4, 7\] and \[2, 1, 4",
        ),
        ({"rgb": torch.rand(2, 3, 3, 6)}, "expected rgb and sparse to agree"),
        ({"sparse": torch.rand(2, 4, 6)}, r"expected sparse to be a tensor \[B, 1, H, W\], got \[2, 4, 6\]"),
        ({"rgb": torch.rand(2, 2, 4, 6)}, r"expected rgb to be a tensor \[B, 1, H, W\] or \[B, 3, H, W\]"),
        ({"line_idx": torch.full((2, 1, 4, 6), 0.5)}, "got torch.float32, values from 0.5 to 0.5"),
    ],
)
def test_shapes_and_types_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LidarKeys()(batch(**changes))


def test_batches_that_are_no_dict_are_refused():
    with pytest.raises(TypeError, match="expected a lidar batch as a dict, got a tuple: pass split_batch=, a callable"):
        LidarKeys()((torch.ones(1), torch.ones(1)))


def test_lines_of_the_sensor_and_255_are_accepted():
    check_lines(torch.tensor([0, 63, 255], dtype=torch.uint8), num_lines=64)
    check_lines(torch.full((3,), 255, dtype=torch.uint8), num_lines=1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (torch.tensor([3, 64, 255]), "expected line_idx to lie in 0 to 63.*got values from 3 to 64"),
        (torch.tensor([-1, 3]), "got values from -1 to 3"),
        (torch.tensor([0.0, 1.0]), "got torch.float32, values from 0.0 to 1.0"),
    ],
)
def test_other_lines_are_refused_with_what_was_seen(lines, message):
    with pytest.raises(ValueError, match=message):
        check_lines(lines, num_lines=64)


def test_crop_takes_the_same_bottom_centred_window_of_every_image():
    rows, columns = torch.meshgrid(torch.arange(375), torch.arange(1242), indexing="ij")
    place = torch.stack([rows, columns]).float()
    frame = BottomCrop()({"rgb": place, "sparse": place[:1], "line_idx": place[1:], "sample_id": "a"})
    assert frame["rgb"].shape == (2, 352, 1216)
    assert (frame["rgb"][0, 0, 0], frame["rgb"][1, 0, 0], frame["rgb"][1, 0, -1]) == (23, 13, 1228)
    assert torch.equal(frame["sparse"], frame["rgb"][:1])
    assert torch.equal(frame["line_idx"], frame["rgb"][1:])
    assert frame["sample_id"] == "a"


def test_crop_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match=r"expected images of at least 352 x 1216 .* got 4 x 6"):
        BottomCrop()(batch())


def test_downscaling_keeps_the_nearest_return_of_a_block_and_its_line():
    sparse, lines = torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2, 4), 255, dtype=torch.uint8)
    sparse[0, 0, 0, 1], lines[0, 0, 0, 1] = 9.0, 3
    sparse[0, 0, 1, 0], lines[0, 0, 1, 0] = 4.0, 7
    rgb = torch.arange(8.0).view(1, 1, 2, 4).expand(1, 3, 2, 4)
    small = Downscale(2)({"rgb": rgb, "sparse": sparse, "gt": sparse * 2, "line_idx": lines})
    assert small["sparse"].tolist() == [[[[4, 0]]]]
    assert small["gt"].tolist() == [[[[8, 0]]]]
    assert small["line_idx"].tolist() == [[[[7, 255]]]]
    assert small["line_idx"].dtype == torch.uint8
    assert small["rgb"][0, 0].tolist() == [[2.5, 4.5]]


def test_downscaling_needs_whole_blocks():
    with pytest.raises(ValueError, match="expected height and width to be multiples of 4, got 4 x 6"):
        Downscale(4)(batch())


def test_flip_mirrors_every_image():
    frames = batch()
    mirrored = RandomFlip(1.0)(frames)
    assert all(torch.equal(mirrored[name], frames[name].flip(-1)) for name in frames)
    assert all(torch.equal(RandomFlip(0.0)(frames)[name], frames[name]) for name in frames)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BottomCrop(0, 5), "expected height and width of the crop >= 1, got 0 and 5"),
        (lambda: Downscale(0), "factor must be a whole number >= 1, got 0"),
        (lambda: RandomFlip(1.5), r"p must lie in \[0, 1\], got 1.5"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
