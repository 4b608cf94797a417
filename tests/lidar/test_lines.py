"""The line of every point, on synthetic streets where it is known and on KITTI's two frames."""

import math
import warnings

import numpy as np
import pytest
import torch

from lightning_eff.lidar.files import read_velodyne
from lightning_eff.lidar.lines import KITTI_HDL64E, LaserTable, LidarWarning, assign_lines, fit_laser_table
from lightning_eff.lidar.synthetic import Scene

FRAMES = ("000000", "000001")


def street(seed, **options):
    generator = np.random.default_rng(seed)
    return Scene.random(generator).scan(generator=generator, **options)


@pytest.fixture(scope="module")
def noisy():
    return street(0, noise=0.02, dropout=0.05)


@pytest.fixture(scope="module", params=FRAMES)
def scan(request, kitti):
    return read_velodyne(kitti / f"{request.param}.bin")


@pytest.mark.parametrize("method", ["laser_table", "elevation", "scan_order", "official", "ring"])
def test_points_that_are_not_finite_have_no_line_and_leave_the_others_alone(method, noisy):
    points, lines = noisy
    points = torch.cat([points[:, :3], torch.zeros(len(points), 1), 63.0 - lines[:, None]], dim=1)
    begins = 1 + int((lines.diff() != 0).nonzero()[0])  # where a new line begins, two are inserted
    broken = torch.tensor([[torch.nan, 1, 1, 0, 0], [1, 1, torch.inf, 0, 0]])
    found = assign_lines(torch.cat([points[:begins], broken, points[begins:]]), method).lines
    assert found[begins : begins + 2].tolist() == [255, 255]
    assert torch.equal(torch.cat([found[:begins], found[begins + 2 :]]), assign_lines(points, method).lines)


