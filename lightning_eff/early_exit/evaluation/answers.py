"""Where every sample of a data set left and with what answer, and the files that tell it.

Shapes: ``N`` samples, ``E`` exits, ``K = E + 1`` outputs, the last the backbone's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_eff.batch import take
from lightning_eff.documents import write_text
from lightning_eff.early_exit.evaluation.curve import BUDGETS, CurveResult, EarlyExitCurve
from lightning_eff.early_exit.evaluation.figures import (
    curve_figure,
    exit_figure,
    history_figure,
    output_labels,
    reliability_figure,
    samples_figure,
)
from lightning_eff.early_exit.evaluation.recording import Data, all_outputs, gathered, loaders_of
from lightning_eff.early_exit.inference.leaving import select_from_all
from lightning_eff.early_exit.module import EarlyExitModule
from lightning_eff.early_exit.network import MultiExitNetwork
from lightning_eff.reporting import Column, Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 1
SHOWN = 8


@dataclass(frozen=True)
class Answers:
    """What a network says about a data set at its thresholds, on the CPU.

    Attributes:
        exit_index: ``[N]``, output each sample leaves at.
        confidence: ``[N]``, score of the policy there.
        prediction: ``[N]``, class it is given.
        target: ``[N]``, its label.
        probability: ``[K, N]``, highest probability of every output.
        correct: ``[K, N]`` bool, whether every output is right.
        curve: accuracy against cost over thresholds.
        images: the samples that leave first and last with the fields above, None if inputs are no images.
    """

    exit_index: Tensor
    confidence: Tensor
    prediction: Tensor
    target: Tensor
    probability: Tensor
    correct: Tensor
    curve: CurveResult
    images: dict[str, Tensor] | None

    @property
    def right(self) -> Tensor:
        """``[N]`` bool, whether the answers given are right."""
        return self.prediction == self.target


def record_answers(trainer: Trainer, module: EarlyExitModule, data: Data) -> Answers:
    """Ask the network about all samples of the trainer's data; every process must call this.

    Samples of several processes come one process after the other, images are of this one.

    Raises:
        ValueError: there is no sample.
    """
    network = module.network
    curve = EarlyExitCurve(network.costs.fractions(), policy=network.policy).to(module.device)
    nothing = [torch.empty(0, network.num_classes, device=module.device)] * network.num_outputs
    # a process without samples must send tensors of the same kind as all others
    parts = [_answer(network, nothing, torch.empty(0, dtype=torch.int64, device=module.device))]
    images: dict[str, Tensor] | None = None
    with all_outputs(trainer, module, loaders_of(trainer, data), data) as batches:
        for inputs, target, logits in batches:
            curve.update(logits, target, network.temperatures)
            parts.append(_answer(network, logits, target))
            if isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.shape[1] in (1, 3):
                images = _first_and_last(images, {"images": inputs, **parts[-1]})
    result = curve.compute()
    whole = {name: gathered(torch.cat([part[name] for part in parts])).cpu() for name in parts[0]}
    for name in ("probability", "correct"):
        whole[name] = whole[name].T.contiguous()
    return Answers(**whole, curve=result, images=images)


@dataclass(frozen=True)
class ExitUse(Report):
    """How a network uses its exits on a data set.

    Tables: ``outputs``, ``budgets``, and ``exits`` with a row a sample. Figures: ``curve``, ``exits``, ``reliability``,
    ``samples`` where inputs are images, ``history`` where there is one.

    Attributes:
        answers: of the network to the data.
        network: that gave them, thresholds as they were.
        budgets: fractions of the plain backbone's cost told in table and figure.
        history: validation accuracy of the outputs, an epoch each.
        phases: name of the phase of each of these epochs.
    """

    data_tables = frozenset({"exits"})

    answers: Answers
    network: MultiExitNetwork
    budgets: Sequence[float] = BUDGETS
    history: Sequence[Mapping[str, float]] = ()
    phases: Sequence[str] = ()

    def tables(self) -> dict[str, Table]:
        """A row an output; accuracy at budgets; where every sample leaves, how sure the policy is, and its answer."""
        answers = self.answers
        told = [answers.exit_index, answers.confidence, answers.prediction]
        rows = zip(range(len(answers.target)), *(column.tolist() for column in told), strict=True)
        return {
            "outputs": self._outputs(),
            "budgets": answers.curve.budget_table(self.budgets),
            "exits": Table("Exits of samples", ["sample", "exit", "confidence", "prediction"], rows),
        }

    def figures(self) -> dict[str, Figure]:
        """Accuracy against cost, who leaves where, how honest scores are, first and last samples, training."""
        answers, network = self.answers, self.network
        unit = {"s": "time", "FLOPs": "FLOPs"}.get(network.costs.unit, "cost")
        figures = {
            "curve": curve_figure({network.policy.name: answers.curve}, budgets=self.budgets, cost=unit),
            "exits": exit_figure(answers.exit_index, answers.right, network.num_outputs),
            "reliability": reliability_figure(answers.probability, answers.correct),
        }
        if answers.images is not None:
            images, where, sure, said, meant = (
                answers.images[name] for name in ("images", "exit_index", "confidence", "prediction", "target")
            )
            figures["samples"] = samples_figure(images, where, sure, said, meant, network.num_outputs, count=SHOWN)
        if self.history:
            figures["history"] = history_figure(self.history, self.phases)
        return figures

    def save(self, dirpath: str | Path) -> None:
        """Write what programs read back: ``curve.json`` (:meth:`CurveResult.from_dict`) and ``thresholds.json``."""
        _dump(self.answers.curve.to_dict(), Path(dirpath) / "curve.json")
        _dump(_thresholds(self.answers, self.network), Path(dirpath) / "thresholds.json")

    def _outputs(self) -> Table:
        """A row an output: where it is, what it costs, how good it is alone, who leaves there and from where on."""
        answers, network = self.answers, self.network
        limits = network.thresholds
        costs = network.costs.fractions([limit is not None for limit in limits])
        counts = torch.bincount(answers.exit_index, minlength=network.num_outputs).tolist()
        right = torch.bincount(answers.exit_index[answers.right], minlength=network.num_outputs).tolist()
        told = ["off" if limit is None else f"{limit:.4g}" for limit in limits]
        rows = [
            (
                label,
                layer,
                100 * cost,
                100 * alone,
                100 * here / len(answers.target),
                100 * good / here if here else None,
                at,
            )
            for label, layer, cost, alone, here, good, at in zip(
                output_labels(network.num_outputs),
                [*network.exits, None],
                costs,
                answers.curve.head_accuracy,
                counts,
                right,
                [*told, None],
                strict=True,
            )
        ]
        mean = math.fsum(cost * count for cost, count in zip(costs, counts, strict=True)) / len(answers.target)
        return Table(
            f"Accuracy {answers.right.double().mean():.2%} at {mean:.1%} of the backbone's cost",
            [
                "output",
                "layer",
                Column("cost %", ".1f"),
                Column("accuracy alone %", ".2f"),
                Column("leave %", ".1f"),
                Column("right of them %", ".2f"),
                Column(f"threshold ({network.policy.name})", align="right"),
            ],
            rows,
            "Cost: of a sample that leaves there, in percent of the plain backbone, with the heads of enabled exits.",
        )


def _answer(network: MultiExitNetwork, logits: Sequence[Tensor], target: Tensor) -> dict[str, Tensor]:
    rule = network.rule
    given = select_from_all(rule, [output.float() for output in logits])
    tempered = [output.float() / t for output, t in zip(logits, rule.temperatures, strict=True)]
    return {
        "exit_index": given.exit_index,
        "confidence": given.confidence,
        "prediction": given.logits.argmax(-1),
        "target": target.long(),
        "probability": torch.stack([output.softmax(-1).amax(-1) for output in tempered], 1),
        "correct": torch.stack([output.argmax(-1) == target for output in logits], 1),
    }


def _first_and_last(held: dict[str, Tensor] | None, new: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the samples held and new ones, those that leave first, surest first, and last, least sure last."""
    if held is not None:
        new = {name: torch.cat([held[name], values]) for name, values in new.items()}
    order = new["confidence"].argsort(descending=True, stable=True)
    order = order[new["exit_index"][order].argsort(stable=True)]
    if len(order) > 2 * SHOWN:
        order = torch.cat([order[:SHOWN], order[-SHOWN:]])
    return {name: take(values, order) for name, values in new.items()}


def _thresholds(answers: Answers, network: MultiExitNetwork) -> dict[str, Any]:
    limits = [None if limit is None else limit if math.isfinite(limit) else str(limit) for limit in network.thresholds]
    return {
        "schema": SCHEMA,
        "policy": network.policy.name,
        "exits": list(network.exits),
        "thresholds": limits,
        "temperatures": network.temperatures.tolist(),
        "accuracy": answers.right.double().mean().item(),
    }


def _dump(values: Mapping[str, Any], path: Path) -> None:
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")
