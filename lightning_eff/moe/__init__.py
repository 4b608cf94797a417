"""Fine-grained mixtures of experts: the layer, scaling laws, and plans for a budget of FLOPs.

arXiv 2402.07871. Laws and plans need NumPy and SciPy alone: what needs torch is imported on first use (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_eff.moe.config import Balance, Initialisation, MoEConfig, Routing
from lightning_eff.moe.decoder import DecoderConfig
from lightning_eff.moe.scaling import (
    ChinchillaLaw,
    ComputePlanner,
    DecoderShape,
    FineGrainedMoELaw,
    FitResult,
    Objective,
    Plan,
    PlanTable,
    append_run,
    fit_scaling_law,
    load_law,
    read_runs,
)

if TYPE_CHECKING:
    from lightning_eff.moe.auxiliary import collect_aux_losses, total_aux_loss
    from lightning_eff.moe.balance import update_balance_biases
    from lightning_eff.moe.callbacks import BalanceBiasUpdater, ExpertLoadMonitor
    from lightning_eff.moe.dense import DenseFFN
    from lightning_eff.moe.distributed import shard_experts, shard_model
    from lightning_eff.moe.functional import moe_ffn
    from lightning_eff.moe.injection import set_aux_scale
    from lightning_eff.moe.layer import FineGrainedMoE
    from lightning_eff.moe.metrics import ExpertLoad
    from lightning_eff.moe.model import DecoderLM
    from lightning_eff.moe.module import MoEScalingModule
    from lightning_eff.moe.recorder import RunRecorder
    from lightning_eff.moe.replace import replace_ffn
    from lightning_eff.moe.replace_callback import AuxLossScale, ReplaceFFN
    from lightning_eff.moe.routing import balance_loss, z_loss

__all__ = [
    "AuxLossScale",
    "Balance",
    "BalanceBiasUpdater",
    "ChinchillaLaw",
    "ComputePlanner",
    "DecoderConfig",
    "DecoderLM",
    "DecoderShape",
    "DenseFFN",
    "ExpertLoad",
    "ExpertLoadMonitor",
    "FineGrainedMoE",
    "FineGrainedMoELaw",
    "FitResult",
    "Initialisation",
    "MoEConfig",
    "MoEScalingModule",
    "Objective",
    "Plan",
    "PlanTable",
    "ReplaceFFN",
    "Routing",
    "RunRecorder",
    "append_run",
    "balance_loss",
    "collect_aux_losses",
    "fit_scaling_law",
    "load_law",
    "moe_ffn",
    "read_runs",
    "replace_ffn",
    "set_aux_scale",
    "shard_experts",
    "shard_model",
    "total_aux_loss",
    "update_balance_biases",
    "z_loss",
]

_FILE_OF = {
    "AuxLossScale": "replace_callback",
    "BalanceBiasUpdater": "callbacks",
    "DecoderLM": "model",
    "DenseFFN": "dense",
    "ExpertLoad": "metrics",
    "ExpertLoadMonitor": "callbacks",
    "FineGrainedMoE": "layer",
    "MoEScalingModule": "module",
    "ReplaceFFN": "replace_callback",
    "RunRecorder": "recorder",
    "balance_loss": "routing",
    "collect_aux_losses": "auxiliary",
    "moe_ffn": "functional",
    "replace_ffn": "replace",
    "set_aux_scale": "injection",
    "shard_experts": "distributed",
    "shard_model": "distributed",
    "total_aux_loss": "auxiliary",
    "update_balance_biases": "balance",
    "z_loss": "routing",
}


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
