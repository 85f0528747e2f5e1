"""Statistics of a few seeds, compared with numbers computed by hand and by scipy.stats."""

import math

import numpy as np
import pytest
from scipy import stats

from metajax.evaluation.statistics import paired_difference, seeds_needed, summarize


def test_mean_and_interval_of_three_values_by_hand():
    found = summarize([1.0, 2.0, 6.0])
    # deviations -2, -1, 3: variance 14 / 2 = 7; t for 2 degrees of freedom is 4.302653
    assert (found.n, found.mean) == (3, 3.0)
    assert found.deviation == pytest.approx(math.sqrt(7))
    assert found.half == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-6)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_is_students(n):
    values = np.random.default_rng(n).normal(5, 2, n)
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    found = summarize(values.tolist())
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_one_seed_has_no_interval_and_none_no_mean():
    found = summarize([None, 4.0])
    assert (found.n, found.mean, found.deviation, found.half, found.clear_of_zero) == (1, 4.0, None, None, False)
    assert summarize([None, None]) is None


def test_a_difference_is_paired_over_the_seeds_that_both_have():
    found = paired_difference([1.0, None, 3.0, 5.5], [0.5, 9.0, 2.4, None])
    assert found.n == 2
    assert found.mean == pytest.approx(0.55)
    assert found.deviation == pytest.approx(0.1 / math.sqrt(2))
    assert paired_difference([1.0, None], [None, 1.0]) is None


def test_pairing_removes_the_seeds_common_part():
    seeds = np.array([0.0, 10.0, 20.0])
    assert paired_difference((seeds + np.array([1.0, 1.1, 0.9])).tolist(), seeds.tolist()).clear_of_zero
    assert not summarize((seeds + 1).tolist()).clear_of_zero


@pytest.mark.parametrize("effect", [0.3, 0.5, -1.0, 2.5])
def test_seeds_needed_is_the_first_number_with_enough_power(effect):
    def power(n):
        bound = stats.t.ppf(0.975, n - 1)
        return stats.nct.sf(bound, n - 1, abs(effect) * math.sqrt(n))

    n = seeds_needed(effect, 1.0)
    assert power(n) >= 0.8 > power(n - 1)


def test_seeds_needed_at_the_ends():
    assert seeds_needed(0.5, 1.0) == 34, "the textbook number for half a standard deviation"
    assert seeds_needed(1e6, 1e-6) == seeds_needed(1.0, 0.0) == 2
    assert seeds_needed(0.001, 1.0) is None
    assert seeds_needed(0.0, 0.0) is None
