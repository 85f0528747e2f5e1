"""Attention kernels on golden vectors (dense float64), and meta-attention compared with its dense form."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.prefix_window_attention.reference import attention_reference, masked_attention
from kernels_pallas.prefix_window_attention.tpu import attention_tpu
from kernels_pallas.prefix_window_attention.xla import attention_xla
from metajax.models import ops
from metajax.models.layers import gather_rows, scatter_add_rows
from metajax.models.masks import Mask, meta_dense

FILES = {name: np.load(Path(__file__).parents[1] / "goldens" / f"{name}.npz") for name in ("attn_small_a", "attn_mid_a")}
CASES = [(file, mask) for file, z in FILES.items() for mask in dict.fromkeys(k.split("/")[0] for k in z.files if "/" in k)]
IMPLEMENTATIONS = {
    "reference": attention_reference,
    "xla": attention_xla,
    "pallas_tpu": functools.partial(attention_tpu, block_q=16, block_k=32, interpret=True),
}


def heads_last(x):
    return jnp.moveaxis(jnp.asarray(x), 1, 2)


def golden_expiry(z, name):
    """A prefix is a number of first keys that every later query attends to."""
    batch, length = z["q"].shape[0], z["q"].shape[2]
    window = {"causal": None, "window_prefix_decode": int(z["window"]) - 1}.get(name, int(z["window"]))
    expiry = Mask(window=window).expiry(jnp.ones((batch, length), jnp.int32))
    return expiry.at[:, : int(z["prefix"])].set(length) if "prefix" in name else expiry


def meta_positions_of(is_meta):
    """Sorted meta-token indices of each row, padded with T and T + 1 to the longest row and one more."""
    width = int(is_meta.sum(axis=1).max()) + 1
    rows = [np.flatnonzero(row) for row in is_meta]
    return jnp.asarray(
        np.stack([np.r_[r, np.full(width - len(r), len(row))] for r, row in zip(rows, is_meta, strict=True)]), jnp.int32
    )


@functools.partial(jax.jit, static_argnums=0)
def outputs(attend, q, k, v, expiry, d_out):
    """One program for all masks of a file, which are data."""
    (out, lse), pull = jax.vjp(lambda q, k, v: attend(q, k, v, expiry), q, k, v)
    return out, lse, pull((d_out, jnp.zeros_like(lse)))


def check(z, name, attend, expiry, rows=None):
    q, k, v, d_out = (heads_last(z[n]) for n in ("q", "k", "v", "dout"))
    out, lse, gradients = outputs(attend, q, k, v, expiry, d_out)
    np.testing.assert_allclose(out, heads_last(z[f"{name}/out"]), atol=3e-6, rtol=0)
    expected = np.moveaxis(z[f"{name}/lse"], 1, 2)
    where = np.ones(lse.shape[:2], bool) if rows is None else rows
    np.testing.assert_allclose(np.asarray(lse)[where], expected[where], atol=3e-6, rtol=0)
    for ours, n in zip(gradients, ("dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(ours, heads_last(z[f"{name}/{n}"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("file", "name"), [c for c in CASES if c[1] != "meta"])
def test_golden_causal_masks(file, name, implementation):
    z = FILES[file]
    check(z, name, golden_attention(implementation, z["q"].shape[-1]), golden_expiry(z, name))


@functools.cache
def golden_attention(implementation, width):
    options = {"block": 16} if implementation == "xla" else {}
    return functools.partial(IMPLEMENTATIONS[implementation], scale=width**-0.5, **options)


@pytest.mark.parametrize("form", ["dense", *IMPLEMENTATIONS])
@pytest.mark.parametrize("file", FILES)
def test_golden_meta_mask(file, form, monkeypatch):
    z = FILES[file]
    monkeypatch.setattr(ops, "ATTENTION", {f"plain {name}": kernel for name, kernel in IMPLEMENTATIONS.items()})
    is_meta = z["is_meta"]
    ids, meta_positions = jnp.ones(is_meta.shape, jnp.int32), meta_positions_of(is_meta)

    def gathered(q, k, v, _):
        out, lse = ops.meta_attention(
            *(gather_rows(y, meta_positions) for y in (q, k, v)),
            meta_positions=meta_positions,
            segment_ids=ids,
            implementation=f"plain {form}",
        )
        empty = jnp.zeros((*q.shape[:3], v.shape[3]))
        return scatter_add_rows(empty, meta_positions, out), scatter_add_rows(
            jnp.zeros(q.shape[:3]), meta_positions, jnp.where(lse > -1e9, lse, 0)
        )

    def dense(q, k, v, _):
        return masked_attention(q, k, v, meta_dense(ids, meta_positions), scale=q.shape[-1] ** -0.5)

    check(z, "meta", dense if form == "dense" else gathered, ids, rows=is_meta)


def random_inputs(seed, batch=2, length=24, keys=None, heads=4, kv_heads=2, dtype=jnp.float32):
    sizes = (
        (length, heads, 8),
        (keys or length, kv_heads, 8),
        (keys or length, kv_heads, 12),
        (length, heads, 12),
        (length, heads),
    )
    draws = jax.random.split(jax.random.key(seed), len(sizes))
    return [jax.random.normal(k, (batch, *size)).astype(dtype) for k, size in zip(draws, sizes, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def both_outputs(kernel, options, q, k, v, expiry, d_out, d_lse):
    """(out, lse) and the gradients of a loss that reads both."""

    def value(q, k, v):
        out, lse = kernel(q, k, v, expiry, scale=0.3, **dict(options))
        return jnp.sum(out * d_out) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0.0) * d_lse), (out, lse)

    (_, outputs), gradients = jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return outputs, gradients


@given(st.integers(0, 10_000), st.sampled_from([2, 10, 256]), st.just(40))
@settings(max_examples=9, deadline=None)
def test_blocks_equal_the_reference_with_rows_that_see_nothing(seed, block, keys):
    """Arbitrary lifetimes, some of them empty; gradients of both outputs; queries at the end of the keys."""
    q, k, v, d_out, d_lse = random_inputs(seed, keys=keys)
    expiry = jax.random.randint(jax.random.key(seed), (2, keys), 0, keys + 4).at[:, keys - 20 : keys - 8].set(0)
    arrays = (q, k, v, expiry, d_out, d_lse)
    (out, lse), gradients = both_outputs(attention_reference, (), *arrays)
    (xla_out, xla_lse), xla_gradients = both_outputs(attention_xla, (("block", block),), *arrays)
    empty = np.asarray(lse) == -np.inf
    assert np.array_equal(empty, np.asarray(xla_lse) == -np.inf)
    assert not np.asarray(xla_out)[empty].any()
    np.testing.assert_allclose(xla_out, out, atol=2e-6)
    np.testing.assert_allclose(np.asarray(xla_lse)[~empty], np.asarray(lse)[~empty], atol=2e-6)
    for ours, expected in zip(xla_gradients, gradients, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
        assert np.isfinite(ours).all()


@pytest.mark.parametrize("kernel", IMPLEMENTATIONS.values())
def test_a_row_of_nothing_is_zero_with_zero_gradients(kernel):
    q, k, v, d_out, d_lse = random_inputs(0)
    (out, lse), gradients = both_outputs(kernel, (), q, k, v, jnp.zeros((2, 24), jnp.int32), d_out, d_lse)
    assert not np.asarray(out).any()
    assert np.all(np.asarray(lse) == -np.inf)
    for gradient in gradients:
        assert not np.asarray(gradient).any()


def test_bfloat16_is_as_close_to_float32_as_the_reference_is():
    inputs = random_inputs(3, length=64, dtype=jnp.bfloat16)[:3]
    expiry = Mask().expiry(jnp.ones((2, 64), jnp.int32))
    exact = attention_reference(*(x.astype(jnp.float32) for x in inputs), expiry, scale=0.3)[0]
    error = {
        name: np.abs(np.asarray(jax.jit(functools.partial(kernel, scale=0.3))(*inputs, expiry)[0], np.float32) - exact).max()
        for name, kernel in IMPLEMENTATIONS.items()
    }
    assert 0 < error["xla"] <= 2 * error["reference"]


def test_no_array_of_queries_by_keys_is_built():
    """Temporary memory of the blocked forward and backward grows with the length, not with its square."""

    def temporaries(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        loss = lambda q, k, v, e: jnp.sum(attention_xla(q, k, v, e, scale=0.25)[0] ** 2)  # noqa: E731
        expiry = jax.ShapeDtypeStruct((1, length), jnp.int32)
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q, expiry).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.5 * temporaries(4096)
