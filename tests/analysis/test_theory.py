"""The entropy theorem: identities for every row, lower entropy if and only if its condition holds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import entr, softmax

from metajax.analysis.theory import boosted_entropy, boosted_probability, counter_example, kappa, margin

ROWS = st.lists(st.floats(-6, 6), min_size=2, max_size=9)


def after(logits, key, delta):
    """The attention row after the boost, from its logits."""
    return softmax(np.asarray(logits) + delta * (np.arange(len(logits)) == key))


@settings(deadline=None)
@given(ROWS, st.integers(0, 100), st.floats(0.001, 8))
def test_formulas_need_only_probability_and_entropy(logits, key, delta):
    key %= len(logits)
    before, boosted = softmax(logits), after(logits, key, delta)
    p, h = before[key], entr(before).sum()
    assert boosted_probability(p, delta) == pytest.approx(boosted[key], rel=1e-9)
    assert boosted_entropy(p, h, delta) == pytest.approx(entr(boosted).sum(), abs=1e-9)
    assert kappa(p, h, delta) == pytest.approx(h - entr(boosted).sum(), abs=1e-9)


@settings(deadline=None)
@given(ROWS, st.integers(0, 100), st.floats(0.01, 8), st.floats(0.01, 4))
def test_the_theorem_under_its_condition(logits, key, delta, more):
    key %= len(logits)
    row = softmax(logits)
    p, h = row[key], entr(row).sum()
    if abs(margin(p, h)) < 1e-6:
        return
    small = boosted_entropy(p, h, 1e-4)
    if margin(p, h) > 0:
        assert h > boosted_entropy(p, h, delta) > boosted_entropy(p, h, delta + more)
        assert small < h
    elif abs(margin(p, h)) > 1e-2 and p > 1e-3:
        assert small > h


def test_the_greatest_key_always_meets_the_condition_unless_all_are_equal():
    rng = np.random.default_rng(0)
    rows = softmax(rng.normal(size=(2000, 16)), axis=1)
    h = entr(rows).sum(axis=1)
    assert (margin(rows.max(axis=1), h) > 0).all()
    rose = boosted_entropy(rows[:, 0], h, 1.0) > h
    assert 0 < rose.mean() < 1 and not (rose & (margin(rows[:, 0], h) > 0)).any()


def test_the_counter_example():
    assert counter_example() == pytest.approx({"before": 0.119, "after": 0.733}, abs=5e-4)
    assert boosted_entropy(softmax([0, 5, 0, 0])[0], counter_example()["before"], 40.0) == pytest.approx(0, abs=1e-9)


def test_a_key_of_probability_zero_or_one():
    p, h = np.array([0.0, 1.0]), np.array([0.7, 0.0])
    assert margin(p, h)[0] == -np.inf and margin(p, h)[1] == 0
    np.testing.assert_allclose(boosted_entropy(p, h, 2.0), h, atol=1e-12)
