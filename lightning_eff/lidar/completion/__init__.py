"""Networks and training-free methods that complete sparse depth: ``(rgb, sparse) -> depth``."""

from lightning_eff.lidar.completion.columns import ColumnInterpolation
from lightning_eff.lidar.completion.forwarding import DepthForward, Forward
from lightning_eff.lidar.completion.hole_filling import PullPushCompletion, pull_push
from lightning_eff.lidar.completion.ip_basic import IPBasicCompletion
from lightning_eff.lidar.completion.light import LightDepthCompletionNet
from lightning_eff.lidar.completion.module import DepthCompletionModule
from lightning_eff.lidar.completion.sparse_to_dense import SparseToDenseResNet

__all__ = [
    "ColumnInterpolation",
    "DepthCompletionModule",
    "DepthForward",
    "Forward",
    "IPBasicCompletion",
    "LightDepthCompletionNet",
    "PullPushCompletion",
    "SparseToDenseResNet",
    "pull_push",
]
