"""Actions, fields of view, boxes and counts of pixels."""

import pytest
import torch

from lightning_eff.glimpse.config import GlimpseConfig
from lightning_eff.glimpse.geometry import action_of, normalised, patch_boxes, patch_edges, views_of

PAPER = GlimpseConfig(224)


def some_actions(count, seed=0):
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed))


# worked out by hand from d = z (d_max - d_min) + d_min, y0 = y (H - d), rounded down
@pytest.mark.parametrize(
    ("action", "view", "first_and_last_patch"),
    [
        ((0, 0, 0), (0, 0, 32), (16, 16)),
        ((1, 1, 1), (0, 0, 224), (112, 112)),
        ((0.5, 0.5, 0.5), (48, 48, 128), (64, 64)),
        ((1, 1, 0), (192, 192, 32), (16, 16)),
        ((0.25, 0.75, 0.1), (43, 129, 51), (25, 26)),
    ],
)
def test_an_action_looks_where_the_paper_says(action, view, first_and_last_patch):
    views = views_of(torch.tensor([action]), PAPER)
    boxes = patch_boxes(views, PAPER)[0]
    assert views[0].tolist() == list(view)
    assert (boxes[0, 2] - boxes[0, 0], boxes[-1, 2] - boxes[-1, 0]) == first_and_last_patch


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("scene", [(224, 224), (97, 301), (301, 97)])
def test_every_action_is_a_legal_view(scene, quantize):
    config = GlimpseConfig(scene, quantize=quantize)
    y, x, side = views_of(some_actions(5000), config).unbind(1)
    assert (side >= 32).all()
    assert (side <= min(scene)).all()
    assert (y >= 0).all()
    assert (x >= 0).all()
    # float32 rounds y0 + d to within some millionths
    assert (y + side <= scene[0] + 1e-4).all()
    assert (x + side <= scene[1] + 1e-4).all()


def test_the_ends_of_the_pan_reach_the_borders_at_every_zoom():
    actions = some_actions(500)
    actions[:, :2] = 1
    y, x, side = views_of(actions, GlimpseConfig((97, 301))).unbind(1)
    assert (y + side == 97).all()
    assert (x + side == 301).all()


def test_quantized_views_are_whole_pixels_and_others_are_not():
    assert (views_of(some_actions(100), PAPER) % 1 == 0).all()
    assert (views_of(some_actions(100), GlimpseConfig(224, quantize=False)) % 1 != 0).any()


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("scene", [(224, 224), (97, 301)])
def test_the_action_of_a_view_leads_back_to_it(scene, quantize):
    config = GlimpseConfig(scene, quantize=quantize)
    views = views_of(some_actions(20_000), config)
    actions = action_of(views, config)
    assert ((actions >= 0) & (actions <= 1)).all()
    torch.testing.assert_close(views_of(actions, config), views, atol=0 if quantize else 1e-3, rtol=0)


def test_where_there_is_no_choice_the_action_is_in_the_middle():
    whole = torch.tensor([[0.0, 0.0, 32.0]])
    assert action_of(whole, GlimpseConfig(32)).tolist() == [[0.5, 0.5, 0.5]]
    assert action_of(torch.tensor([[0.0, 0.0, 224.0]]), PAPER).tolist() == [[0.5, 0.5, 1.0]]


def test_a_smaller_largest_scale_leaves_room_to_pan_at_full_view():
    views = views_of(torch.ones(1, 3), GlimpseConfig(224, max_scale=0.5))
    assert views.tolist() == [[112, 112, 112]]


def test_fixed_scale_replaces_the_zoom():
    views = views_of(some_actions(50), GlimpseConfig(224, fixed_scale=0.5))
    assert views[:, 2].unique().tolist() == [128]


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("grid", [1, 2, 3])
def test_patches_tile_the_view_row_by_row(grid, quantize):
    config = GlimpseConfig(100, patch_size=8, grid=grid, quantize=quantize)
    views = views_of(some_actions(200), config)
    boxes = patch_boxes(views, config)
    y, x, side = views.unbind(1)
    area = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).sum(1)
    torch.testing.assert_close(area, side**2)
    assert torch.equal(boxes[:, 0, :2], torch.stack([y, x], 1))
    torch.testing.assert_close(boxes[:, -1, 2:], torch.stack([y + side, x + side], 1))
    table = boxes.view(-1, grid, grid, 4)
    assert torch.equal(table[:, 1:, :, 0], table[:, :-1, :, 2])
    assert torch.equal(table[:, :, 1:, 1], table[:, :, :-1, 3])


def test_only_the_last_row_and_column_are_larger_each_in_its_own_direction():
    boxes = patch_boxes(torch.tensor([[0.0, 0.0, 51.0]]), PAPER)[0]
    sizes = (boxes[:, 2:] - boxes[:, :2]).tolist()
    assert sizes == [[25, 25], [25, 26], [26, 25], [26, 26]]


def test_edges_are_those_of_the_boxes():
    views = views_of(some_actions(20), PAPER)
    rows, columns = patch_edges(views, PAPER)
    boxes = patch_boxes(views, PAPER)
    assert torch.equal(rows, torch.stack([boxes[:, 0, 0], boxes[:, 2, 0], boxes[:, 2, 2]], 1))
    assert torch.equal(columns, torch.stack([boxes[:, 0, 1], boxes[:, 1, 1], boxes[:, 1, 3]], 1))


def test_normalised_boxes_lie_between_minus_one_and_one():
    boxes = torch.tensor([[0.0, 0.0, 50.0, 200.0], [25.0, 50.0, 25.0, 150.0]])
    assert normalised(boxes, (50, 200)).tolist() == [[-1, -1, 1, 1], [0, -0.5, 0, 0.5]]


# 100 T d_cam^2 / (H W)
@pytest.mark.parametrize(
    ("patch", "grid", "glimpses", "percent"),
    [
        (16, 2, 12, 24.49),
        (16, 2, 14, 28.57),
        (16, 2, 9, 18.37),
        (16, 2, 3, 6.12),
        (16, 2, 8.3, 16.94),
        (16, 1, 12, 6.12),
        (16, 3, 4, 18.37),
        (16, 3, 8, 36.73),
    ],
)
def test_pixels_captured_are_those_of_the_papers_tables(patch, grid, glimpses, percent):
    config = GlimpseConfig(224, patch_size=patch, grid=grid)
    assert config.pixel_percent(glimpses) == pytest.approx(percent, abs=0.005)


@pytest.mark.parametrize(
    ("row", "value"), [(2, [0.5, 1.5, 0.25]), (0, [float("nan"), 0.0, 0.0]), (3, [-0.25, 0.0, 0.0])]
)
def test_an_illegal_action_is_refused_with_its_row_and_value(row, value):
    actions = torch.full((4, 3), 0.5)
    actions[row] = torch.tensor(value)
    with pytest.raises(ValueError, match=rf"\[0, 1\], got \[{value[0]}, {value[1]}, {value[2]}\] in row {row}"):
        views_of(actions, PAPER)


@pytest.mark.parametrize("shape", [(3,), (4, 2), (2, 4, 3)])
def test_actions_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected actions \(y, x, z\) of shape \[B, 3\], got"):
        views_of(torch.zeros(shape), PAPER)
