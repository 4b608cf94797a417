"""Arguments of a private release, of the features and of the training that few users need, grouped by what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from torch import nn

from lightning_eff.accounting import Adjacency
from lightning_eff.arguments import check_choice, check_number, check_whole
from lightning_eff.synthesis.features.objective import Estimator

InputRange = Literal["auto", "unit", "signed", "any"]
Weighting = Literal["conditional", "proportional", "joint"]
Schedule = Literal["cosine", "step", "constant"]


@dataclass(frozen=True)
class ReleaseOptions:
    """What one release promises, and how it reads the data.

    Attributes:
        adjacency: Which data sets count as neighbours: ``"replace_one"``, equally many records one of which differs
            (their number n is public), or ``"add_remove"``, one record more or less (n is private).
        num_records: n, where you want it checked; under ``"add_remove"`` only needed beside a known ``label_prior``,
            as a public estimate.
        label_prior: ``"private"`` releases noisy class counts in the same draw of noise. ``"uniform"`` or a list of
            C shares says that the shares are public; counts are then not read. A class of share 0 is not trained.
        count_weight: kappa > 0, weight of the counts inside the release; by default 1 for ``"replace_one"``, where the
            counts cost nothing up to there, and 0.1 for ``"add_remove"``.
        max_contributions: Records of one person, each read once, or times a record may be read, >= 1. The noise grows
            with it.
        max_epsilon: Bound on epsilon of all releases of one module together; ``None`` for no bound.
        batch_size: Records read at a time, >= 1.
        allow_nonprivate_validation: Let a data module's validation records be compared with generated ones
            (``val/mmd2``); what they tell is not covered by the guarantee, and the report says so.
        noise_seed: Seed of the noise, for tests only: whoever knows it can take the noise away.
    """

    adjacency: Adjacency = "replace_one"
    num_records: int | None = None
    label_prior: Literal["private", "uniform"] | list[float] = "private"
    count_weight: float | None = None
    max_contributions: int = 1
    max_epsilon: float | None = None
    batch_size: int = 1024
    allow_nonprivate_validation: bool = False
    noise_seed: int | None = None

    def __post_init__(self) -> None:
        _make_plain(self)
        check_choice("adjacency", self.adjacency, get_args(Adjacency))
        for name in ("num_records", "max_contributions", "batch_size"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least=1)
        if self.count_weight is not None:
            check_number("count_weight", self.count_weight, above=0)
        if self.max_epsilon is not None and self.max_epsilon != math.inf:
            check_number("max_epsilon", self.max_epsilon, above=0)
        if self.noise_seed is not None:
            check_whole("noise_seed", self.noise_seed, least=0)
        if not isinstance(self.label_prior, str):
            shares = [float(share) for share in self.label_prior]
            if not all(share >= 0 for share in shares) or not abs(math.fsum(shares) - 1) <= 1e-6:  # NaN neither
                raise ValueError(f"label_prior must hold shares >= 0 with sum 1, got {shares}")
            object.__setattr__(self, "label_prior", shares)
        else:
            check_choice("label_prior", self.label_prior, ("private", "uniform"))
        if self.adjacency == "add_remove" and not self.counts_are_released and self.num_records is None:
            raise ValueError(
                "with a known label_prior no counts are released, and under adjacency='add_remove' the number of "
                "records is private: state a public estimate as num_records, or take label_prior='private'"
            )

    @property
    def counts_are_released(self) -> bool:
        """Whether class counts are part of the release."""
        return self.label_prior == "private"

    @property
    def kappa(self) -> float:
        """Weight of the counts, with its default filled in."""
        return self.count_weight or (1.0 if self.adjacency == "replace_one" else 0.1)

    @property
    def sensitivity(self) -> float:
        """Delta: how far one person's records move the released vector at most, in the L2 norm.

        Replacing a record within its class moves a class sum by at most 2; replacing it by one of another class moves
        two sums by 1 each and two counts by kappa each.
        """
        kappa = self.kappa if self.counts_are_released else 0.0
        if self.adjacency == "add_remove":
            return self.max_contributions * math.sqrt(1 + kappa**2)
        return self.max_contributions * max(2.0, math.sqrt(2 + 2 * kappa**2))


@dataclass(frozen=True)
class FeatureOptions:
    """The untrained network whose gradients are the features.

    Attributes:
        network: Your own; ``None`` builds :class:`~lightning_eff.synthesis.FCFeatureNet` from ``feature_widths``.
            It must not have been trained on, or chosen by, the private data.
        seed: Of the weights of the network built here.
        input_range: In which range records lie: ``"unit"`` [0, 1], ``"signed"`` [-1, 1], ``"any"``; ``"auto"`` takes
            ``"unit"`` for images ``[C, H, W]``, ``"any"`` for vectors, and leaves tables to their schema. Records and
            generated samples outside it are refused.
        sketch_dim: Compress every class sum to so many coordinates, for memory; ``None`` keeps all.
    """

    network: nn.Module | None = None
    seed: int = 0
    input_range: InputRange = "auto"
    sketch_dim: int | None = None

    def __post_init__(self) -> None:
        _make_plain(self)
        check_choice("input_range", self.input_range, get_args(InputRange))
        check_whole("seed", self.seed, least=0)
        if self.sketch_dim is not None:
            check_whole("sketch_dim", self.sketch_dim, least=1)


@dataclass(frozen=True)
class MatchingOptions:
    """How the generator is trained to match the release; none of it costs privacy.

    Attributes:
        weighting: Weight of class c in the loss: ``"conditional"`` 1/C, also right for rare classes,
            ``"proportional"`` its share, ``"joint"`` the share squared, as the published code has it for labels drawn
            from their distribution.
        estimator: ``"u"`` is unbiased; ``"v"``, the published one, rewards samples that resemble each other.
        lr_schedule: ``"cosine"`` to zero over all steps, ``"step"`` times 0.9 every ``lr_period`` steps, or
            ``"constant"``.
        lr_period: Steps between two decays of ``"step"``, >= 1.
        seed: Of the latent codes; each step and each process has its own, so that a resumed run goes on as it would
            have.
    """

    weighting: Weighting = "conditional"
    estimator: Estimator = "u"
    lr_schedule: Schedule = "cosine"
    lr_period: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        _make_plain(self)
        check_choice("weighting", self.weighting, get_args(Weighting))
        check_choice("estimator", self.estimator, get_args(Estimator))
        check_choice("lr_schedule", self.lr_schedule, get_args(Schedule))
        check_whole("lr_period", self.lr_period, least=1)
        check_whole("seed", self.seed, least=0)


Options = TypeVar("Options", ReleaseOptions, FeatureOptions, MatchingOptions)


def options_from(kind: type[Options], given: Options | Mapping[str, Any] | None) -> Options:
    """Options from an object of their kind, from a mapping of its arguments, or the defaults for ``None``."""
    if isinstance(given, kind):
        return given
    known = [field.name for field in fields(kind)]
    if given is not None and (not isinstance(given, Mapping) or set(given) - set(known)):
        raise ValueError(f"expected {kind.__name__} or a dict with some of {known}, got {given!r}")
    return kind(**(given or {}))


def plain_options(options: ReleaseOptions | FeatureOptions | MatchingOptions) -> dict[str, Any]:
    """What :func:`options_from` takes back, in plain Python; a network is left out."""
    return {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if not isinstance(getattr(options, field.name), nn.Module)
    }


def _make_plain(options: ReleaseOptions | FeatureOptions | MatchingOptions) -> None:
    """NumPy's numbers to Python's: these go into checkpoints."""
    for field in fields(options):
        if isinstance(value := getattr(options, field.name), np.generic):
            object.__setattr__(options, field.name, value.item())
