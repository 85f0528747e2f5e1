"""Weighted mixtures of sources with a switch at a step, as a pure function of the row number.

Counts are exact: after n rows, every source has given its share of n to within one row for each level of the split
(source against the rest, then the next). After a switch, each source continues where the first phase ended, or the second
phase reads fresh streams.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from fractions import Fraction

import grain


class Mixture(grain.transforms.DatasetSelectionMap):
    """Row n of the run -> (source, row of that source).

    Args:
      weights: one per source.
      switch_row: first row of the second phase.
      switch_weights: weights of the second phase.
      fresh: whether the second phase reads other streams from their beginning, numbered after those of the first.
    """

    def __init__(
        self, weights: Sequence[float], switch_row: int = sys.maxsize, switch_weights: Sequence[float] = (), fresh: bool = False
    ):
        self.shares, self.switch_shares = _shares(weights), _shares(switch_weights)
        self.switch_row, self.fresh = switch_row, fresh

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        if index < self.switch_row:
            return _select(index, self.shares)
        source, k = _select(index - self.switch_row, self.switch_shares)
        if self.fresh:
            return len(self.shares) + source, k
        return source, k + counts(self.switch_row, self.shares)[source]


def _shares(weights: Sequence[float]) -> list[Fraction]:
    """For each source: of the rows that earlier sources pass on, the share that this source passes on."""
    exact = [Fraction(str(w)) for w in weights]
    left, shares = sum(exact), []
    for weight in exact:
        shares.append((left - weight) / left if left else Fraction(0))
        left -= weight
    return shares


def _select(n: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    for source, share in enumerate(shares):
        before = math.floor(n * share)
        if math.floor((n + 1) * share) == before:
            return source, n - before
        n = before
    raise AssertionError("the last source with weight takes every row that reaches it")


def counts(n: int, shares: Sequence[Fraction]) -> list[int]:
    """Rows of each source among the first n of a phase."""
    found = []
    for share in shares:
        rest = math.floor(n * share)
        found.append(n - rest)
        n = rest
    return found
