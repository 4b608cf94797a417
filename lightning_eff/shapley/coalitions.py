"""Sequences of random coalitions, endless or until all have come, whose beginnings never depend on how far they go.

`LeverageSequence` draws without replacement and takes the sizes in turn, so that every size has the same share until
its coalitions are used up: the leverage scores of C. Musco, R. T. Witter (arXiv 2410.01917), stratified by size.
`SizeSequence` draws with replacement, the size first.

Coalitions come alone or as *pairs*, a coalition and its complement, of which the first is given.

Shapes: `n` players, `P` pairs (or single coalitions).
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_eff.shapley.sampling import generator_of

_LISTED = 2**18  # sizes with at most so many coalitions are drawn from a shuffled list of their numbers
_BLOCK = 64  # coalitions of a `SizeSequence` that share a generator


class CoalitionSequence(Protocol):
    """A source of coalitions."""

    length: int

    def take(self, count: int) -> Tensor:
        """The next `count` coalitions, bool `[count, n]`; all that are left where there are fewer."""
        ...


class SizeSequence:
    """Coalitions of independent sizes, uniform among those of their size; pairs and singles look alike.

    Args:
        probabilities: float `[n + 1]`, one a size.
        seed: of all randomness.
        group: number of the group, for a sequence of its own.
    """

    length = sys.maxsize

    def __init__(self, probabilities: Tensor, seed: int, group: int) -> None:
        self._probabilities, self._place = probabilities, (seed, group)
        self._blocks = 0
        self._left = torch.zeros(0, len(probabilities) - 1, dtype=torch.bool)

    def take(self, count: int) -> Tensor:
        """As `CoalitionSequence.take`."""
        parts = [self._left]
        while sum(map(len, parts)) < count:
            generator = generator_of(*self._place, self._blocks)
            sizes = torch.multinomial(self._probabilities, _BLOCK, replacement=True, generator=generator)
            parts.append(_uniform(sizes, len(self._probabilities) - 1, generator))
            self._blocks += 1
        rows = torch.cat(parts)
        self._left = rows[count:]
        return rows[:count]


class LeverageSequence:
    """Distinct coalitions, neither empty nor full, every size as often as any other while it lasts.

    Args:
        n: number of players, >= 2.
        paired: coalitions stand for pairs: only one of each pair comes, of size <= n / 2.
        seed: of all randomness.
        group: number of the group, for a sequence of its own.
    """

    def __init__(self, n: int, paired: bool, seed: int, group: int) -> None:
        self.n, self._place = n, (seed, group)
        self._sizes = list(range(1, n // 2 + 1 if paired else n))
        self._half = n // 2 if paired and n % 2 == 0 else 0  # the size whose complements have the same size
        self.counts = {s: math.comb(n, s) // (2 if s == self._half else 1) for s in self._sizes}
        self.length = sum(self.counts.values())
        self._taken = dict.fromkeys(self._sizes, 0)
        self._listed: dict[int, Tensor] = {}
        self._seen: dict[int, set[bytes]] = {}
        self._blocks = 0
        self._left = torch.zeros(0, n, dtype=torch.bool)
        # even, so that the half size, with half as many pairs, comes in every second round
        self._rounds = 2 * -(-128 // len(self._sizes))

    def take(self, count: int) -> Tensor:
        """As `CoalitionSequence.take`."""
        parts = [self._left]
        while sum(map(len, parts)) < count and any(self._taken[s] < self.counts[s] for s in self._sizes):
            parts.append(self._block())
        rows = torch.cat(parts)
        self._left = rows[count:]
        return rows[:count]

    def _block(self) -> Tensor:
        """Several rounds; a round has a coalition of every size that is not used up, in random order."""
        generator = generator_of(*self._place, self._blocks)
        self._blocks += 1
        rounds: list[Tensor] = []
        rows: list[Tensor] = []
        large: list[tuple[int, int]] = []  # size, number
        for size in self._sizes:
            wanted = self._rounds // 2 if size == self._half else self._rounds
            number = min(wanted, self.counts[size] - self._taken[size])
            if self.counts[size] <= _LISTED:
                rows.append(self._from_list(size, number))
                rounds.append(self._steps(size, number))
            else:
                large.append((size, number))
        if large:
            sizes, numbers = torch.tensor(large).T
            rows.append(self._fresh(sizes.repeat_interleave(numbers), generator))
            rounds += [self._steps(size, number) for size, number in large]
        order = (torch.cat(rounds) + torch.rand(sum(map(len, rows)), generator=generator)).argsort()
        return torch.cat(rows)[order]

    def _steps(self, size: int, number: int) -> Tensor:
        """Rounds in which `number` coalitions of `size` come."""
        return torch.arange(number) * (2 if size == self._half else 1)

    def _from_list(self, size: int, number: int) -> Tensor:
        if size not in self._listed:
            generator = generator_of(*self._place, self._blocks, size)
            self._listed[size] = torch.randperm(self.counts[size], generator=generator)
        start = self._taken[size]
        self._taken[size] += number
        return subsets_of(self._listed[size][start : start + number], self.n, size)

    def _fresh(self, sizes: Tensor, generator: torch.Generator) -> Tensor:
        """Random coalitions that did not come before."""
        rows = self._canonical(_uniform(sizes, self.n, generator))
        for row, (size, key) in enumerate(zip(sizes.tolist(), packed_keys(rows), strict=True)):
            seen = self._seen.setdefault(size, set())
            while key in seen:
                rows[row] = self._canonical(_uniform(sizes[row : row + 1], self.n, generator))[0]
                (key,) = packed_keys(rows[row : row + 1])
            seen.add(key)
            self._taken[size] += 1
        return rows

    def _canonical(self, rows: Tensor) -> Tensor:
        """The one of each pair that counts: of equal size, that without the last player."""
        other = (rows.sum(1) == self._half) & rows[:, -1]
        return rows ^ other[:, None]


def _uniform(sizes: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """A uniformly random coalition of every one of `sizes` `[P]`: bool `[P, n]`."""
    keys = torch.rand(len(sizes), n, generator=generator, dtype=torch.float64).numpy()
    limits = np.sort(keys, axis=1)[np.arange(len(sizes)), sizes.clamp(max=n - 1).numpy()]  # four times as fast as torch
    rows = torch.from_numpy(keys < limits[:, None])  # 53-bit keys: two equal ones do not happen
    return rows | (sizes == n)[:, None]


def subsets_of(numbers: Tensor, n: int, size: int) -> Tensor:
    """Subsets of `size` of `n` players by number `[P]`, below C(n, size): bool `[P, n]`.

    The order is the colexicographic one: number = sum over k of C(k-th smallest player, k), so that the first
    C(n - 1, size) subsets do without the last player.
    """
    if size > n // 2:
        return ~subsets_of(numbers, n, n - size)
    rest, rows = numbers.clone(), torch.zeros(len(numbers), n, dtype=torch.bool)
    for k in range(size, 0, -1):
        table = _binomials(n, k)
        player = torch.searchsorted(table, rest, right=True) - 1
        rest -= table[player]
        rows.scatter_(1, player[:, None], True)
    return rows


@lru_cache(maxsize=256)
def _binomials(n: int, k: int) -> Tensor:
    """C(p, k) for the players p < n."""
    return torch.tensor([min(math.comb(player, k), 2**62) for player in range(n)])


def packed_keys(coalitions: Tensor) -> list[bytes]:
    """One hashable key a coalition."""
    return [row.tobytes() for row in np.packbits(coalitions.numpy(), axis=1)]
