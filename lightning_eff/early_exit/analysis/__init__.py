"""Why an early-exit network is as it is: who pulls the backbone, what layers know, what lies between checkpoints."""

from lightning_eff.early_exit.analysis.callback import GradientDominance
from lightning_eff.early_exit.analysis.connectivity import (
    LinearPath,
    LossPlane,
    linear_path,
    loss_plane,
    random_direction,
)
from lightning_eff.early_exit.analysis.dominance import Dominance, DominanceHistory, gradient_dominance
from lightning_eff.early_exit.analysis.figures import (
    dominance_figure,
    information_figure,
    path_figure,
    plane_figure,
    rank_figure,
)
from lightning_eff.early_exit.analysis.information import (
    Information,
    LayerInformation,
    layer_information,
    mutual_information,
    prediction_information,
)
from lightning_eff.early_exit.analysis.rank import layer_ranks, numerical_rank

__all__ = [
    "Dominance",
    "DominanceHistory",
    "GradientDominance",
    "Information",
    "LayerInformation",
    "LinearPath",
    "LossPlane",
    "dominance_figure",
    "gradient_dominance",
    "information_figure",
    "layer_information",
    "layer_ranks",
    "linear_path",
    "loss_plane",
    "mutual_information",
    "numerical_rank",
    "path_figure",
    "plane_figure",
    "prediction_information",
    "random_direction",
    "rank_figure",
]
