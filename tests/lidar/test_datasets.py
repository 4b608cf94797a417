"""KITTI's layout, written by the test from two real frames and from two synthetic ones."""

import shutil

import pytest
import torch
from kitti_tree import FRAME, real_frames, synthetic_frames, write_tree

from lightning_eff.lidar.batches import BottomCrop, Downscale, LidarKeys, check_lines
from lightning_eff.lidar.datasets import KittiDepthDataset, KittiScanDataset, take_nearest
from lightning_eff.lidar.files import write_depth_png
from lightning_eff.lidar.layout import DepthFiles, FrameName, ScanFiles, find_depth_frames, find_scan_frames


@pytest.fixture(scope="module", params=["synthetic", "real"])
def tree(request, tmp_path_factory):
    frames = synthetic_frames() if request.param == "synthetic" else real_frames(request.getfixturevalue("kitti"))
    frames = sorted(frames, key=lambda frame: frame.day)
    return write_tree(tmp_path_factory.mktemp(request.param), frames), frames


@pytest.fixture
def small_tree(tmp_path):
    """A tree that a test may break."""
    return write_tree(tmp_path, synthetic_frames()[:1])


def expected(frame):
    """The cropped frame with lines that were known before anything was written."""
    return BottomCrop()({"sparse": (frame.sparse * 256).round() / 256, "line_idx": frame.lines, "rgb": frame.rgb})


@pytest.mark.parametrize("split", ["train", "val_select", "test"])
def test_frames_come_with_the_line_of_nearly_every_pixel(tree, split):
    root, frames = tree
    data = KittiDepthDataset(root, split)
    assert len(data) == 2
    for sample, frame in zip(data, frames, strict=True):
        truth = expected(frame)
        assert torch.equal(sample["sparse"], truth["sparse"])
        torch.testing.assert_close(sample["rgb"], truth["rgb"], atol=0.6 / 255, rtol=0)
        valid = truth["sparse"] > 0
        assert (sample["line_idx"] == truth["line_idx"])[valid].float().mean() >= 0.999
        assert (sample["line_idx"][~valid] == 255).all()


def test_lines_are_exact_where_they_come_from_the_raw_scan(tree):
    root, frames = tree
    for sample, frame in zip(KittiDepthDataset(root, "train", line_source="scan_order"), frames, strict=True):
        assert torch.equal(sample["line_idx"], expected(frame)["line_idx"])


def test_official_lines_are_few_and_wrong(tree):
    root, frames = tree
    for sample, frame in zip(KittiDepthDataset(root, "train", line_source="official"), frames, strict=True):
        valid = sample["sparse"] > 0
        assert (sample["line_idx"][valid] != 255).all()  # the nearest pixel with an id, however far
        assert (sample["line_idx"] == expected(frame)["line_idx"])[valid].float().mean() < 0.3


def test_truth_is_read_where_it_is_public(tree):
    root, frames = tree
    for split in ("train", "val_select"):
        truth = (KittiDepthDataset(root, split)[0]["gt"] * 256).round()
        assert torch.equal(truth, (BottomCrop()({"gt": frames[0].gt})["gt"] * 256).round())
    assert not KittiDepthDataset(root, "test")[0]["gt"].any()


def test_frames_are_named_by_drive_camera_and_frame(tree):
    root, frames = tree
    sample = KittiDepthDataset(root, "val_select")[0]
    assert sample["sample_id"] == f"{frames[0].drive}/image_02/{FRAME}"
    assert sample["sequence"] == f"{frames[0].drive}/image_02"
    assert KittiDepthDataset(root, "train")[0]["sample_id"] == sample["sample_id"]
    assert KittiDepthDataset(root, "test")[1]["sample_id"] == "0000000001"


def test_frames_of_both_days_make_a_batch(tree):
    root, _ = tree
    batch = torch.utils.data.default_collate(list(KittiDepthDataset(root, "train")))
    inputs, target = LidarKeys()(batch)
    check_lines(inputs["line_idx"], 64)
    assert (target.shape, inputs["rgb"].shape) == ((2, 1, 352, 1216), (2, 3, 352, 1216))


