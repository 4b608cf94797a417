"""Training-free completions on a real frame: every second line is left out, and errors are those at its returns."""

import pytest
import torch
from torch import nn

from lightning_eff.lidar.batches import NO_LINE
from lightning_eff.lidar.completion import ColumnInterpolation, IPBasicCompletion, PullPushCompletion
from lightning_eff.lidar.datasets import KittiScanDataset
from lightning_eff.lidar.metrics import depth_errors


@pytest.mark.parametrize(
    ("model", "mae"),
    [  # in mm, as measured; the mean depth of the lines kept gives 2902
        (PullPushCompletion(), 689),
        (ColumnInterpolation(), 603),
        (IPBasicCompletion(), 742),
        (IPBasicCompletion("bilateral"), 762),
    ],
)
def test_lines_left_out_are_found_again(kitti, model: nn.Module, mae: float):
    frame = KittiScanDataset(kitti)[0]
    sparse, line_idx = frame["sparse"][None], frame["line_idx"][None]
    kept = (line_idx != NO_LINE) & (line_idx % 2 == 0)
    errors = depth_errors(model(None, sparse * kept), sparse * ~kept, ["mae"])
    assert errors["mae"].item() == pytest.approx(mae, rel=0.01)


def test_completion_is_finite_and_positive_for_any_number_of_lines(kitti):
    frame = KittiScanDataset(kitti, scale=4)[1]
    sparse = torch.cat([frame["sparse"][None] * (frame["line_idx"] < lines) for lines in (0, 1, 2, 20, 64)])
    for model in (PullPushCompletion(), ColumnInterpolation(), IPBasicCompletion()):
        depth = model(None, sparse)
        assert depth.isfinite().all(), model
        assert (depth > 0).all(), model
