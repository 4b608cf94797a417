"""When a sample is sure enough to leave: scores of exits, and thresholds in the unit users speak.

A policy turns logits ``[B, C]`` into scores ``[B]``, float32, higher is surer; a sample leaves if its score is at
least the threshold of the exit. Sources: highest probability, SDN (arXiv 1810.07052); entropy, BranchyNet
(arXiv 1709.01686); patience, PABEE (arXiv 2006.04152). Shapes: ``B`` batch, ``C`` classes, ``E`` exits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

# What a policy remembers of the samples between exits: None before the first, else a pytree of tensors [B, ...],
# rows of which are selected as samples leave.
State = Any
# (logits [B, C], exit_index, state) -> (scores [B], state). Any, not Tensor: jsonargparse would look for subclasses.
ScoreFunction = Callable[[Any, int, Any], tuple[Any, Any]]


def score(
    policy: Policy, logits: Tensor, exit_index: int, state: State = None, temperature: float | Tensor = 1.0
) -> tuple[Tensor, State]:
    """Score the samples at one exit; every engine and every metric goes through here.

    In bfloat16 0.999 rounds to 1, so scores are computed in float32 whatever comes.

    Args:
        policy: how to score.
        logits: ``[B, C]`` of any floating type.
        exit_index: number of the exit, from 0.
        state: what the policy returned at the previous exit for the same samples, ``None`` at the first one.
        temperature: divides the logits, > 0.

    Returns:
        Scores ``[B]`` in float32, -inf for rows with a logit (or a score) that is not finite, and the new state.
    """
    logits = logits.float()
    if isinstance(temperature, Tensor) or temperature != 1.0:
        logits = logits / temperature
    scores, state = policy(logits, exit_index, state)
    scores, total = scores.float(), logits.sum(-1)  # a sum is finite only where all its terms are
    # of a single sample on the CPU, reading numbers is cheaper than operators
    if not is_compiling() and len(logits) == 1 and logits.device.type == "cpu":
        fine = math.isfinite(total.item()) and not math.isnan(scores.item())
        return scores if fine else torch.full_like(scores, -math.inf), state
    guarded = torch.add(scores, total, alpha=0)  # 0 * inf is NaN
    return guarded.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf), state


class Policy(ABC):
    """How sure a sample is at an exit; a subclass may have ``name`` as a plain class attribute.

    Attributes:
        remembers: whether scores depend on the exits before, through the state; then disabling one changes what later
            ones say.
    """

    remembers: bool = False

    @property
    @abstractmethod
    def name(self) -> str:
        """What tables, files and :func:`policy_from` call it."""

    @abstractmethod
    def __call__(self, logits: Tensor, exit_index: int, state: State) -> tuple[Tensor, State]:
        """Logits ``[B, C]`` in float32 -> scores ``[B]``, higher is surer, and the state for the next exit."""

    def to_score(self, threshold: float | None) -> float:
        """Turn a threshold in the user's unit into a score; ``None``, a disabled exit, is +inf.

        Raises:
            ValueError: no threshold of this policy.
        """
        self.check(threshold)
        return math.inf if threshold is None else threshold

    def to_threshold(self, score: float) -> float | None:
        """Turn a score back into the user's unit; +inf is ``None``."""
        return None if score == math.inf else score

    def check(self, threshold: float | None) -> None:
        """Raise ValueError unless ``threshold`` is a number, or ``None`` for a disabled exit."""
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool) and not math.isnan(threshold)
        if threshold is not None and not number:
            raise ValueError(
                f"expected a threshold of the policy {self.name!r} or None to disable the exit, got {threshold!r}"
            )

    @abstractmethod
    def grid(self, points: int, num_exits: int, num_classes: int) -> list[float]:
        """Return thresholds in the user's unit that span the trade-off, from all leave at once to few leave.

        Args:
            points: how many, >= 2; policies that count exits have one a count.
            num_exits: exits, >= 1, the backbone's own output not counted.
            num_classes: classes, >= 2.
        """


class _Bounded(Policy):
    """Scores in [0, 1]: a threshold above 1 is out of reach, it disables the exit."""

    def to_score(self, threshold: float | None) -> float:
        score = super().to_score(threshold)
        return math.inf if score > 1 else score

    def grid(self, points: int, num_exits: int, num_classes: int) -> list[float]:
        return _linspace(0.0, 1.0, points)


@dataclass(frozen=True)
class MaxProb(_Bounded):
    """Highest probability; thresholds are probabilities, useful in (1/C, 1]; above 1 disables the exit."""

    name = "max_prob"

    def __call__(self, logits: Tensor, exit_index: int, state: State) -> tuple[Tensor, State]:
        """``max_c p_c``."""
        return logits.softmax(-1).amax(-1), state


@dataclass(frozen=True)
class Margin(_Bounded):
    """Lead of the first class over the second; thresholds are differences of probabilities, above 1 disables."""

    name = "margin"

    def __call__(self, logits: Tensor, exit_index: int, state: State) -> tuple[Tensor, State]:
        """``p_(1) - p_(2)``."""
        first, second = logits.softmax(-1).topk(2, dim=-1).values.unbind(-1)
        return first - second, state