def test_scale_divides_the_cropped_frame(tree):
    root, frames = tree
    sample = KittiDepthDataset(root, "train", scale=4, line_source="scan_order")[0]
    small = Downscale(4)(expected(frames[0]))
    assert sample["sparse"].shape == (1, 88, 304)
    assert torch.equal(sample["sparse"], small["sparse"])
    assert torch.equal(sample["line_idx"], small["line_idx"])


def test_frames_without_crop_keep_their_size(tree):
    root, frames = tree
    sample = KittiDepthDataset(root, "train", crop=None)[0]
    assert sample["sparse"].shape == frames[0].sparse.shape


def test_archives_may_have_been_unpacked_without_their_outer_folder(small_tree):
    (small_tree / "depth_selection" / "val_selection_cropped").rename(small_tree / "val_selection_cropped")
    assert len(KittiDepthDataset(small_tree, "val_select")) == 1
    shutil.copytree(small_tree / "data_depth_velodyne" / "train", small_tree / "train")
    shutil.copytree(small_tree / "data_depth_annotated" / "train", small_tree / "train", dirs_exist_ok=True)
    shutil.rmtree(small_tree / "data_depth_velodyne"), shutil.rmtree(small_tree / "data_depth_annotated")
    assert len(KittiDepthDataset(small_tree, "train")) == 1


def test_raw_data_may_lie_elsewhere(small_tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("raw")
    shutil.move(small_tree / "2011_09_26", elsewhere)
    with pytest.raises(FileNotFoundError, match=r"expected the image of .* at .*2011_09_26.*paired by name"):
        KittiDepthDataset(small_tree, "train")
    assert len(KittiDepthDataset(small_tree, "train", raw_root=elsewhere)) == 1


def test_calibration_that_is_missing_is_asked_for_with_the_way_to_give_it(small_tree):
    shutil.rmtree(small_tree / "2011_09_26")
    with pytest.raises(FileNotFoundError, match=r"expected the calibration of .*2011_09_26.*pass raw_root="):
        KittiDepthDataset(small_tree, "val_select")[0]
    with pytest.raises(FileNotFoundError, match=r"expected a day with the focal length 721.5377"):
        KittiDepthDataset(small_tree, "test")[0]


def test_frames_without_partner_are_refused_with_both_names(small_tree):
    truth = next(small_tree.glob("depth_selection/val_selection_cropped/groundtruth_depth/*.png"))
    truth.rename(truth.with_name(truth.name.replace(FRAME, "0000000006")))
    with pytest.raises(
        FileNotFoundError, match=f"expected the true depth of .*{FRAME}.* at .*groundtruth_depth_{FRAME}"
    ):
        KittiDepthDataset(small_tree, "val_select")


def test_files_of_different_frames_are_refused_with_both_names(small_tree):
    files = find_depth_frames(small_tree, "train")[0]
    other = files.image.with_name("0000000006.png")
    with pytest.raises(
        ValueError, match=rf"expected files of one drive, camera and frame, got .*{FRAME}.png and .*6.png"
    ):
        DepthFiles(files.sparse, other, None, None, None, None, small_tree)
    with pytest.raises(ValueError, match=r"got .*000000.bin and .*000001.png"):
        ScanFiles(small_tree / "000000.bin", small_tree / "000001.png", small_tree / "000000.txt")


def test_images_of_different_size_are_refused_with_both_paths(small_tree):
    truth = next(small_tree.glob("data_depth_annotated/train/*/proj_depth/groundtruth/image_02/*.png"))
    write_depth_png(truth, torch.ones(1, 370, 1224))
    with pytest.raises(ValueError, match=r"got \[370, 1224\] in .*groundtruth.* and \[375, 1242\] in .*velodyne_raw"):
        KittiDepthDataset(small_tree, "train")[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "all"}, ValueError, "split must be one of train, val, val_select, test, got 'all'"),
        ({"split": "val"}, FileNotFoundError, "expected one of the folders .*data_depth_velodyne/val"),
        ({"cameras": (3,)}, FileNotFoundError, r"expected depth images of the cameras \[3\]"),
        ({"line_source": "ring"}, ValueError, "line_source must be one of laser_table, .* got 'ring'"),
        ({"scale": 5}, ValueError, "expected scale to divide the crop of 352 x 1216, got 5"),
    ],
)
def test_arguments_that_lead_nowhere_are_refused(small_tree, arguments, error, message):
    with pytest.raises(error, match=message):
        KittiDepthDataset(small_tree, **arguments)


