"""How importance switches are trained (arXiv 2011.05985), and what the published code does instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_eff.pruning.settings import check_choices


@dataclass(frozen=True)
class DirichletOptions:
    """How the switches of Dirichlet pruning are trained. The defaults are those that ranked best where measured.

    Attributes:
        alpha0: concentration of the prior, > 0; below 1 it expects few channels to matter.
        estimator: ``"mean"`` gates by the expected switches; ``"sample"`` by random ones (implicit reparameterisation).
        num_samples: forward passes per batch of ``"sample"``, >= 1.
        sample_scope: a draw for every ``"example"`` of a batch, or one for the whole ``"batch"``.
        average: over several samples the ``"loss"`` (a bound on the evidence), or the ``"logits"`` (published code).
        epochs: passes over the data, >= 1.
        max_batches: stop a pass after so many batches (int >= 1) or this fraction of them (float in (0, 1]).
        lr: learning rate of the switches, > 0. Large steps let the prior win when switches are sampled.
        optimizer: ``"adam"``, or ``"sgd"`` with momentum 0.9.
        kl_weight: weight of the divergence from the prior, >= 0; 1 is the evidence bound.
        kl_anneal_epochs: passes over which that weight grows from zero, >= 0.
        init: value that every free parameter starts at; the concentration is its softplus.
        scale: factor on the switches, > 0; ``"dim"`` the number of channels, so that gates are one on average. That
            looks natural and ranks far worse: the layer must run at a fraction of its scale.
        layers: switches of one layer at a time with the others open (``"layerwise"``), or of all at once (``"joint"``:
            cheaper by far, ranks worse).
        gate_site: at the ``"consumer"``'s input, behind norm and activation; or at the ``"producer"``'s output.
        train_bn: let BatchNorm use the statistics of the batch.
        dataset_size: samples the divergence is weighed against; None asks the loader's data set.
    """

    alpha0: float = 0.5
    estimator: Literal["mean", "sample"] = "mean"
    num_samples: int = 1
    sample_scope: Literal["example", "batch"] = "example"
    average: Literal["loss", "logits"] = "loss"
    epochs: int = 1
    max_batches: int | float | None = None
    lr: float = 1e-2
    optimizer: Literal["adam", "sgd"] = "adam"
    kl_weight: float = 1.0
    kl_anneal_epochs: float = 0.0
    init: float = -1.0
    scale: float | Literal["dim"] = 1.0
    layers: Literal["layerwise", "joint"] = "layerwise"
    gate_site: Literal["consumer", "producer"] = "consumer"
    train_bn: bool = False
    dataset_size: int | None = None

    def __post_init__(self) -> None:
        """Check choices and ranges."""
        check_choices(self)
        for name in ("alpha0", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("epochs", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("kl_weight", "kl_anneal_epochs"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.scale != "dim" and not (isinstance(self.scale, int | float) and self.scale > 0):
            raise ValueError(f'scale must be > 0 or "dim", got {self.scale!r}')
        most = self.max_batches
        if most is not None and not (most >= 1 if isinstance(most, int) else 0 < most <= 1):
            raise ValueError(f"max_batches must be an int >= 1, a fraction in (0, 1] or None, got {most!r}")
        if self.dataset_size is not None and self.dataset_size < 1:
            raise ValueError(f"dataset_size must be >= 1 or None, got {self.dataset_size}")


_BEFORE_NORM = {"gate_site": "producer", "train_bn": True, "kl_weight": 0.0}

PUBLISHED = {
    "LeNet": DirichletOptions(lr=1e-3, alpha0=2.0, **_BEFORE_NORM),  # type: ignore[arg-type]
    "LeNet, integral": DirichletOptions(
        lr=1e-3,
        alpha0=2.0,
        epochs=3,
        estimator="sample",
        num_samples=150,
        sample_scope="batch",
        average="logits",
        **_BEFORE_NORM,  # type: ignore[arg-type]
    ),
    "VGG-16": DirichletOptions(lr=0.1, optimizer="sgd", alpha0=0.05, init=0.05, **_BEFORE_NORM),  # type: ignore[arg-type]
    "WRN-28-10": DirichletOptions(lr=0.1, optimizer="sgd", layers="joint", **_BEFORE_NORM),  # type: ignore[arg-type]
    "ResNet-56": DirichletOptions(lr=0.1, optimizer="sgd", init=1.0, layers="joint", kl_weight=0.0),
}
"""What the published code does in each experiment, as near as these options come: the divergence is weighed with at
most 1e-6 or left out, gates stand before the norm in training mode. Its weights drift while switches are trained;
here they never do."""