@pytest.mark.parametrize("method", ["scan_order", "laser_table"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_line_of_a_synthetic_scan_is_found(method, seed):
    points, lines = street(seed, noise=0.02, dropout=0.05)
    found = assign_lines(points, method)
    assert (found.lines.dtype, len(lines) > 100_000) == (torch.uint8, True)
    assert torch.equal(found.lines, lines)


# horizontal range of line k on ground at -1.73 m: (h_k + 1.73) / tan(-phi_k)
@pytest.mark.parametrize(("line", "metres"), [(31, 12.5817), (45, 6.6051), (20, 22.462)])
def test_lines_meet_flat_ground_where_the_table_says(line, metres):
    points, lines = Scene(np.zeros((0, 2, 3)), np.zeros((0, 3))).scan()
    ranges = points[lines == line, :2].norm(dim=1)
    # angles of the table are rounded to 0.001 degrees, which is 1e-4 of the range of line 20
    torch.testing.assert_close(ranges, torch.full_like(ranges, metres), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("frame", "points", "smallest", "largest"), [("000000", 115_384, 1086, 2066), ("000001", 120_268, 1119, 2152)]
)
def test_scan_order_finds_64_rings_of_the_known_sizes_in_kitti(kitti, frame, points, smallest, largest):
    lines = assign_lines(read_velodyne(kitti / f"{frame}.bin"), "scan_order").lines
    sizes = lines.bincount()
    assert (len(lines), len(sizes), sizes.min(), sizes.max()) == (points, 64, smallest, largest)


def test_elevation_falls_from_ring_to_ring_in_kitti(scan):
    lines = assign_lines(scan, "scan_order").lines
    elevation = torch.atan2(scan[:, 2], scan[:, :2].norm(dim=1))
    medians = torch.stack([elevation[lines == line].median() for line in range(64)])
    assert (medians.diff() < 0).all()


def test_laser_table_agrees_with_scan_order_in_kitti(scan):
    found = assign_lines(scan, "laser_table")
    agree = found.lines == assign_lines(scan, "scan_order").lines
    assert agree.float().mean() >= 0.9999
    assert found.median_residual < 0.003  # degrees; 0.0016 and 0.0011


def test_laser_table_needs_neither_the_whole_scan_nor_its_order(scan):
    lines = assign_lines(scan, "scan_order").lines
    front = (scan[:, 1].abs() < scan[:, 0]).nonzero().squeeze(1)
    front = front[torch.randperm(len(front), generator=torch.Generator().manual_seed(0))]
    assert (assign_lines(scan[front]).lines == lines[front]).float().mean() >= 0.9999


def test_scan_order_refuses_a_cloud_reduced_to_the_field_of_view(noisy):
    points, _ = noisy
    # seen from -45 to 45 degrees every ring still crosses azimuth 0, lines that miss the image are gone
    reduced = points[(points[:, 1].abs() < points[:, 0]) & (points[:, 2] > -0.28 * points[:, 0])]
    with pytest.raises(ValueError, match=r"expected 64 rings in scan order, found \d\d: .*use method='laser_table'"):
        assign_lines(reduced, "scan_order")


def test_ring_numbers_rise_from_the_lowest_ring():
    points = torch.zeros(3, 5)
    points[:, 4] = torch.tensor([0.0, 31.0, 5.0])
    assert assign_lines(points, "ring", num_lines=32).lines.tolist() == [31, 0, 26]


def test_ring_numbers_out_of_range_are_refused():
    points = torch.full((3, 5), 32.0)
    with pytest.raises(ValueError, match="expected whole ring numbers from 0 to 31 in column 4, got values from 32"):
        assign_lines(points, "ring", num_lines=32)
    with pytest.raises(ValueError, match="expected ring numbers in column 4, got points of 4 columns"):
        assign_lines(points[:, :4], "ring")


def test_evenly_spaced_lasers_are_found_by_elevation():
    elevations = torch.linspace(15, -15, 16, dtype=torch.float64)  # a VLP-16
    angle = elevations.deg2rad() + math.radians(0.9) * torch.linspace(-1, 1, 16)
    points = 20 * torch.stack([angle.cos(), torch.zeros(16), angle.sin()], 1)
    found = assign_lines(points, "elevation", num_lines=16, elevation_range=(15, -15))
    assert found.lines.tolist() == list(range(16))


def purity(lines, truth):
    table = torch.zeros(256, 64, dtype=torch.int64)
    table.index_put_((lines.long(), truth.long()), torch.ones(len(lines), dtype=torch.int64), accumulate=True)
    return (table[:255].amax(1).sum() / table[:255].sum()).item()


def test_bins_of_elevation_mix_lines_in_kitti(scan):
    lines = assign_lines(scan, "elevation").lines
    assert 0.47 <= purity(lines, assign_lines(scan, "scan_order").lines) <= 0.74


def test_official_bins_leave_a_fifth_of_kitti_without_line(scan):
    lines = assign_lines(scan, "official").lines
    assert 0.21 <= (lines == 255).float().mean() <= 0.27


def test_official_bins_cover_the_stretched_angles_only():
    # arccos(cos^2 phi) = -23.68 and 2.56 degrees at phi = -16.87 and 1.81 degrees
    angle = torch.tensor([-16.90, -16.85, 0.1, 1.80, 1.83], dtype=torch.float64).deg2rad()
    points = 20 * torch.stack([angle.cos(), torch.zeros(5), angle.sin()], 1)
    # 0.1 degrees is stretched to 0.1414: bin 58 from below
    assert assign_lines(points, "official").lines.tolist() == [255, 63, 63 - 58, 0, 255]


@pytest.mark.parametrize("degrees", [0.1, 0.5, 1.0, 2.0])
def test_points_that_do_not_fit_the_table_are_reported(noisy, degrees):
    points, _ = noisy
    turn = torch.tensor(math.radians(degrees))
    pitch = torch.tensor([[turn.cos(), 0, turn.sin()], [0, 1, 0], [-turn.sin(), 0, turn.cos()]])
    with pytest.warns(LidarWarning, match=r"half of the points lie 0.* degrees or more from every laser"):
        assign_lines(points @ pitch.T)


def test_points_that_fit_raise_no_warning(noisy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assign_lines(noisy[0])


def test_points_far_from_every_laser_can_be_left_without_line(noisy):
    points, lines = noisy
    stray = torch.tensor([[10.0, 0.0, 5.0]])  # 27 degrees up
    found = assign_lines(torch.cat([points, stray]), max_residual=0.1)
    assert torch.equal(found.lines[:-1], lines)
    assert found.lines[-1] == 255
    assert found.residuals[-1] > 20


def test_fit_recovers_the_table_of_a_synthetic_sensor(noisy):
    table = fit_laser_table([noisy[0]])
    np.testing.assert_allclose(table.elevations, KITTI_HDL64E.elevations, atol=1e-3)
    np.testing.assert_allclose(table.heights, KITTI_HDL64E.heights, atol=1e-4)


def test_fit_on_kitti_gives_its_table_whatever_the_frame(kitti):
    scans = [read_velodyne(kitti / f"{frame}.bin") for frame in FRAMES]
    for table in (fit_laser_table(scans), fit_laser_table(scans[:1]), fit_laser_table(scans[1:])):
        # what four frames fitted one by one differ by: 0.014 degrees, 1.2 mm
        np.testing.assert_allclose(table.elevations, KITTI_HDL64E.elevations, atol=0.014)
        np.testing.assert_allclose(table.heights, KITTI_HDL64E.heights, atol=0.0012)


def test_fitted_lines_pass_the_points_of_kitti_within_a_third_of_a_millimetre(scan):
    table, lines = fit_laser_table([scan]), assign_lines(scan, "scan_order").lines.long()
    heights = torch.tensor(table.heights, dtype=torch.float64)
    rho = scan[:, :2].double().norm(dim=1)
    off = (scan[:, 2].double() - heights[lines] - rho * table.slopes[lines]).abs()
    assert off.median() < 0.0003


def test_fit_needs_a_scan_and_more_than_one_distance():
    with pytest.raises(ValueError, match="at least one scan"):
        fit_laser_table([])
    angle = torch.linspace(0, 6.28, 100)
    circle = torch.stack([angle.cos(), angle.sin(), torch.zeros(100)], 1)
    with pytest.raises(ValueError, match=r"expected ring 0 to see several distances, got 1.000 m only"):
        fit_laser_table([circle], num_lines=1)


@pytest.mark.parametrize(
    ("elevations", "heights", "message"),
    [
        ((1.0, 0.0), (0.2,), "expected as many heights as elevations, 1 to 255, got 1 and 2"),
        ((0.0, 1.0), (0.2, 0.2), "expected elevations to fall"),
        ((), (), "1 to 255, got 0 and 0"),
    ],
)
def test_tables_that_describe_no_sensor_are_refused(elevations, heights, message):
    with pytest.raises(ValueError, match=message):
        LaserTable(elevations, heights)


def test_gap_of_a_laser_is_the_angle_to_its_nearer_neighbour():
    assert LaserTable((3.0, 2.0, 0.0), (0.0, 0.0, 0.0)).gaps.tolist() == [1, 1, 2]


def test_an_empty_cloud_has_no_lines():
    found = assign_lines(torch.zeros(0, 3))
    assert (len(found.lines), math.isnan(found.median_residual)) == (0, True)
    with pytest.raises(ValueError, match="expected 64 rings in scan order, found 0"):
        assign_lines(torch.zeros(0, 3), "scan_order")


def test_clouds_and_methods_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"expected points \[N, 3\] or more columns, got \[5, 2\]"):
        assign_lines(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"method must be one of ring, scan_order, .* got 'rings'"):
        assign_lines(torch.zeros(5, 3), "rings")
    with pytest.raises(ValueError, match="num_lines must be a whole number from 1 to 255, got 256"):
        assign_lines(torch.zeros(5, 3), "scan_order", num_lines=256)