def test_scan_source_needs_the_drive(small_tree):
    with pytest.raises(ValueError, match="expected a raw scan for line_source 'scan_order'"):
        KittiDepthDataset(small_tree, "test", line_source="scan_order")[0]


@pytest.mark.parametrize("line_source", ["scan_order", "laser_table"])
def test_raw_scans_become_frames_whose_truth_is_all_lines(tree, line_source):
    root, frames = tree
    data = KittiScanDataset(root, line_source=line_source)
    assert len(data) == 2
    for sample, frame in zip(data, frames, strict=True):
        truth = BottomCrop()({"sparse": frame.sparse, "line_idx": frame.lines})
        torch.testing.assert_close(sample["sparse"], truth["sparse"])
        assert torch.equal(sample["gt"], sample["sparse"])
        assert (sample["line_idx"] == truth["line_idx"]).float().mean() >= 0.9999
        assert sample["sample_id"] == f"{frame.drive}/image_02/{FRAME}"


def test_scans_of_the_object_benchmark_become_frames(kitti, tmp_path):
    flat = KittiScanDataset(kitti)
    assert [sample["sample_id"] for sample in flat] == ["000000", "000001"]
    # the counts known of the two frames after the crop
    assert [(sample["sparse"] > 0).sum().item() for sample in flat] == [20_130, 18_328]
    for folder, suffix in (("velodyne", "bin"), ("image_2", "png"), ("calib", "txt")):
        (tmp_path / "training" / folder).mkdir(parents=True)
        (tmp_path / "training" / folder / f"000001.{suffix}").symlink_to(kitti / f"000001.{suffix}")
    assert torch.equal(KittiScanDataset(tmp_path)[0]["sparse"], flat[1]["sparse"])


def test_folders_without_scans_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected scans in .*velodyne/\*.bin .* got none"):
        find_scan_frames(tmp_path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (
            "a/2011_09_26_drive_0002_sync/proj_depth/velodyne_raw/image_03/0000000005.png",
            ("2011_09_26_drive_0002_sync", 3, "0000000005"),
        ),
        (
            "a/2011_09_26_drive_0002_sync_groundtruth_depth_0000000008_image_02.png",
            ("2011_09_26_drive_0002_sync", 2, "0000000008"),
        ),
        (
            "2011_09_26/2011_09_26_drive_0002_sync/velodyne_points/data/0000000005.bin",
            ("2011_09_26_drive_0002_sync", None, "0000000005"),
        ),
        (
            "2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000005.png",
            ("2011_09_26_drive_0002_sync", 2, "0000000005"),
        ),
        ("velodyne/000123.bin", ("", None, "000123")),
    ],
)
def test_names_tell_drive_camera_and_frame(path, name, tmp_path):
    assert FrameName.of(tmp_path / path) == name


def test_pixels_take_the_line_of_the_nearest_pixel_within_reach():
    lines, sparse = torch.full((1, 1, 9), 255, dtype=torch.uint8), torch.ones(1, 1, 9)
    lines[0, 0, 1], sparse[0, 0, 0] = 4, 0
    assert take_nearest(lines, sparse, reach=3).tolist() == [[[255, 4, 4, 4, 4, 255, 255, 255, 255]]]
    assert take_nearest(torch.full_like(lines, 255), sparse, reach=3).unique().tolist() == [255]
