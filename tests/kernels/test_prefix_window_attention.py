"""Prefix-and-window attention compared with a dense float64 oracle: values, all gradients, mask resets, and skipped blocks."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BLOCK,
    IMPLEMENTATIONS,
    SCALE,
    SHAPES,
    Shape,
    cotangents,
    error,
    errors,
    make_arrays,
    oracle,
    races_found,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.prefix_window_attention import tpu
from kernels_pallas.prefix_window_attention.blocks import PAST_END, block_lists, inner, is_full, open_blocks, outer
from kernels_pallas.prefix_window_attention.tpu import attention_tpu, kept, tiling_of
from metajax.models.masks import segment_end


def lifetimes(kind, batch, keys, seed):
    """int32[batch, keys]: segments, within a window, after an always visible prefix, or arbitrary lifetimes."""
    rng = np.random.default_rng(seed)
    index = np.arange(keys)
    ids = np.cumsum(rng.random((batch, keys)) < rng.choice([0.02, 0.2]), axis=1)
    end = np.asarray(segment_end(jnp.asarray(ids)))
    if kind == "segments":
        return jnp.asarray(end)
    window = np.minimum(end, index + 1 + int(rng.choice([0, 3, BLOCK, 40])))
    if kind == "window":
        return jnp.asarray(window)
    if kind == "prefix":
        return jnp.asarray(np.where(index < rng.integers(1, keys), keys, window))
    return jnp.asarray(rng.integers(-3, 2 * keys, (batch, keys)).astype(np.int32))


kinds = st.sampled_from(["segments", "window", "prefix", "anything"])


@given(st.sampled_from(SHAPES), kinds, st.integers(0, 10_000), st.data())
@settings(max_examples=20, deadline=None)
def test_equals_the_float64_oracle(shape, kind, seed, data):
    """Offsets put queries before, among and after the keys, so that some rows have no key."""
    offset = jnp.int32(data.draw(st.sampled_from([shape.keys - shape.queries, 0]) | st.integers(-shape.queries - 5, shape.keys)))
    arrays, weights = make_arrays(shape, seed), cotangents(shape, seed)
    expiry = lifetimes(kind, shape.batch, shape.keys, seed)
    exact = oracle(arrays, expiry, offset, weights)
    weights = (weights[0], jnp.where(jnp.isneginf(exact[1]), 0, weights[1]))
    for name in ("tpu", "parts", "xla", "reference"):
        outputs, gradients = errors(run(name, arrays, expiry, offset, weights), exact)
        assert outputs <= 1e-6, name
        assert gradients <= 1e-5, name


@pytest.mark.parametrize(("window", "offset"), [(0, 0), (7, 30), (20, 0), (20, -9), (33, 9)])
def test_a_window_hides_what_is_before_it(window, offset):
    """The gradients of keys wait in a ring that is as long as the window: also where queries or keys have no partner."""
    shape = SHAPES[0]
    arrays, weights = make_arrays(shape, 4), cotangents(shape, 4)
    expiry = lifetimes("anything", shape.batch, shape.keys, window)
    exact = oracle(arrays, jnp.minimum(expiry, jnp.arange(70) + window + 1), offset, weights)
    for name in ("tpu", "parts", "xla", "reference"):
        assert max(errors(run(name, arrays, expiry, jnp.int32(offset), weights, window), exact)) <= 1e-5, name


def test_two_kernels_take_over_where_the_gradients_of_keys_do_not_fit(monkeypatch):
    """One KV head a step where two do not fit, then a kernel for dq and one for dk and dv; the same sums in another order."""
    shape = SHAPES[0]
    arrays, weights = make_arrays(shape, 6), cotangents(shape, 6)
    expiry = lifetimes("prefix", 2, 70, 6)
    exact = oracle(arrays, expiry, 0, weights)
    row = 4 * 3 * 32 * (16 + 16)
    attend = functools.partial(attention_tpu, scale=SCALE, block_q=2 * BLOCK, block_k=2 * BLOCK, border=BLOCK, interpret=True)
    for size, kernels in ((2 * row, {""}), (row, {""}), (row - 1, {"_q", "_kv"})):
        monkeypatch.setattr(tpu, "RING_BYTES", size)
        assert kept((2, 70, 2, 8), (2, 70, 2, 16), 2, 32, None) == (2 if size != row else 1, 0 if size < row else 3)

        def outputs(arrays):
            (out, lse), pull = jax.vjp(lambda arrays: attend(**arrays, expiry=expiry), arrays)
            return out, lse, pull(weights)[0]

        assert max(errors(jax.jit(outputs)(arrays), exact)) <= 1e-5
        names = re.findall(r"name=prefix_window_attention_backward(\w*)", str(jax.make_jaxpr(outputs)(arrays)))
        assert set(names) == kernels


@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_is_as_close_as_xla(seed):
    shape = SHAPES[0]
    arrays = {name: x.astype(jnp.bfloat16) for name, x in make_arrays(shape, seed).items()}
    weights = (cotangents(shape, seed)[0].astype(jnp.bfloat16), cotangents(shape, seed)[1])
    expiry = lifetimes("window", shape.batch, shape.keys, seed)
    exact = oracle(arrays, expiry, 0, weights)
    ours, xla = (run(name, arrays, expiry, jnp.int32(0), weights) for name in ("tpu", "xla"))
    assert ours[0].dtype == jnp.bfloat16 and ours[1].dtype == np.float32
    for i in (0, 1):
        assert error(ours[i], exact[i]) <= 2 * error(xla[i], exact[i]) + 1e-6
    for name, gradient in exact[2].items():
        assert ours[2][name].dtype == jnp.bfloat16
        assert error(ours[2][name], gradient) <= 2 * error(xla[2][name], gradient), name


def test_no_races_and_nothing_read_before_it_is_written():
    """One row sees nothing at all, one key is seen by none, and the last blocks are padding."""
    shape = Shape(2, 20, 37, 2, 1, (8, 8), 3)
    arrays, weights = make_arrays(shape, 5), cotangents(shape, 5)
    expiry = lifetimes("window", 2, 37, 5).at[1].set(0)
    mode = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    attend = functools.partial(attention_tpu, scale=SCALE, block_q=BLOCK, block_k=BLOCK, interpret=mode)

    def outputs(arrays):
        (out, lse), pull = jax.vjp(lambda arrays: attend(**arrays, expiry=expiry), arrays)
        return out, lse, pull(weights)[0]

    ours = jax.jit(outputs)(arrays)
    assert max(errors(ours, oracle(arrays, expiry, 17, weights))) <= 1e-5
    assert not races_found()


@pytest.mark.parametrize("name", ["tpu", "xla"])
def test_other_segments_get_gradients_of_exactly_zero(name):
    shape = SHAPES[0]
    arrays, weights = make_arrays(shape, 7), cotangents(shape, 7)
    start, stop = 21, 44  # a segment whose ends fall inside blocks
    expiry = jnp.where(jnp.arange(70) < start, start, jnp.where(jnp.arange(70) < stop, stop, 70))
    inside = (jnp.arange(70) >= start) & (jnp.arange(70) < stop)
    weights = (weights[0] * inside[:, None, None], weights[1] * inside[:, None])
    _, _, gradients = run(name, arrays, jnp.stack([expiry] * 2).astype(jnp.int32), jnp.int32(0), weights)
    for x in "qkv":
        assert not gradients[x][:, ~np.asarray(inside)].any()
        assert np.all(np.any(gradients[x][:, np.asarray(inside)], axis=(2, 3)))


def test_two_runs_are_bit_identical():
    shape = SHAPES[0]
    arguments = (make_arrays(shape, 8), lifetimes("prefix", 2, 70, 8), jnp.int32(0), cotangents(shape, 8))
    first, second = (jax.tree.leaves(run("tpu", *arguments)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["tpu", "xla"])
def test_two_calls_merged_by_log_sum_exp_equal_one(name):
    """Disjoint keys; the second half begins after the first queries (a negative offset); one call has the meta keys."""
    shape, half = SHAPES[0], 33
    arrays, weights = make_arrays(shape, 9), cotangents(shape, 9)
    expiry = lifetimes("prefix", 2, 70, 9)
    attend = functools.partial(IMPLEMENTATIONS[name], scale=SCALE)

    def merged(x):
        metas = {key: x[key] for key in ("prefix_k", "prefix_v")}
        one = attend(x["q"], x["k"][:, :half], x["v"][:, :half], expiry[:, :half], q_offset=0, **metas)
        two = attend(x["q"], x["k"][:, half:], x["v"][:, half:], expiry[:, half:] - half, q_offset=-half)
        lse = jnp.logaddexp(one[1], two[1])
        return sum(jnp.exp(part - lse)[..., None] * out for out, part in (one, two)), lse

    @jax.jit
    def outputs(arrays):
        (out, lse), pull = jax.vjp(merged, arrays)
        return out, lse, pull(weights)[0]

    ours = outputs(arrays)
    assert np.isneginf(
        attend(**{k: arrays[k][:, -37:] for k in "kv"}, q=arrays["q"], expiry=expiry[:, -37:] - 33, q_offset=-33)[1]
    ).any()
    values, gradients = errors(ours, oracle(arrays, expiry, 0, weights))
    assert values <= 1e-6
    assert gradients <= 1e-5


@functools.cache
def lists_of(queries, block_q, block_k):
    return jax.jit(lambda expiry, offset: block_lists(expiry, offset, queries, block_q, block_k))


@given(kinds, st.integers(0, 10_000), st.sampled_from([(50, 8, 8, 0), (50, 8, 16, 0), (23, 16, 8, 27), (50, 8, 8, -9)]))
@settings(max_examples=40, deadline=None)
def test_the_visited_blocks_are_those_with_an_allowed_pair(kind, seed, shape):
    """Each block once, in order, in both lists; an empty row of blocks has one visit, which writes its zeros."""
    queries, block_q, block_k, offset = shape
    batch, keys = 3, 50
    expiry = lifetimes(kind, batch, keys, seed)
    q, k = np.arange(queries)[:, None] + offset, np.arange(keys)
    allow = (k <= q) & (q < np.asarray(expiry)[:, None, :])
    padded = np.pad(allow, ((0, 0), (0, -queries % block_q), (0, -keys % block_k)))
    blocks = padded.reshape(batch, -(-queries // block_q), block_q, -(-keys // block_k), block_k)
    some, rows = blocks.any(axis=(2, 4)), blocks.sum(axis=(2, 4))
    real = np.minimum(queries - np.arange(0, queries, block_q), block_q)
    whole = rows == real[:, None] * block_k
    lists = lists_of(queries, block_q, block_k)(expiry, jnp.int32(offset))
    for visits, count, axis in ((lists.by_query, lists.count, 2), (lists.by_key, lists.count, 1)):
        lines = [np.asarray(part(visits))[:count] for part in (outer, inner)]
        full = np.asarray(is_full(visits))[:count]
        visits = np.asarray(visits)
        assert (visits[count:] == PAST_END).all() and len(visits) > count
        assert (np.diff(visits[:count]) > 0).all()
        query, key = lines if axis == 2 else lines[::-1]
        seen = {
            (i // some.shape[1], i % some.shape[1], j % some.shape[2]): one for i, j, one in zip(query, key, full, strict=True)
        }
        assert len(seen) == count and (query // some.shape[1] == key // some.shape[2]).all()
        allowed = {tuple(block) for block in np.argwhere(some)}
        lonely = [{tuple(line) for line in np.argwhere(~some.any(axis=axis))} for axis in (1, 2)]  # blocks of keys, of queries
        added = set(seen) - allowed
        assert allowed <= set(seen) and len(added) <= sum(map(len, lonely))
        assert all((row, j) in lonely[0] or (row, i) in lonely[1] for row, i, j in added)
        assert {(row, j) for row, _, j in seen} | {(row, i) for row, i, _ in seen} >= set.union(*lonely)
        assert all(whole[block] == one for block, one in seen.items())


@given(st.integers(0, 10_000), st.sampled_from([0, 1, 5, 8, 9, 17, 40]), st.sampled_from([(8, 8), (8, 16), (16, 8)]))
@settings(max_examples=60, deadline=None)
def test_blocks_of_a_window_never_meet_in_their_place(seed, window, blocks):
    """In the order of the visits, with every offset: a place is free when a block of keys opens, and freed when it closes."""
    rng = np.random.default_rng(seed)
    offset, (block_q, block_k) = int(rng.integers(-60, 60)), blocks
    expiry = np.minimum(lifetimes("anything", 2, 50, seed), np.arange(50) + window + 1)
    lists = block_lists(jnp.asarray(expiry), offset, 50, block_q, block_k, window)
    opens, closes, held = np.asarray(lists.opens), np.asarray(lists.closes), {}
    for visit in lists.by_query[: int(lists.count)]:
        query, key = int(outer(visit)), int(inner(visit))
        place = key % open_blocks(block_k, window)
        if query == opens[key]:
            assert place not in held
            held[place] = key
        assert held[place] == key
        if query == closes[key]:
            del held[place]
    assert not held


def test_a_static_window_visits_no_block_too_many():
    """Hymba's shape: 4 earlier blocks and its own for each block of queries."""
    expiry = jnp.minimum(jnp.arange(8192) + 1025, 8192).astype(jnp.int32)[None]
    lists = block_lists(expiry, 0, 8192, 256, 256)
    assert int(lists.count) == 1 + 2 + 3 + 4 + 28 * 5
    useful, computed = 8192 * 1025 - 1024 * 1025 // 2 + 8192 * 128, 256 * (150 * 256 + 32 * 128)
    assert useful / computed >= 0.8


