"""Weighted mixtures of sources with a switch at a step, as a pure function of the row number.

Counts are exact: after n rows, every source has given its share of n to within one row for each level of the split
(source against the rest, then the next). After a switch, each source continues where the first phase ended, or the second
phase reads fresh streams.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fractions import Fraction


class Mixture:
    """Row n of the run -> (source, row of that source); a `grain` dataset selection map.

    Args:
      weights: one per source.
      switch_row: first row of the second phase; None for one phase.
      switch_weights: weights of the second phase.
      fresh: whether the second phase reads other streams from their beginning, numbered after those of the first.
    """

    def __init__(
        self, weights: Sequence[float], switch_row: int | None = None, switch_weights: Sequence[float] = (), fresh: bool = False
    ):
        self.shares = _shares(weights)
        self.switch_row = switch_row
        self.switch_shares = _shares(switch_weights) if switch_row is not None else []
        self.fresh = fresh

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, n: int) -> tuple[int, int]:
        if self.switch_row is None or n < self.switch_row:
            return _select(n, self.shares)
        source, k = _select(n - self.switch_row, self.switch_shares)
        if self.fresh:
            return len(self.shares) + source, k
        return source, k + _counts(self.switch_row, self.shares)[source]

    def counts(self, n: int) -> list[int]:
        """Rows of each stream among the first n."""
        first = min(n, self.switch_row) if self.switch_row is not None else n
        counts = _counts(first, self.shares)
        rest = _counts(n - first, self.switch_shares) if n > first else [0] * len(counts)
        if self.fresh:
            return counts + rest
        return [a + b for a, b in zip(counts, rest, strict=True)]


def _shares(weights: Sequence[float]) -> list[Fraction]:
    """For each source: of the rows that earlier sources pass on, the share that this source passes on."""
    exact = [Fraction(str(w)) for w in weights]
    left, shares = sum(exact), []
    for weight in exact:
        shares.append((left - weight) / left if left else Fraction(0))
        left -= weight
    return shares


def _select(n: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    for source, passes in enumerate(shares):
        before = n * passes.numerator // passes.denominator
        if (n + 1) * passes.numerator // passes.denominator == before:
            return source, n - before
        n = before
    raise AssertionError("the last source with weight takes every row that reaches it")


def _counts(n: int, shares: Sequence[Fraction]) -> list[int]:
    counts = []
    for passes in shares:
        rest = n * passes.numerator // passes.denominator
        counts.append(n - rest)
        n = rest
    return counts
