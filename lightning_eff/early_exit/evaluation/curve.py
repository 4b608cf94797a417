"""Accuracy against cost over thresholds: recorded in one pass, read off at any budget (arXiv 2407.14320, section 4).

Shapes: ``B`` batch, ``C`` classes, ``N`` samples, ``E`` exits, ``K = E + 1`` outputs, ``T`` thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from scipy.integrate import quad
from torch import Tensor
from torchmetrics import Metric

from lightning_eff.arguments import check_choice, check_whole
from lightning_eff.documents import parsed, reading
from lightning_eff.early_exit.evaluation.replay import Comparison, replay
from lightning_eff.early_exit.inference.policies import Policy, ScoreFunction, policy_from, score
from lightning_eff.reporting import Column, Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rule = Literal["max", "last"]
Weights = Literal["uniform", "log"] | Callable[[float], float]

BUDGETS = (0.25, 0.5, 0.75, 1.0)
MOST = 10  # heads can carry the cost above that of the backbone, but not as far as this
SCHEMA = 1
# relative; a mean cost is a sum of rounded terms
TOLERANCE = 1e-9


def check_budgets(budgets: Sequence[float]) -> None:
    """Raise ValueError unless all are fractions of the plain backbone's cost; percent taken for fractions are told."""
    if not all(0 < budget <= MOST for budget in budgets):
        raise ValueError(
            f"expected budgets in (0, {MOST}], fractions of the backbone's cost (0.5, not 50), got {list(budgets)}"
        )


@dataclass  # not frozen: torchmetrics sets the fields of what compute returns anew
class CurveResult(Report):
    """What thresholds lead to on a data set; costs are fractions of the plain backbone's.

    Tables: ``budgets``, and ``points`` with a row a threshold. Figure: ``curve``.

    Attributes:
        policy: name of the policy.
        thresholds: ``[T]`` in its unit, common to all exits, from all samples leave at once to few leave.
        accuracy: ``[T]``, share of right answers.
        cost: ``[T]``, mean cost of a sample.
        costs: ``[K]``, of a sample that leaves at each output.
        head_accuracy: ``[K]``, share of right answers if all samples leave there.
        exit_rate: ``[T][K]``, share of all samples that leave at each output.
        exit_right: ``[T][K]``, share of all samples that leave there with the right answer.
        oracle_accuracy: share of samples that some output gets right.
        overthinking: share of samples that an exit gets right and the backbone's own output does not.
    """

    data_tables = frozenset({"points"})

    policy: str
    thresholds: list[float]
    accuracy: list[float]
    cost: list[float]
    costs: list[float]
    head_accuracy: list[float]
    exit_rate: list[list[float]]
    exit_right: list[list[float]]
    oracle_accuracy: float
    overthinking: float

    @property
    def exit_accuracy(self) -> list[list[float]]:
        """``[T][K]``, share of right answers among the samples that leave there; nan where none does."""
        return [
            [right / rate if rate else math.nan for right, rate in zip(rights, rates, strict=True)]
            for rights, rates in zip(self.exit_right, self.exit_rate, strict=True)
        ]

    def at_budget(self, budget: float, rule: Rule = "max") -> float:
        """Accuracy at a mean cost of at most ``budget``, nan where no threshold is that cheap.

        Args:
            budget: fraction of the plain backbone's cost, > 0; may be infinite.
            rule: ``"max"`` is the best of all affordable thresholds and grows with the budget; ``"last"``, that of the
                published tables, is the last threshold before the first that is too dear.

        Raises:
            ValueError: a budget that is not above 0, or an unknown rule.
        """
        index = self.index_at(budget, rule)
        return math.nan if index is None else self.accuracy[index]

    def index_at(self, budget: float, rule: Rule = "max") -> int | None:
        """Return the position of the threshold :meth:`at_budget` reads, the cheapest of equally accurate ones."""
        if not budget > 0:
            raise ValueError(f"budget must lie in (0, inf], got {budget}")
        check_choice("rule", rule, get_args(Rule))
        dear = [cost > budget * (1 + TOLERANCE) for cost in self.cost]
        if rule == "last":
            first_dear = dear.index(True) if True in dear else len(dear)
            return first_dear - 1 if first_dear else None
        affordable = [t for t, too_dear in enumerate(dear) if not too_dear]
        return max(affordable, key=lambda t: (self.accuracy[t], -self.cost[t]), default=None)

    def tables(self) -> dict[str, Table]:
        """Accuracy at budgets; accuracy, cost and who leaves where at every threshold."""
        labels = [*(f"exit {k}" for k in range(len(self.costs) - 1)), "final"]
        columns = [f"threshold ({self.policy})", "accuracy", "cost", *(f"leave at {label}" for label in labels)]
        places = zip(self.thresholds, self.accuracy, self.cost, self.exit_rate, strict=True)
        rows = [(threshold, accuracy, cost, *rates) for threshold, accuracy, cost, rates in places]
        points = Table("Accuracy and cost over thresholds", columns, rows, "Cost: fraction of the plain backbone's.")
        return {"budgets": self.budget_table(), "points": points}

    def figures(self) -> dict[str, Figure]:
        """Accuracy against cost."""
        from lightning_eff.early_exit.evaluation.figures import curve_figure

        return {"curve": curve_figure({self.policy: self})}

    def budget_table(self, budgets: Sequence[float] = BUDGETS, rule: Rule = "max") -> Table:
        """Accuracy in percent at each budget and without one; what no threshold can keep prints as ``-``."""
        names = [budget_heading(budget) for budget in (*budgets, math.inf)]
        found = [self.at_budget(budget, rule) for budget in (*budgets, math.inf)]
        row = [None if math.isnan(accuracy) else 100 * accuracy for accuracy in found]
        return Table(
            "Accuracy (%) at a budget",
            [Column(name, ".2f") for name in names],
            [row],
            "Budget: mean cost of a sample, in percent of the plain backbone.",
        )

    def auc(self, low: float | None = None, high: float = 1.0, weights: Weights = "uniform") -> float:
        """Mean over budgets of the best accuracy within the budget.

        Between two costs the accuracy at a budget is constant, so this is a sum, not an approximation.

        Args:
            low: lowest budget, > 0; below the cheapest threshold the accuracy counts as 0. None is the cost of leaving
                at the first exit.
            high: highest budget, > ``low``.
            weights: how much budgets count: ``"uniform"``; ``"log"``, halving the budget counts alike anywhere; or a
                density, >= 0, as a function of the budget.

        Returns:
            In [0, 1]; nan if ``low`` is left out and the first exit costs ``high`` or more.

        Raises:
            ValueError: ``low`` is not in (0, ``high``), or the weights are unknown.
        """
        if low is None and self.costs[0] >= high:
            return math.nan
        low = self.costs[0] if low is None else low
        if not 0 < low < high < math.inf:
            raise ValueError(f"expected budgets 0 < low < high < inf, got {low} and {high}")
        mass = _mass(weights)
        total = mass(low, high)
        if not total > 0:
            raise ValueError(f"expected weights > 0 somewhere between {low} and {high}, got a total of {total}")
        edges = [low, *sorted({cost for cost in self.cost if low < cost < high}), high]
        heights = [self.at_budget(edge) for edge in edges[:-1]]
        steps = [(0.0 if math.isnan(a) else a) * mass(*step) for a, step in zip(heights, pairwise(edges), strict=True)]
        return math.fsum(steps) / total

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python for JSON: all fields and a schema version."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CurveResult:
        """Undo :meth:`to_dict`.

        Raises:
            ValueError: another schema version.
        """
        with reading("not a curve"):
            if values["schema"] != SCHEMA:
                raise ValueError(f"expected a curve of schema {SCHEMA}, got {values['schema']!r}")
            told = {name: value for name, value in values.items() if name != "schema"}
            curve: CurveResult = parsed(cls, told, "the curve")
            rows = (curve.exit_rate, curve.exit_right)
            if len({len(each) for each in (curve.thresholds, curve.accuracy, curve.cost, *rows)}) > 1:
                raise ValueError("expected one accuracy, cost, exit_rate and exit_right for each of thresholds")
            if len({len(each) for each in (curve.costs, curve.head_accuracy, *rows[0], *rows[1])}) > 1:
                raise ValueError("expected one head_accuracy, exit_rate and exit_right for each of costs")
        return curve


