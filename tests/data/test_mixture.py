"""Mixtures: exact counts, every row of a source once and in order, and switches that continue at the position of each source."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metajax.data.mixture import Mixture, counts

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.integers(1, 9).map(float), st.floats(1e-3, 1.0)), min_size=1, max_size=5).filter(
    any
)
ROWS = 400


@st.composite
def mixtures(draw):
    weights = draw(WEIGHTS)
    if draw(st.booleans()):
        return Mixture(weights)
    after = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=len(weights), max_size=len(weights)).filter(any))
    return Mixture(weights, draw(st.integers(0, ROWS)), after)


def counted(mixture, n):
    """Rows of each stream among the first n."""
    first, rest = counts(min(n, mixture.switch_row), mixture.shares), [0] * len(mixture.shares)
    if n > mixture.switch_row:
        rest = counts(n - mixture.switch_row, mixture.switch_shares)
    return first + rest if mixture.fresh else [a + b for a, b in zip(first, rest, strict=True)]


@given(mixtures())
def test_each_source_gives_its_rows_once_and_in_order(mixture):
    given_so_far = [0] * len(mixture.shares)
    for n in range(ROWS):
        assert counted(mixture, n) == given_so_far
        source, row = mixture[n]
        assert row == given_so_far[source], "the next row of that source, also across the switch"
        given_so_far[source] += 1


@given(WEIGHTS, st.integers(0, 10**12))
def test_counts_are_exact(weights, n):
    """Source i is split from the later ones; each split is exact to within one row."""
    found = counted(Mixture(weights), n)
    assert sum(found) == n
    exact = [Fraction(str(w)) for w in weights]
    for i, (count, weight) in enumerate(zip(found, exact, strict=True)):
        assert abs(count - n * weight / sum(exact)) < i + 1 if weight else count == 0


def test_counts_by_hand():
    mixture = Mixture((0.5, 0.3, 0.2))
    assert [counted(mixture, n) for n in (10, 100, 1000)] == [[5, 3, 2], [50, 30, 20], [500, 300, 200]]
    assert counted(Mixture((0.1, 0.2, 0.7)), 100) == [10, 20, 70], "0.1 is a tenth, not the binary number nearest to it"
    assert [Mixture((2, 1))[n][0] for n in range(6)].count(0) == 4
    assert [Mixture((0.0, 1.0, 0.0))[n] for n in range(3)] == [(1, 0), (1, 1), (1, 2)]
    assert [Mixture((1.0,))[n] for n in range(3)] == [(0, 0), (0, 1), (0, 2)]


def test_a_switch_by_hand():
    mixture = Mixture((1, 1), 4, (0, 1))
    assert [mixture[n] for n in range(4, 8)] == [(1, 2), (1, 3), (1, 4), (1, 5)]
    assert sorted(mixture[n] for n in range(4)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert counted(mixture, 4) == [2, 2] and counted(mixture, 8) == [2, 6]


@given(WEIGHTS, st.integers(2, 10**15))
def test_far_rows_follow_from_the_counts(weights, n):
    mixture = Mixture(weights, n // 2, list(reversed(weights)))
    source, row = mixture[n]
    before, after = counted(mixture, n), counted(mixture, n + 1)
    assert row == before[source] and after[source] == row + 1
    assert [b - a for a, b in zip(before, after, strict=True)] == [int(i == source) for i in range(len(weights))]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (5, 2, 1), (1, 1, 1, 1)])
def test_sources_are_spread_and_not_in_blocks(weights):
    """The distance between two rows of a source fits its share, within one row for each split."""
    chosen = [Mixture(weights)[n][0] for n in range(ROWS)]
    for source, weight in enumerate(weights):
        at = [n for n, s in enumerate(chosen) if s == source]
        widest = max(b - a for a, b in itertools.pairwise(at))
        assert widest <= math.ceil(sum(weights) / weight) * (source + 1)


@given(mixtures(), st.integers(0, 2 * ROWS))
def test_a_switch_to_streams_of_its_own_starts_them_from_the_beginning(fresh, n):
    fresh.fresh = True
    streams, first = len(fresh.shares), fresh.switch_row
    source, row = fresh[n]
    assert (source >= streams) == (n >= first)
    assert counted(fresh, n + 1)[source] == row + 1, "the next row of that stream"
    if source >= streams:
        assert sum(counted(fresh, n + 1)[streams:]) == n + 1 - first
