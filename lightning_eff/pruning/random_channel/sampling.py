"""Random channel configurations that meet a budget: how many channels each group keeps, drawn thousands at a time.

Y. Li et al., Revisiting Random Channel Pruning for Neural Network Compression, CVPR 2022, arXiv 2205.05676. The cost of
a network is a quadratic form in its channel counts, so a draw costs a few thousand multiply-adds and no network is
built, traced or run.

Shape letters: ``N`` configurations, ``G`` groups, ``P`` groups that may be pruned, ``T`` cost terms.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_eff.arguments import check_choice, check_number, check_whole
from lightning_eff.pruning.allocation import Dense, uniform_counts
from lightning_eff.pruning.settings import Allocation, check_amount
from lightning_eff.surgery import BudgetError, ChannelGraph

Target = Literal["macs", "params"]
SamplerName = Literal["power", "rejection", "uniform"]
Sampler = SamplerName | Sequence[Mapping[str, int]]

MAX_DRAWS = 1_000_000  # of the rejection sampler
_CHUNK = 8192  # configurations at a time: what they need stays in the cache of the processor
_ROUNDS = 20  # of n draws by the power law, until n different ones are found


def sample_configs(
    graph: ChannelGraph,
    n: int,
    amount: float,
    *,
    target: Target = "macs",
    sampler: Sampler = "power",
    min_ratio: float = 0.1,
    tolerance: float = 0.01,
    allocation: Allocation = Allocation(),  # noqa: B008 (frozen)
    dense: Dense | None = None,
    seed: int = 0,
) -> Tensor:
    """Draw channel configurations whose cost is ``1 - amount`` of the dense network's.

    Args:
        graph: the network's channel graph; groups that are not prunable keep all their channels.
        n: configurations wanted, >= 1, the uniform one among them. Fewer come back, with a warning, where fewer
            different ones were found.
        amount: fraction of the cost that is removed, in [0, 1); 0 gives the whole network only.
        target: the cost: multiply-adds per sample or parameters.
        sampler: ``"power"`` draws keep ratios ``r`` from U(``min_ratio``, 1) for each group and takes the power
            ``r^p`` that meets the budget, which always works; ``"rejection"`` draws ratios until they happen to meet
            it, which is rare at mild and at harsh budgets; ``"uniform"`` gives the one configuration that keeps the
            same ratio everywhere. A list of configurations (channels kept by group; others stay whole) is taken as it
            is, whatever it costs, and ``n`` plays no part.
        min_ratio: smallest ratio drawn, in (0, 1).
        tolerance: largest distance from the budget, as a fraction of the dense cost, > 0. Where counts are too coarse
            for it (few channels, ``round_to``), what comes nearest is taken.
        allocation: its ``min_keep``, ``max_ratio`` and ``round_to`` bound every drawn count; counts are rounded to the
            nearest multiple of ``round_to``. Its ``mode`` and ``target`` play no part.
        dense: the network before the first cut, what ``amount`` is a fraction of; by default ``graph``'s.
        seed: the same seed gives the same list in every process.

    Returns:
        Channel counts, int64 ``[n', G]`` in the order of ``graph.groups``, no row twice. Row 0 is the uniform
        configuration, the baseline of every comparison: the largest within the budget.

    Raises:
        ValueError: an argument outside its range, a listed configuration that does not fit, or nothing found by
            rejection.
        BudgetError: the budget cannot be reached; the message names what can.
        KeyError: a listed configuration names a group that the network does not have.
    """
    _check(n, amount, target, sampler, min_ratio, tolerance)
    dense = dense or Dense.of(graph)
    space = _Space.of(graph, dense, target, allocation)
    budget = (1 - amount) * space.dense_cost
    whole = torch.tensor([list(graph.sizes.values())])
    if amount == 0 and space.whole_cost >= budget * (1 - 1e-9):
        return whole
    space.check_reachable(budget, amount, tolerance, allocation)
    uniform = whole.clone()
    counts = uniform_counts(graph, dense, amount, replace(allocation, target=target))
    uniform[0, space.columns] = torch.tensor([counts[name] for name in graph.prunable])
    if sampler == "uniform" or (n == 1 and isinstance(sampler, str)):
        return uniform
    if not isinstance(sampler, str):
        return _distinct([uniform, _listed(graph, sampler)])
    drawn: Iterator[Tensor]
    if sampler == "power":
        drawn = _by_power(space, n, budget, min_ratio, tolerance, seed)
    else:
        drawn = _by_rejection(space, budget, min_ratio, tolerance, seed)
    found = uniform
    for free in drawn:
        rows = whole.repeat(len(free), 1)
        rows[:, space.columns] = free.long()
        found = _distinct([found, rows])
        if len(found) >= n:
            break
    else:
        warnings.warn(
            f"found {len(found)} different configurations near the budget (tolerance {tolerance}), {n} were asked for: "
            "raise tolerance, or be content with fewer",
            stacklevel=2,
        )
    return found[:n]


def config_of(graph: ChannelGraph, row: Tensor) -> dict[str, int]:
    """Write one row ``[G]`` of :func:`sample_configs` as channels kept by each prunable group."""
    counts = dict(zip(graph.groups, row.tolist(), strict=True))
    return {name: int(counts[name]) for name in graph.prunable}


def _check(n: int, amount: float, target: str, sampler: Sampler, min_ratio: float, tolerance: float) -> None:
    check_amount(amount)
    check_whole("the number of candidates", n)
    for name, value, known in (("target", target, Target), ("sampler", sampler, SamplerName)):
        if isinstance(value, str):
            check_choice(name, value, get_args(known))
    if not isinstance(sampler, str) and not len(sampler):
        raise ValueError("the list of configurations is empty")
    check_number("min_ratio", min_ratio, above=0, below=1)
    check_number("tolerance", tolerance, above=0)


@dataclass(frozen=True)
class _Space:
    """Counts ``c`` that the prunable groups may keep, and their cost ``c Q c + b c + d`` of the whole network.

    Attributes:
        columns: numbers of the prunable groups among all groups, int64 ``[P]``.
        sizes: channels now, float64 ``[P]``.
        floors: fewest channels, float64 ``[P]``.
        unit: counts are multiples of it, or the whole group.
        quadratic: ``Q``, symmetric, >= 0, float64 ``[P, P]``.
        linear: ``b`` >= 0, float64 ``[P]``.
        constant: ``d`` >= 0.
        dense_cost: of the network before the first cut.
        target: what the cost is.
    """

    columns: Tensor
    sizes: Tensor
    floors: Tensor
    unit: int
    quadratic: Tensor
    linear: Tensor
    constant: float
    dense_cost: float
    target: Target

    @classmethod
    def of(cls, graph: ChannelGraph, dense: Dense, target: Target, allocation: Allocation) -> _Space:
        """Write the costs of ``graph`` as a quadratic form of the prunable groups' counts."""
        costs = graph.costs
        terms = costs.mac_terms if target == "macs" else costs.param_terms
        left, right = costs.per_channel[terms.left], costs.per_channel[terms.right]  # [T, G]
        left0, right0 = costs.fixed[terms.left], costs.fixed[terms.right]  # [T]
        quadratic = left.T @ (terms.factor[:, None] * right)
        quadratic = (quadratic + quadratic.T) / 2
        linear = (terms.factor * left0) @ right + (terms.factor * right0) @ left
        constant = float((terms.factor * left0 * right0).sum()) + (costs.other_macs if target == "macs" else 0.0)
        free = torch.tensor([name in set(graph.prunable) for name in graph.groups])
        whole = torch.tensor(list(graph.sizes.values()), dtype=torch.float64)
        fixed = torch.where(free, 0.0, whole)  # groups that stay are part of the linear and the constant term
        floors = [allocation.floor(dense.sizes[name], graph.groups[name].size) for name in graph.prunable]
        return cls(
            free.nonzero().flatten(),
            whole[free],
            torch.tensor(floors, dtype=torch.float64),
            allocation.round_to or 1,
            quadratic[free][:, free].contiguous(),
            (linear + 2 * quadratic @ fixed)[free],
            constant + float(fixed @ quadratic @ fixed + linear @ fixed),
            float(getattr(dense, target)),
            target,
        )

    def cost(self, counts: Tensor) -> Tensor:
        """Cost of counts ``[N, P]``: float64 ``[N]``."""
        return torch.addmm(self.linear, counts, self.quadratic).mul_(counts).sum(1).add_(self.constant)

    def gradient(self, counts: Tensor) -> Tensor:
        """Derivative of the cost by each count ``[N, P]``."""
        return torch.addmm(self.linear, counts, self.quadratic, alpha=2)

    def rounded(self, counts: Tensor) -> Tensor:
        """Nearest counts that groups may keep, in place."""
        if self.unit > 1:
            return counts.div_(self.unit).round_().mul_(self.unit).clamp_(self.floors, self.sizes)
        return counts.round_().clamp_(self.floors, self.sizes)

    @property
    def whole_cost(self) -> float:
        """Cost of the network as it is now."""
        return float(self.cost(self.sizes[None]))

    def check_reachable(self, budget: float, amount: float, tolerance: float, allocation: Allocation) -> None:
        """Raise BudgetError unless the budget lies between the least and the present cost."""
        least, most = float(self.cost(self.floors[None])), self.whole_cost
        if not least * (1 - 1e-9) <= budget <= most + tolerance * self.dense_cost:
            low, high = max(0.0, 1 - most / self.dense_cost), 1 - least / self.dense_cost
            raise BudgetError(
                f"{self.target} cannot be {budget:,.0f} (amount={amount:g}): reachable are {least:,.0f} to {most:,.0f} "
                f"(amount {low:.3f} to {high:.3f}) with min_keep={allocation.min_keep}, "
                f"max_ratio={allocation.max_ratio}, round_to={allocation.round_to} and {len(self.sizes)} prunable "
                "channel groups; loosen these or change the amount"
            )


def _by_power(space: _Space, n: int, budget: float, min_ratio: float, tolerance: float, seed: int) -> Iterator[Tensor]:
    """Counts ``[N, P]`` near ``r^p sizes``, at most 20 times ``n`` of them; the nearest where none is near enough."""
    generator = torch.Generator().manual_seed(seed)
    missed, any_near = [], False
    for _ in range(_ROUNDS):
        for start in range(0, n, _CHUNK):
            shape = min(_CHUNK, n - start), len(space.sizes)
            ratios = torch.rand(shape, generator=generator, dtype=torch.float64) * (1 - min_ratio) + min_ratio
            counts = space.rounded(_powered(space, ratios.log_(), budget))
            counts = _stepped(space, counts, budget, tolerance * space.dense_cost)
            away = (space.cost(counts) - budget).abs_() / space.dense_cost
            near = away <= tolerance
            missed.append((counts[~near], away[~near]))
            if bool(near.any()):
                any_near = True
                yield counts[near]
    if not any_near:
        counts, away = (torch.cat(parts) for parts in zip(*missed, strict=True))
        yield counts[away <= away.min() + tolerance]


def _powered(space: _Space, log_ratios: Tensor, budget: float) -> Tensor:
    """Real counts ``max(floor, size r^p)`` with the exponent ``p >= 0`` that meets the budget, for every row.

    Newton's method on the logarithm of the cost. The cost is a sum of products of exponentials of ``p`` with
    coefficients >= 0, so its logarithm is convex: from ``p = 0`` the steps never overshoot, and each row converges.
    """
    p = torch.zeros(len(log_ratios), 1, dtype=torch.float64)
    counts = space.sizes.expand(log_ratios.shape).clone()
    for _ in range(60):
        half = torch.mm(counts, space.quadratic)
        cost = (half + space.linear).mul_(counts).sum(1, keepdim=True).add_(space.constant)
        slope = half.mul_(2).add_(space.linear).mul_(counts).mul_(log_ratios).mul_(counts > space.floors)
        step = cost * (cost / budget).log() / slope.sum(1, keepdim=True).clamp_(max=-1e-12)
        p = (p - step).clamp_(min=0)
        counts = torch.mul(p, log_ratios).exp_().mul_(space.sizes).maximum(space.floors)
        if bool((cost <= budget * (1 + 1e-5)).all()):
            break
    return counts


def _stepped(space: _Space, counts: Tensor, budget: float, tolerance: float) -> Tensor:
    """Move rows that rounding took out of tolerance, one group by one unit at a time, as long as they come nearer."""
    diagonal = space.quadratic.diagonal()
    for _ in range(int(space.sizes.sum())):
        excess = space.cost(counts) - budget
        out = (excess.abs() > tolerance).nonzero().flatten()
        if not len(out):
            break
        row, over = counts[out], excess[out, None]
        up = ((row / space.unit).floor() + 1).mul_(space.unit).minimum(space.sizes)
        down = ((row / space.unit).ceil() - 1).mul_(space.unit).maximum(space.floors)
        delta = torch.where(over > 0, down, up) - row
        after = (over + delta * space.gradient(row) + delta.square() * diagonal).abs_()
        best, group = after.min(1)
        better = best < over[:, 0].abs() - 1e-9
        if not bool(better.any()):
            break
        counts[out[better], group[better]] += delta[better, group[better]]
    return counts


def _by_rejection(space: _Space, budget: float, min_ratio: float, tolerance: float, seed: int) -> Iterator[Tensor]:
    """Counts ``[N, P]`` of uniform ratios that meet the budget by chance, out of at most 1e6 draws."""
    generator = torch.Generator().manual_seed(seed)
    accepted = drawn = 0
    while drawn < MAX_DRAWS:
        shape = min(_CHUNK, MAX_DRAWS - drawn), len(space.sizes)
        ratios = torch.rand(shape, generator=generator, dtype=torch.float64)
        counts = space.rounded(ratios.mul_(1 - min_ratio).add_(min_ratio).mul_(space.sizes))
        near = (space.cost(counts) - budget).abs_() <= tolerance * space.dense_cost
        drawn, accepted = drawn + shape[0], accepted + int(near.sum())
        if bool(near.any()):
            yield counts[near]
    if not accepted:
        raise ValueError(
            f"none of {drawn:,} random configurations came within {tolerance} of the budget (acceptance 0): use "
            'sampler="power", which meets every budget, or raise tolerance'
        )


def _listed(graph: ChannelGraph, configs: Sequence[Mapping[str, int]]) -> Tensor:
    """Counts ``[N, G]`` of configurations by group or alias, checked."""
    rows = []
    for number, config in enumerate(configs):
        counts = graph.sizes
        for path, count in config.items():
            group = graph.resolve(path)
            if not 1 <= count <= group.size:
                raise ValueError(
                    f"configuration {number}: expected {path} to keep 1..{group.size} channels, got {count}"
                )
            if count < group.size and group.protected:
                raise ValueError(f"configuration {number}: {path} cannot be pruned: {group.protected}")
            counts[group.name] = count
        rows.append(list(counts.values()))
    return torch.tensor(rows)


def _distinct(tables: Sequence[Tensor]) -> Tensor:
    """Rows of tables in order, each once."""
    rows = torch.cat(list(tables))
    first: dict[bytes, int] = {}
    for number, row in enumerate(rows.numpy()):
        first.setdefault(row.tobytes(), number)
    return rows[list(first.values())]
