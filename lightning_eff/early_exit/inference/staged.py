"""Answer a batch stage by stage: samples leave between the stages of a backbone that was cut at its exits.

Works where hooks do not, with skip connections around an exit for example. Shapes: ``B`` batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_eff.batch import batch_size
from lightning_eff.early_exit.inference.leaving import AllLeft, ExitOutput, Leaving
from lightning_eff.early_exit.inference.stages import Stages

if TYPE_CHECKING:
    from lightning_eff.early_exit.network import MultiExitNetwork


def predict_staged(
    network: MultiExitNetwork, stages: Stages, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> ExitOutput:
    """Answer a batch; what comes behind an exit runs on the samples that went on.

    Args:
        network: gives heads, rule and where the logits are in what the backbone returns; in evaluation mode.
        stages: its backbone, cut at its exits for inputs like these.
        args: inputs of ``B`` >= 1 samples.
        kwargs: inputs by keyword.

    Raises:
        CutError: the stages were cut for other inputs.
    """
    live: Sequence[Tensor] = stages.inputs(args, kwargs)
    leaving = Leaving(network.rule, network.heads, batch_size((args, kwargs)))
    try:
        for k in range(len(stages) - 1):
            feature, live = stages[k](*live)
            if leaving.rule.enabled(k) and (stay := leaving.at(k, feature)) is not None:
                live = stages.select(k + 1, live, stay)
    except AllLeft:
        return leaving.finish(None)
    return leaving.finish(network.output_of(stages[len(stages) - 1](*live)))
