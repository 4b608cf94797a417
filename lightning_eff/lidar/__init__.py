"""Which lines of a lidar to keep, so that depth completed from them stays good (arXiv 2303.11720)."""

from lightning_eff.lidar.batches import BottomCrop, Downscale, LidarKeys, RandomFlip
from lightning_eff.lidar.callback import LidarSaSCallback
from lightning_eff.lidar.completion.columns import ColumnInterpolation
from lightning_eff.lidar.completion.forwarding import DepthForward
from lightning_eff.lidar.completion.hole_filling import PullPushCompletion
from lightning_eff.lidar.completion.ip_basic import IPBasicCompletion
from lightning_eff.lidar.completion.light import LightDepthCompletionNet
from lightning_eff.lidar.completion.module import DepthCompletionModule
from lightning_eff.lidar.completion.sparse_to_dense import SparseToDenseResNet
from lightning_eff.lidar.data import KittiDepthDataModule, SyntheticLidarDataModule
from lightning_eff.lidar.datasets import KittiDepthDataset, KittiScanDataset
from lightning_eff.lidar.dropout import LineDropout
from lightning_eff.lidar.estimators import EstimationOptions
from lightning_eff.lidar.evaluation import LineEvaluation
from lightning_eff.lidar.frames import Frame, frames_of
from lightning_eff.lidar.game import CompletionOptions, FrameGame, LineGame
from lightning_eff.lidar.gap import GapGame
from lightning_eff.lidar.lines import KITTI_HDL64E, LaserTable, LidarWarning, assign_lines, fit_laser_table
from lightning_eff.lidar.metrics import DepthCompletionMetrics, depth_errors
from lightning_eff.lidar.projection import Calibration, depth_lines, project_points, rasterize
from lightning_eff.lidar.report import LineSelection
from lightning_eff.lidar.selection import select_lines
from lightning_eff.lidar.selector import LidarSaSSelector
from lightning_eff.lidar.settings import Dynamic, LineGameOptions, Spread
from lightning_eff.lidar.synthetic import Scene, SyntheticLidarDataset
from lightning_eff.lidar.values import LineValues, line_shapley

__all__ = [
    "KITTI_HDL64E",
    "BottomCrop",
    "Calibration",
    "ColumnInterpolation",
    "CompletionOptions",
    "DepthCompletionMetrics",
    "DepthCompletionModule",
    "DepthForward",
    "Downscale",
    "Dynamic",
    "EstimationOptions",
    "Frame",
    "FrameGame",
    "GapGame",
    "IPBasicCompletion",
    "KittiDepthDataModule",
    "KittiDepthDataset",
    "KittiScanDataset",
    "LaserTable",
    "LidarKeys",
    "LidarSaSCallback",
    "LidarSaSSelector",
    "LidarWarning",
    "LightDepthCompletionNet",
    "LineDropout",
    "LineEvaluation",
    "LineGame",
    "LineGameOptions",
    "LineSelection",
    "LineValues",
    "PullPushCompletion",
    "RandomFlip",
    "Scene",
    "SparseToDenseResNet",
    "Spread",
    "SyntheticLidarDataModule",
    "SyntheticLidarDataset",
    "assign_lines",
    "depth_errors",
    "depth_lines",
    "fit_laser_table",
    "frames_of",
    "line_shapley",
    "project_points",
    "rasterize",
    "select_lines",
]
