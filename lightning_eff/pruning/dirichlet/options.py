"""How importance switches are trained (arXiv 2011.05985), and what the published code does instead."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_eff.arguments import check_number, check_whole
from lightning_eff.pruning.settings import check_choices, is_count_or_share


@dataclass(frozen=True)
class Prior:
    """What is expected of the switches before data are seen: Dir(alpha0, ..., alpha0).

    Attributes:
        alpha0: concentration, > 0; below 1 few channels are expected to matter.
        weight: factor on the divergence from the prior, >= 0; 1 is the evidence bound, 0 leaves the prior out.
        anneal_epochs: passes over which that factor grows from zero, >= 0.
        dataset_size: samples the divergence is weighed against; None asks the loader's data set.
    """

    alpha0: float = 0.5
    weight: float = 1.0
    anneal_epochs: float = 0.0
    dataset_size: int | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        check_number("alpha0", self.alpha0, above=0)
        check_number("weight", self.weight, least=0)
        check_number("anneal_epochs", self.anneal_epochs, least=0)
        if self.dataset_size is not None:
            check_whole("dataset_size", self.dataset_size)


@dataclass(frozen=True)
class Draws:
    """How switches are drawn where they are random (``estimator="sample"``).

    Attributes:
        number: forward passes per batch, >= 1.
        scope: a draw for every ``"sample"`` of a batch, or one for the whole ``"batch"``.
        average: over several passes the ``"loss"`` (a bound on the evidence), or the ``"logits"`` (published code).
    """

    number: int = 1
    scope: Literal["sample", "batch"] = "sample"
    average: Literal["loss", "logits"] = "loss"

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        check_choices(self)
        check_whole("number", self.number)


@dataclass(frozen=True)
class Gate:
    """Where and how strongly switches act.

    Attributes:
        scale: factor on the switches, > 0; ``"dim"`` the number of channels, so that gates are one on average. That
            looks natural and ranks far worse: the layer must run at a fraction of its scale.
        site: at the ``"consumer"``'s input, behind norm and activation; or at the ``"producer"``'s output.
        train_bn: let BatchNorm use the statistics of the batch.
    """

    scale: float | Literal["dim"] = 1.0
    site: Literal["consumer", "producer"] = "consumer"
    train_bn: bool = False

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        check_choices(self)
        if self.scale != "dim" and not (isinstance(self.scale, int | float) and self.scale > 0):
            raise ValueError(f'scale must be > 0 or "dim", got {self.scale!r}')


@dataclass(frozen=True)
class DirichletOptions:
    """How the switches of Dirichlet pruning are trained. The defaults are those that ranked best where measured.

    Attributes:
        estimator: ``"mean"`` gates by the expected switches; ``"sample"`` by random ones (implicit reparameterisation).
        draws: how these are drawn.
        prior: what is expected of the switches.
        gate: where they act.
        layers: switches of one layer at a time with the others open (``"layerwise"``), or of all at once (``"joint"``:
            cheaper by far, ranks worse).
        epochs: passes over the data, >= 1.
        max_batches: stop a pass after so many batches (int >= 1) or this fraction of them (float in (0, 1]).
        early_stop: end when the ranking of every layer has settled: Spearman's correlation with that of a twentieth of
            a pass earlier exceeds 0.99 twice in a row.
        lr: learning rate of the switches, > 0. Large steps let the prior win when switches are sampled.
        optimizer: ``"adam"``, or ``"sgd"`` with momentum 0.9.
        init: value that every free parameter starts at; the concentration is its softplus.
    """

    estimator: Literal["mean", "sample"] = "mean"
    draws: Draws = field(default_factory=Draws)
    prior: Prior = field(default_factory=Prior)
    gate: Gate = field(default_factory=Gate)
    layers: Literal["layerwise", "joint"] = "layerwise"
    epochs: int = 1
    max_batches: int | float | None = None
    early_stop: bool = False
    lr: float = 1e-2
    optimizer: Literal["adam", "sgd"] = "adam"
    init: float = -1.0

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        check_choices(self)
        check_number("lr", self.lr, above=0)
        check_number("init", self.init)
        check_whole("epochs", self.epochs)
        most = self.max_batches
        if most is not None and not is_count_or_share(most):
            raise ValueError(f"max_batches must be an int >= 1, a fraction in (0, 1] or None, got {most!r}")


_BEFORE_NORM = Gate(site="producer", train_bn=True)

PUBLISHED = {
    "LeNet": DirichletOptions(lr=1e-3, prior=Prior(2.0, weight=0.0), gate=_BEFORE_NORM),
    "LeNet, integral": DirichletOptions(
        lr=1e-3,
        prior=Prior(2.0, weight=0.0),
        gate=_BEFORE_NORM,
        epochs=3,
        estimator="sample",
        draws=Draws(150, scope="batch", average="logits"),
    ),
    "VGG-16": DirichletOptions(lr=0.1, optimizer="sgd", init=0.05, prior=Prior(0.05, weight=0.0), gate=_BEFORE_NORM),
    "WRN-28-10": DirichletOptions(lr=0.1, optimizer="sgd", layers="joint", prior=Prior(weight=0.0), gate=_BEFORE_NORM),
    "ResNet-56": DirichletOptions(lr=0.1, optimizer="sgd", init=1.0, layers="joint", prior=Prior(weight=0.0)),
}
"""What the published code does in each experiment, as near as these options come: the divergence is weighed with at
most 1e-6 or left out, gates stand before the norm in training mode. Its weights drift while switches are trained;
here they never do."""
