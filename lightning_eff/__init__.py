"""PyTorch Lightning plug-ins that make models cheaper.

Every public name can be imported from here. The rooms behind them are imported on first use (PEP 562), so that
``import lightning_eff`` costs next to nothing and pulls in none of the heavy dependencies.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_eff.strategy_names import register_strategies

if TYPE_CHECKING:
    from lightning_eff import accounting, cli, data, early_exit, lidar, models, pruning, reporting, shapley, surgery
    from lightning_eff.accounting import PrivacyLedger
    from lightning_eff.batch import BatchKeys, split_batch
    from lightning_eff.data import DigitsDataModule, FashionMNISTDataModule
    from lightning_eff.early_exit import (
        EarlyExitModule,
        ExitLosses,
        ExitReport,
        GradientDominance,
        Head,
        MultiExitNetwork,
        Phase,
        PhaseEarlyStopping,
        ThresholdCalibration,
        export_early_exit,
        load_early_exit,
    )
    from lightning_eff.lidar import (
        ColumnInterpolation,
        DepthCompletionMetrics,
        DepthCompletionModule,
        Dynamic,
        EstimationOptions,
        IPBasicCompletion,
        KittiDepthDataModule,
        LidarKeys,
        LidarSaSCallback,
        LidarSaSSelector,
        LightDepthCompletionNet,
        LineDropout,
        LineGameOptions,
        LineSelection,
        PullPushCompletion,
        SparseToDenseResNet,
        Spread,
        SyntheticLidarDataModule,
        line_shapley,
    )
    from lightning_eff.models import ImageClassifier, LeNet, SmallCNN, SmallResNet
    from lightning_eff.pruning import (
        Allocation,
        Calibration,
        ChannelGame,
        DirichletOptions,
        DirichletPosterior,
        DirichletPruneCallback,
        GameOptions,
        Layers,
        RandomChannelPruningCallback,
        Repair,
        Schedule,
        Search,
        ShapleyPruningCallback,
        StructuredPruningCallback,
        compare_criteria,
        dirichlet_kl,
        dirichlet_scores,
    )
    from lightning_eff.surgery import (
        ChannelGraph,
        PruningPlan,
        apply_plan,
        export_model,
        load_pruned,
        profile,
        prunable,
        save_pruned,
    )

__version__ = "0.1.0"

_ROOMS = ("accounting", "cli", "data", "early_exit", "lidar", "models", "pruning", "reporting", "shapley", "surgery")

_ROOM_OF = {
    "PrivacyLedger": "accounting",
    "BatchKeys": "batch",
    "split_batch": "batch",
    "DigitsDataModule": "data",
    "FashionMNISTDataModule": "data",
    "EarlyExitModule": "early_exit",
    "ExitLosses": "early_exit",
    "ExitReport": "early_exit",
    "GradientDominance": "early_exit",
    "Head": "early_exit",
    "MultiExitNetwork": "early_exit",
    "Phase": "early_exit",
    "PhaseEarlyStopping": "early_exit",
    "ThresholdCalibration": "early_exit",
    "export_early_exit": "early_exit",
    "load_early_exit": "early_exit",
    "ColumnInterpolation": "lidar",
    "DepthCompletionMetrics": "lidar",
    "DepthCompletionModule": "lidar",
    "Dynamic": "lidar",
    "EstimationOptions": "lidar",
    "IPBasicCompletion": "lidar",
    "KittiDepthDataModule": "lidar",
    "LidarKeys": "lidar",
    "LidarSaSCallback": "lidar",
    "LidarSaSSelector": "lidar",
    "LightDepthCompletionNet": "lidar",
    "LineDropout": "lidar",
    "LineGameOptions": "lidar",
    "LineSelection": "lidar",
    "PullPushCompletion": "lidar",
    "SparseToDenseResNet": "lidar",
    "Spread": "lidar",
    "SyntheticLidarDataModule": "lidar",
    "line_shapley": "lidar",
    "ImageClassifier": "models",
    "LeNet": "models",
    "SmallCNN": "models",
    "SmallResNet": "models",
    "Allocation": "pruning",
    "Calibration": "pruning",
    "ChannelGame": "pruning",
    "DirichletOptions": "pruning",
    "DirichletPosterior": "pruning",
    "DirichletPruneCallback": "pruning",
    "GameOptions": "pruning",
    "Layers": "pruning",
    "Schedule": "pruning",
    "RandomChannelPruningCallback": "pruning",
    "Repair": "pruning",
    "Search": "pruning",
    "compare_criteria": "pruning",
    "ShapleyPruningCallback": "pruning",
    "StructuredPruningCallback": "pruning",
    "dirichlet_kl": "pruning",
    "dirichlet_scores": "pruning",
    "ChannelGraph": "surgery",
    "PruningPlan": "surgery",
    "apply_plan": "surgery",
    "export_model": "surgery",
    "load_pruned": "surgery",
    "profile": "surgery",
    "prunable": "surgery",
    "save_pruned": "surgery",
}

__all__ = [
    "Allocation",
    "BatchKeys",
    "Calibration",
    "ChannelGame",
    "ChannelGraph",
    "ColumnInterpolation",
    "DepthCompletionMetrics",
    "DepthCompletionModule",
    "DigitsDataModule",
    "DirichletOptions",
    "DirichletPosterior",
    "DirichletPruneCallback",
    "Dynamic",
    "EarlyExitModule",
    "EstimationOptions",
    "ExitLosses",
    "ExitReport",
    "FashionMNISTDataModule",
    "GameOptions",
    "GradientDominance",
    "Head",
    "IPBasicCompletion",
    "ImageClassifier",
    "KittiDepthDataModule",
    "Layers",
    "LeNet",
    "LidarKeys",
    "LidarSaSCallback",
    "LidarSaSSelector",
    "LightDepthCompletionNet",
    "LineDropout",
    "LineGameOptions",
    "LineSelection",
    "MultiExitNetwork",
    "Phase",
    "PhaseEarlyStopping",
    "PrivacyLedger",
    "PruningPlan",
    "PullPushCompletion",
    "RandomChannelPruningCallback",
    "Repair",
    "Schedule",
    "Search",
    "ShapleyPruningCallback",
    "SmallCNN",
    "SmallResNet",
    "SparseToDenseResNet",
    "Spread",
    "StructuredPruningCallback",
    "SyntheticLidarDataModule",
    "ThresholdCalibration",
    "accounting",
    "apply_plan",
    "cli",
    "compare_criteria",
    "data",
    "dirichlet_kl",
    "dirichlet_scores",
    "early_exit",
    "export_early_exit",
    "export_model",
    "lidar",
    "line_shapley",
    "load_early_exit",
    "load_pruned",
    "models",
    "profile",
    "prunable",
    "pruning",
    "reporting",
    "save_pruned",
    "shapley",
    "split_batch",
    "surgery",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name in _ROOM_OF:
        value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_strategies()