@dataclass(frozen=True)
class Entropy(Policy):
    """Entropy of the probabilities: a sample leaves if it is at most the threshold. Scores are minus the entropy.

    Args:
        normalized: thresholds are shares of ``ln C``, in [0, 1], instead of nats.
    """

    normalized: bool = False

    @property
    def name(self) -> str:
        """What :func:`policy_from` calls it."""
        return "normalized_entropy" if self.normalized else "entropy"

    def __call__(self, logits: Tensor, exit_index: int, state: State) -> tuple[Tensor, State]:
        """``sum_c p_c ln p_c``, where ``0 ln 0`` is 0."""
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
        return -(entropy / math.log(logits.shape[-1]) if self.normalized else entropy), state

    def to_score(self, threshold: float | None) -> float:
        """Minus the entropy; ``None`` is +inf."""
        score = super().to_score(threshold)
        return math.inf if threshold is None else -score

    def check(self, threshold: float | None) -> None:
        """Raise ValueError unless ``threshold`` is an entropy >= 0 or ``None``."""
        super().check(threshold)
        if threshold is not None and threshold < 0:
            raise ValueError(
                f"expected an entropy >= 0, or None to disable the exit, got {threshold!r}; what calibrate() found is "
                "handed over as it is: network.set_thresholds(calibration)"
            )

    def to_threshold(self, score: float) -> float | None:
        """Entropy; +inf is ``None``."""
        return None if score == math.inf else 0.0 - score

    def grid(self, points: int, num_exits: int, num_classes: int) -> list[float]:
        """From the entropy of a uniform guess down to 0."""
        return _linspace(1.0 if self.normalized else math.log(num_classes), 0.0, points)


@dataclass(frozen=True)
class Patience(Policy):
    """How often in a row an exit agreed with the one before; thresholds are counts.

    Patience 0 leaves at the first exit, patience P needs P + 1 equal predictions in a row. Disabled exits are no part
    of the row. The published code counts predictions from 1 and leaves on ``> t``; its t is the patience here.
    """

    name = "patience"
    remembers = True

    def __call__(self, logits: Tensor, exit_index: int, state: State) -> tuple[Tensor, State]:
        """Count; the state is the counter and the prediction before, both ``[B]``."""
        highest, prediction = logits.max(-1)
        prediction = torch.where(highest.isfinite(), prediction, -1)  # nothing agrees with an exit that broke down
        if state is None:
            counter = torch.zeros_like(highest)
        else:
            counter = (state[0] + 1) * (prediction == state[1])
        return counter, (counter, prediction)

    def check(self, threshold: float | None) -> None:
        """Raise ValueError unless ``threshold`` is a whole number >= 0, infinite or ``None``."""
        super().check(threshold)
        if threshold is not None and math.isfinite(threshold) and (threshold < 0 or threshold != int(threshold)):
            raise ValueError(f"expected a patience that is a whole number >= 0, or None, got {threshold!r}")

    def grid(self, points: int, num_exits: int, num_classes: int) -> list[float]:
        """``0 .. E``; with the last no sample leaves early."""
        return [float(count) for count in range(num_exits + 1)]


@dataclass(frozen=True)
class Custom(Policy):
    """A function of your own.

    Args:
        function: ``(logits [B, C] in float32, exit_index, state) -> (scores [B], state)``, higher is surer.
        low: score that every sample reaches; where the grid of thresholds begins.
        high: score that few samples reach; where it ends.
        remembers: whether it uses the state.
    """

    function: ScoreFunction
    low: float = 0.0
    high: float = 1.0
    remembers: bool = True

    def __post_init__(self) -> None:
        """Check the range."""
        if not self.low < self.high or not math.isfinite(self.high - self.low):
            raise ValueError(f"expected finite low < high, got {self.low} and {self.high}")

    @property
    def name(self) -> str:
        """Name of the function."""
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def __call__(self, logits: Tensor, exit_index: int, state: State) -> tuple[Tensor, State]:
        """Ask the function.

        Raises:
            ValueError: it does not return one score per sample beside its state.
        """
        result = self.function(logits, exit_index, state)
        scores = result[0] if isinstance(result, tuple) and len(result) == 2 else None
        if not isinstance(scores, Tensor) or scores.shape != logits.shape[:1]:
            came = list(scores.shape) if isinstance(scores, Tensor) else f"a {type(result).__name__}"
            raise ValueError(f"expected the policy {self.name!r} to return (scores [{len(logits)}], state), got {came}")
        return scores, result[1]

    def grid(self, points: int, num_exits: int, num_classes: int) -> list[float]:
        """From ``low`` to ``high``."""
        return _linspace(self.low, self.high, points)


_NAMED = {policy.name: policy for policy in (MaxProb(), Entropy(), Entropy(normalized=True), Margin(), Patience())}


def policy_from(policy: str | ScoreFunction | Policy) -> Policy:
    """Return the policy behind a name or a function; a :class:`Policy` is returned as it is.

    Raises:
        ValueError: an unknown name, or nothing that can be called.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str) and policy in _NAMED:
        return _NAMED[policy]
    if isinstance(policy, str | type) or not callable(policy):
        raise ValueError(
            f"expected a policy out of {', '.join(_NAMED)}, a Policy, or a callable (logits, exit_index, state) -> "
            f"(scores, state), got {policy!r}"
        )
    return Custom(policy)


def _linspace(start: float, end: float, points: int) -> list[float]:
    return [start + (end - start) * i / (points - 1) for i in range(points)]