def test_unsupported_inputs_are_named():
    q = jnp.zeros((1, 4, 2, 8))
    expiry = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="float32 or bfloat16, not q, k, v of float16, float16"):
        attention_tpu(*[q.astype(jnp.float16)] * 3, expiry, scale=1.0)
    with pytest.raises(ValueError, match="2 query heads do not divide into groups by 3"):
        attention_tpu(q, jnp.zeros((1, 4, 3, 8)), jnp.zeros((1, 4, 3, 8)), expiry, scale=1.0)
    with pytest.raises(ValueError, match=r"a block of 64: .* a multiple"):
        attention_tpu(q, q, q, expiry, scale=1.0, block_q=64)
    with pytest.raises(ValueError, match=r"use larger blocks .* or fewer rows"):
        jax.eval_shape(lambda e: block_lists(e, 0, 2**18, 256, 256), jax.ShapeDtypeStruct((1, 2**18), jnp.int32))


def test_long_rows_get_larger_blocks():
    """Half of T^2 / (block_q block_k) visits of causal rows; a window needs few at any length, a traced offset twice as many."""
    shapes = {}
    for length in (512, 2**18, 2**19, 2**20, 2**22):
        shapes[length] = tiling_of((1, length, length), (12, 12), "bfloat16", 0, None)[:2]
    assert shapes == {
        512: (512, 512),
        2**18: (512, 512),
        2**19: (1024, 1024),
        2**20: (1024, 4096),
        2**22: (1024, 4096),  # does not fit, which `block_lists` says
    }
    assert tiling_of((1, 2**20, 2**20), (12, 12), "bfloat16", 0, 1024)[:2] == (512, 512)
    assert tiling_of((1, 2**13, 2**20), (12, 12), "bfloat16", jnp.int32(0), None)[:2] == (512, 512)
    assert tiling_of((1, 2**18, 2**18), (12, 12), "bfloat16", 0, None, block_k=256)[:2] == (1024, 256)
    assert tiling_of((1, 8192, 8192), (1, 1), "bfloat16", 0, None) == (512, 512, 512, 512, 256), "one head: nothing to overlap"
    assert tiling_of((1, 8192, 8192), (25, 5), "float32", 0, None) == (256, 256, 256, 256, 256)


def test_no_array_of_queries_by_keys_is_built():
    """The largest intermediate of forward and backward is linear in the length, the mask's preparation included."""
    shape = Shape(1, 2048, 2048, 2, 1, (16, 16), 0)
    arrays = jax.eval_shape(lambda: make_arrays(shape, 0))
    expiry = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    loss = lambda x, e: jnp.sum(attention_tpu(**x, expiry=e, scale=1.0)[0])  # noqa: E731
    text = jax.jit(jax.grad(loss)).trace(arrays, expiry).lower(lowering_platforms=("tpu",)).as_text()
    sizes = [math.prod(map(int, dims.split("x"))) for dims in set(re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]", text))]
    assert 2048 * 2 * 16 <= max(sizes) < 2048 * 2048 / 16
