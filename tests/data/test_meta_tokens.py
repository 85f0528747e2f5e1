"""Injection of meta-tokens: number, positions and targets around them, compared position by position with the documentation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from metajax.config import MetaTokens
from metajax.data.meta_tokens import choose_positions, inject

META = 999
LOSSES = ("skip_meta_targets", "real_only")


def plain_row(length, rng):
    """A row of distinct values: token i is 100 + i, its target 500 + i."""
    return {
        "tokens": np.arange(100, 100 + length, dtype=np.int32),
        "targets": np.arange(500, 500 + length, dtype=np.int32),
        "loss_weights": rng.choice(np.float32([0, 0.5, 1]), length),
        "is_body": rng.random(length) < 0.5,
        "is_metadata": rng.random(length) < 0.5,
        "asks_metadata": rng.random(length) < 0.5,
        "segment_ids": np.sort(rng.integers(0, 4, length)).astype(np.int32),
    }


@st.composite
def injections(draw):
    """(row, row with meta-tokens, M, loss, inject)."""
    length, count = draw(st.integers(1, 40)), draw(st.integers(0, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    row = plain_row(length, rng)
    loss, how = draw(st.sampled_from(LOSSES)), draw(st.sampled_from(["random", "periodic"]))
    return row, inject(row, rng, meta=MetaTokens(inject=how, loss=loss), count=count, meta_id=META), count, loss, how


@given(injections())
def test_exactly_m_and_never_position_0(case):
    row, out, count, _, _ = case
    positions = out["meta_positions"]
    assert positions.dtype == np.int32 and positions.shape == (count,)
    assert (np.diff(positions) > 0).all() and (positions >= 1).all() and (positions < len(row["tokens"]) + count).all()
    np.testing.assert_array_equal(np.flatnonzero(out["tokens"] == META), positions)
    for name, values in row.items():
        assert out[name].shape == (len(values) + count,) and out[name].dtype == values.dtype, name


@given(injections())
def test_real_tokens_keep_their_order_and_their_arrays(case):
    row, out, *_ = case
    real = out["tokens"] != META
    for name in ("tokens", "targets", "is_metadata", "segment_ids"):
        np.testing.assert_array_equal(out[name][real], row[name], err_msg=name)
    assert not out["is_metadata"][~real].any()


@given(injections())
def test_loss_and_segments_against_a_reading_of_the_docstring(case):
    row, out, _, loss, _ = case
    positions, real = len(out["tokens"]), -1
    for position in range(positions):
        is_meta = out["tokens"][position] == META
        real += not is_meta
        before_meta = position + 1 < positions and out["tokens"][position + 1] == META
        asks = not is_meta if loss == "real_only" else not before_meta
        assert out["loss_weights"][position] == (row["loss_weights"][real] if asks else 0)
        for asked in ("is_body", "asks_metadata"):
            assert out[asked][position] == (row[asked][real] and asks)
        if asks:
            assert out["targets"][position] == row["targets"][real]
        assert out["segment_ids"][position] == row["segment_ids"][real], "a meta-token joins the segment of the token before it"


@given(injections())
def test_loss_weights_keep_their_order(case):
    """Injection keeps all loss weights, in order, for every setting of `meta_tokens.loss`."""
    row, out, *_ = case
    asked, kept = row["loss_weights"] > 0, out["loss_weights"] > 0
    np.testing.assert_array_equal(out["targets"][kept], row["targets"][asked])
    np.testing.assert_array_equal(out["loss_weights"][kept], row["loss_weights"][asked])
    np.testing.assert_array_equal(out["targets"][out["is_body"]], row["targets"][row["is_body"]])


def test_by_hand():
    row = {
        "tokens": np.array([10, 11, 12], np.int32),
        "targets": np.array([11, 12, 13], np.int32),
        "loss_weights": np.ones(3, np.float32),
        "is_body": np.ones(3, bool),
        "is_metadata": np.array([True, False, False]),
        "asks_metadata": np.zeros(3, bool),
        "segment_ids": np.array([1, 1, 2], np.int32),
    }
    expected = {
        "tokens": [10, META, 11, META, 12, META],
        "targets": [11, 11, 12, 12, 13, 13],
        "is_metadata": [1, 0, 0, 0, 0, 0],
        "segment_ids": [1, 1, 1, 1, 2, 2],
        "meta_positions": [1, 3, 5],
    }
    for loss, weights in (("skip_meta_targets", [0, 1, 0, 1, 0, 1]), ("real_only", [1, 0, 1, 0, 1, 0])):
        out = inject(row, np.random.default_rng(0), meta=MetaTokens(inject="periodic", loss=loss), count=3, meta_id=META)
        for name, values in (expected | {"loss_weights": weights, "is_body": weights}).items():
            np.testing.assert_array_equal(out[name], np.array(values).astype(out[name].dtype), err_msg=name)


def test_random_positions_are_uniform():
    """Chi-square over 4,000 rows: each of positions 1 .. 39 is equally likely. One draw without replacement of 4 of 39 has
    variance p (1 - p) a position and correlation -1 / 38 between two, so that chi-square times 38 / 35 has 38 degrees."""
    rng = np.random.default_rng(7)
    rows, positions, count = 4000, 40, 4
    histogram = np.bincount(
        np.concatenate([choose_positions(positions, count, "random", rng) for _ in range(rows)]), minlength=positions
    )
    assert histogram[0] == 0
    expected = rows * count / (positions - 1)
    chi_square = ((histogram[1:] - expected) ** 2 / expected).sum() * (positions - 2) / (positions - 1 - count)
    assert 0.001 < stats.chi2.sf(chi_square, positions - 2) < 0.999


def test_random_positions_of_two_rows_differ():
    rng = np.random.default_rng(7)
    assert len({tuple(choose_positions(40, 4, "random", rng)) for _ in range(50)}) > 45


@given(st.integers(1, 300).flatmap(lambda positions: st.tuples(st.just(positions + 1), st.integers(1, positions))))
def test_periodic_positions_are_evenly_spread(case):
    positions, count = case
    chosen = choose_positions(positions, count, "periodic", np.random.default_rng(0))
    np.testing.assert_array_equal(chosen, choose_positions(positions, count, "periodic", np.random.default_rng(1)))
    period = (positions - 1) / count
    assert set(np.diff(chosen).tolist()) <= {int(np.floor(period)), int(np.ceil(period))}
    assert abs((chosen[0] - 1) - (positions - 1 - chosen[-1])) <= 1, "equal margins at both ends"


@pytest.mark.parametrize("how", ["random", "periodic"])
def test_all_positions_but_the_first(how):
    np.testing.assert_array_equal(choose_positions(9, 8, how, np.random.default_rng(0)), np.arange(1, 9))