def budget_heading(budget: float) -> str:
    """Heading of a budget: ``25 %``, or ``max`` for no budget."""
    return "max" if budget == math.inf else f"{100 * budget:g} %"


@dataclass(frozen=True)
class Record:
    """What outputs said about a data set.

    Attributes:
        scores: ``[E, N]`` float32, of the exits.
        predictions: ``[K, N]`` int32.
        target: ``[N]``.
    """

    scores: Tensor
    predictions: Tensor
    target: Tensor

    @property
    def correct(self) -> Tensor:
        """``[K, N]`` bool."""
        return self.predictions == self.target


class EarlyExitCurve(Metric):
    """Accuracy and cost of early exit for many thresholds, from one pass over the data that runs all outputs.

    Keeps scores and predictions, not logits: eight bytes a sample and output. Exact over several processes.

    Args:
        costs: ``[K]`` of a sample that leaves at each output, as fractions of the plain backbone's.
        policy: how to score.
        points: thresholds, >= 2; of policies that count exits one a count.
        comparison: ``"ge"`` leaves at a score that equals the threshold, as networks do; ``"gt"``, that of the
            published evaluation, does not.

    Raises:
        ValueError: fewer than two costs or one that is not above 0, too few points, an unknown policy or comparison.

    Example:
        >>> curve = EarlyExitCurve(costs=[0.4, 1.0], points=3)
        >>> curve.update([torch.tensor([[2.0, 0.0], [0.1, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])],
        ...              torch.tensor([0, 1]))
        >>> result = curve.compute()
        >>> result.accuracy, result.cost
        ([0.5, 0.5, 1.0], [0.4, 0.4, 1.0])
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    score: list[Tensor]
    prediction: list[Tensor]
    target: list[Tensor]
    num_classes: Tensor

    def __init__(
        self,
        costs: Sequence[float],
        policy: str | Policy | ScoreFunction = "max_prob",
        points: int = 100,
        comparison: Comparison = "ge",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.costs = [float(cost) for cost in costs]
        if len(self.costs) < 2 or not all(0 < cost < math.inf for cost in self.costs):
            raise ValueError(f"expected a cost > 0 for each of two or more outputs, got {self.costs}")
        check_whole("points", points, 2)
        check_choice("comparison", comparison, get_args(Comparison))
        self.policy, self.points, self.comparison = policy_from(policy), points, comparison
        self.add_state("score", [], dist_reduce_fx="cat")
        self.add_state("prediction", [], dist_reduce_fx="cat")
        self.add_state("target", [], dist_reduce_fx="cat")
        self.add_state("num_classes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")
        self._begin()

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._begin()

    def _begin(self) -> None:
        # a process without samples must send tensors of the same type and dimensions as all others
        outputs = len(self.costs)
        self.score.append(torch.empty(0, outputs - 1, device=self.device))
        self.prediction.append(torch.empty(0, outputs, dtype=torch.int32, device=self.device))
        self.target.append(torch.empty(0, dtype=torch.int64, device=self.device))

    def update(
        self, logits: Sequence[Tensor], target: Tensor, temperatures: Sequence[float] | Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            logits: ``K`` tensors ``[B, C]``, the backbone's own last.
            target: labels ``[B]``.
            temperatures: ``[K]``, that of each output; all 1 if left out.

        Raises:
            ValueError: another number of outputs, or shapes that disagree.
        """
        if len(logits) != len(self.costs):
            raise ValueError(f"expected logits of {len(self.costs)} outputs, one a cost, got {len(logits)}")
        shapes = {tuple(output.shape) for output in logits}
        if len(shapes) > 1 or logits[0].ndim != 2 or target.shape != logits[0].shape[:1]:
            raise ValueError(f"expected logits [B, C] and labels [B], got {sorted(shapes)} and {list(target.shape)}")
        scores, state = [], None
        for k, output in enumerate(logits[:-1]):
            temperature = 1.0 if temperatures is None else temperatures[k]
            values, state = score(self.policy, output.detach(), k, state, temperature)
            scores.append(values)
        self.score.append(torch.stack(scores, 1))
        self.prediction.append(torch.stack([output.argmax(1) for output in logits], 1).int())
        self.target.append(target.detach().long())
        self.num_classes = self.num_classes.clamp(min=logits[0].shape[1])

    def recorded(self) -> Record:
        """Return what was recorded, by this process or, while the metric is synced, by all.

        Raises:
            ValueError: nothing was.
        """
        scores, predictions, target = map(_joined, (self.score, self.prediction, self.target))
        if not len(target):
            raise ValueError("expected samples, got none: call update first")
        return Record(scores.T.contiguous(), predictions.T.contiguous(), target)

    def compute(self) -> CurveResult:
        """Replay the samples at every threshold.

        Raises:
            ValueError: there are none.
        """
        record = self.recorded()
        correct, samples = record.correct, len(record.target)
        outputs = torch.arange(len(self.costs), device=correct.device)[:, None]
        thresholds = self.policy.grid(self.points, len(self.costs) - 1, int(self.num_classes))
        left, right = [], []
        for threshold in thresholds:
            limits = [self.policy.to_score(threshold)] * len(record.scores)
            here = replay(record.scores, limits, self.comparison) == outputs
            left.append(here.sum(1))
            right.append((here & correct).sum(1))
        counts, rights = torch.stack(left).cpu().double(), torch.stack(right).cpu().double()
        own = correct[-1]
        return CurveResult(
            policy=self.policy.name,
            thresholds=thresholds,
            accuracy=(rights.sum(1) / samples).tolist(),
            cost=(counts @ torch.tensor(self.costs, dtype=torch.float64) / samples).tolist(),
            costs=list(self.costs),
            head_accuracy=(correct.sum(1).double() / samples).tolist(),
            exit_rate=(counts / samples).tolist(),
            exit_right=(rights / samples).tolist(),
            oracle_accuracy=correct.any(0).double().mean().item(),
            overthinking=(correct.any(0) & ~own).double().mean().item(),
        )


def _joined(state: list[Tensor] | Tensor) -> Tensor:
    # one tensor once the states of several processes are joined
    return state if isinstance(state, Tensor) else torch.cat(state)


def _mass(weights: Weights) -> Callable[[float, float], float]:
    """Integral of the weights between two budgets."""
    if weights == "uniform":
        return lambda low, high: high - low
    if weights == "log":
        return lambda low, high: math.log(high / low)
    if callable(weights):
        return lambda low, high: float(quad(weights, low, high)[0])
    raise ValueError(f'expected weights "uniform", "log" or a callable, got {weights!r}')
