"""Masks: the predicate compared with a brute-force evaluation of its definition, and closed-form pair counts."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metajax.core.errors import UserError
from metajax.models.masks import Mask, dense_mask, gathered_expiry, meta_dense, meta_flags

LENGTH = 24  # one shape for all examples, so that what varies is data
rows = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(lambda lengths: (lengths, LENGTH - sum(lengths)))
masks = st.builds(Mask, window=st.none() | st.integers(0, 6))


def segment_ids(lengths, padding):
    return np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(padding)]).astype(np.int32)


def brute_force(mask, ids):
    """allowed[q, k] from the sentences of the docstring, pair by pair."""
    allowed = np.zeros((len(ids), len(ids)), bool)
    for q in range(len(ids)):
        for k in range(q + 1):
            allowed[q, k] = ids[q] == ids[k] and (mask.window is None or q - k <= mask.window)
    return allowed


@given(rows, masks)
@settings(max_examples=60, deadline=None)
def test_dense_mask_and_pair_count_agree_with_brute_force(row, mask):
    ids = segment_ids(*row)
    expected = brute_force(mask, ids)
    assert np.array_equal(mask.dense(jnp.asarray(ids)[None])[0], expected)
    assert sum(map(mask.pairs, (*row[0], row[1]))) == expected.sum()


def test_a_repeated_id_after_another_document_is_a_new_segment():
    dense = np.asarray(Mask().dense(jnp.array([[1, 1, 2, 1, 1]]))[0])
    assert not dense[3:, :2].any()
    assert dense[4, 3]


@given(rows, st.data())
@settings(max_examples=40, deadline=None)
def test_gathered_expiry_is_the_dense_meta_mask_at_the_positions(row, data):
    ids = segment_ids(*row)
    used = data.draw(st.sets(st.integers(0, len(ids) - 1)))
    meta_positions = np.array(sorted(used) + [LENGTH] * (LENGTH + 2 - len(used)), np.int32)
    batch, position_batch = jnp.asarray(ids)[None], jnp.asarray(meta_positions)[None]
    dense = np.asarray(meta_dense(batch, position_batch)[0])
    expiry = gathered_expiry(batch, position_batch)
    gathered = np.asarray(dense_mask(expiry)[0])
    n = len(used)
    assert np.array_equal(gathered[:n, :n], dense[np.ix_(meta_positions[:n], meta_positions[:n])])
    assert not gathered[n:].any()
    assert not gathered[:, n:].any()
    assert np.array_equal(np.flatnonzero(meta_flags(position_batch, len(ids))[0]), sorted(used))
    outside = np.setdiff1d(np.arange(len(ids)), sorted(used))
    assert not dense[outside].any()
    assert not dense[:, outside].any()


def test_a_negative_window_is_refused():
    with pytest.raises(UserError, match="window"):
        Mask(window=-1)
