"""The causal convolution: vectors made by the authors' code, tails, and isolation of segments."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from scan_cases import error, races_found

from kernels_pallas.selective_scan.conv import causal_conv_tpu
from kernels_pallas.selective_scan.reference import causal_conv_reference, resolve_tails
from kernels_pallas.selective_scan.xla import causal_conv_xla

IMPLEMENTATIONS = {
    "reference": causal_conv_reference,
    "xla": causal_conv_xla,
    "tpu": functools.partial(causal_conv_tpu, chunk=16, interpret=True),
}
FAST = ("xla", "tpu")
GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "mamba_conv_step_a.npz")
each = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def golden(name):
    """[B, D, L] in the file, [B, L, D] here."""
    return jnp.moveaxis(jnp.asarray(GOLDEN[name]), 1, 2)


def inputs(seed, batch=2, length=23, channels=6, width=4):
    rng = np.random.default_rng(seed)
    sizes = {"x": (batch, length, channels), "w": (channels, width), "b": (channels,)}
    sizes |= {"initial_tail": (batch, width - 1, channels), "reset_tail": (width - 1, channels)}
    arrays = {key: jnp.asarray(rng.normal(size=size), jnp.float32) for key, size in sizes.items()}
    starts = rng.random((batch, length)) < rng.choice([0.1, 0.5, 0.9])
    return arrays, jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


@functools.cache
def compiled(implementation):
    """jitted (arrays, segments, cotangents) -> (y, tail, gradients by name)."""

    @jax.jit
    def run(arrays, segments, weights):
        conv = IMPLEMENTATIONS[implementation]
        (y, tail), pull = jax.vjp(lambda arrays: conv(**arrays, segment_ids=segments), arrays)
        return y, tail, pull((weights[0].astype(y.dtype), weights[1].astype(tail.dtype)))[0]

    return run


def with_gradients(implementation, arrays, segments, weights):
    return jax.tree.map(np.asarray, compiled(implementation)(arrays, segments, weights))


def oracle(arrays, segments, weights):
    with jax.enable_x64(True):
        arrays, weights = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(np.float64)), (arrays, weights))
        return with_gradients("reference", arrays, segments, weights)


@each
def test_golden_conv(implementation):
    arrays = {"x": golden("conv_x"), "w": jnp.asarray(GOLDEN["conv_weight"]), "b": jnp.asarray(GOLDEN["conv_bias"])}
    weights = golden("conv_dout"), jnp.zeros((2, 3, 12))
    y, tail, gradients = with_gradients(implementation, arrays, None, weights)
    np.testing.assert_allclose(y, golden("conv_out"), atol=3e-6, rtol=0)
    np.testing.assert_allclose(tail, golden("conv_final_state"), atol=3e-6, rtol=0)
    expected = {"x": golden("conv_grad_x"), "w": GOLDEN["conv_grad_weight"], "b": GOLDEN["conv_grad_bias"]}
    for key, exact in expected.items():
        np.testing.assert_allclose(gradients[key], exact, atol=3e-6, rtol=0, err_msg=key)
    y, tail = IMPLEMENTATIONS[implementation](**arrays, initial_tail=golden("conv_initial_state"))
    np.testing.assert_allclose(y, golden("conv_out_with_initial"), atol=3e-6, rtol=0)
    np.testing.assert_allclose(tail, golden("conv_final_state_with_initial"), atol=3e-6, rtol=0)


@each
def test_golden_step(implementation):
    """One token: the file keeps four columns of state, of which the step does not use the oldest."""
    arrays = {"w": jnp.asarray(GOLDEN["conv_weight"]), "b": jnp.asarray(GOLDEN["conv_bias"])}
    y, tail = IMPLEMENTATIONS[implementation](
        jnp.asarray(GOLDEN["conv_step_x"])[:, None], **arrays, initial_tail=golden("conv_step_state_in")[:, 1:]
    )
    np.testing.assert_allclose(y[:, 0], GOLDEN["conv_step_out"], atol=3e-6, rtol=0)
    np.testing.assert_allclose(tail, golden("conv_step_state_out")[:, 1:], atol=3e-6, rtol=0)


@pytest.mark.parametrize("implementation", FAST)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), shape=st.sampled_from([(1, 4), (2, 4), (23, 4), (40, 4), (23, 3), (1, 3), (23, 2)]))
def test_float32_matches_oracle(implementation, seed, shape):
    """Segments of one token and more, rows shorter than the tail, widths 2 to 4, all gradients: both tails' too."""
    length, width = shape
    arrays, segments = inputs(seed, length=length, width=width)
    rng = np.random.default_rng(seed)
    weights = tuple(jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, length, 6), (2, width - 1, 6)))
    y, tail, gradients = with_gradients(implementation, arrays, segments, weights)
    exact_y, exact_tail, exact = oracle(arrays, segments, weights)
    assert error(y, exact_y) <= 1e-6
    assert np.array_equal(tail, exact_tail)
    for key in arrays:
        assert error(gradients[key], exact[key]) <= 1e-5, key


@pytest.mark.fault(33)
@pytest.mark.parametrize("width", [2, 3, 4])
@each
def test_every_width_is_a_sum_over_its_taps(implementation, width):
    """Against the sum in float64; the tail is what was read last."""
    arrays, _ = inputs(8, width=width)
    x, w, b = (np.asarray(arrays[name], np.float64) for name in ("x", "w", "b"))
    extended = np.concatenate([np.asarray(arrays["initial_tail"], np.float64), x], axis=1)
    total = b + sum(w[:, k] * extended[:, k : k + x.shape[1]] for k in range(width))
    y, tail = IMPLEMENTATIONS[implementation](**arrays)
    np.testing.assert_allclose(y, total / (1 + np.exp(-total)), atol=3e-6, rtol=0)
    np.testing.assert_allclose(tail, extended[:, -(width - 1) :], atol=0, rtol=1e-6)


@pytest.mark.fault(33)
@each
def test_other_widths_and_tails_are_refused(implementation):
    conv, arrays = IMPLEMENTATIONS[implementation], inputs(9)[0]
    plain = {name: arrays[name] for name in ("x", "b")}
    for width in (1, 5):
        with pytest.raises(ValueError, match=f"width {width}"):
            conv(**plain, w=jnp.ones((6, width)))
    with pytest.raises(ValueError, match="tails of 3 and 3"):
        resolve_tails(arrays["x"], 3, arrays["initial_tail"], arrays["reset_tail"])


@pytest.mark.parametrize("implementation", FAST)
def test_bfloat16_is_as_good_as_the_reference(implementation):
    arrays, segments = inputs(1)
    arrays["x"] = arrays["x"].astype(jnp.bfloat16)
    weights = jnp.ones((2, 23, 6)), jnp.zeros((2, 3, 6))
    exact = oracle(arrays, segments, weights)
    ours, theirs = (with_gradients(name, arrays, segments, weights) for name in (implementation, "reference"))
    for x, y, reference in zip(*(jax.tree.leaves(z) for z in (ours, theirs, exact)), strict=True):
        assert x.dtype == y.dtype and error(x, reference) <= 2 * error(y, reference) + 1e-6


@each
def test_no_gradient_crosses_segments(implementation):
    arrays, _ = inputs(2, batch=1)
    segments = jnp.asarray(np.repeat([[3, 3, 1, 2, 0]], [6, 5, 1, 2, 9], axis=1), jnp.int32)
    for own in (3, 1, 2, 0):
        mask = np.asarray(segments[0] == own)
        weights = jnp.ones((1, 23, 6)) * mask[:, None], jnp.zeros((1, 3, 6))
        _, _, gradients = with_gradients(implementation, arrays, segments, weights)
        per_token = np.abs(gradients["x"][0]).max(axis=-1)
        assert np.all(per_token[~mask] == 0.0) and np.all(per_token[mask] > 0.0)
        assert np.any(gradients["initial_tail"]) == (own == 3)
        assert np.any(gradients["reset_tail"]) == (own != 3)


@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize("implementation", FAST)
def test_two_halves_equal_the_whole(implementation, width):
    """Cut at every token with the tail passed on, including short and just started segments."""
    arrays, segments = inputs(4, width=width)
    conv = jax.jit(IMPLEMENTATIONS[implementation])
    whole, tail = conv(**arrays, segment_ids=segments)
    rest = {key: arrays[key] for key in ("w", "b", "reset_tail")}
    for cut in (1, 2, 3, 9, 16, 20):
        if not np.array_equal(segments[:, cut], segments[:, cut - 1]):
            continue  # a later call cannot know that its first token starts a segment
        first, between = conv(**(arrays | {"x": arrays["x"][:, :cut]}), segment_ids=segments[:, :cut])
        second, last = conv(arrays["x"][:, cut:], **rest, initial_tail=between, segment_ids=segments[:, cut:])
        np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=1e-6, rtol=0)
        assert np.array_equal(last, tail)


def test_segment_at_every_offset():
    """Row i of the batch starts a segment at token i, another two tokens later: every offset modulo tile and group."""
    arrays, _ = inputs(5, batch=33, length=35, channels=3)
    token = np.arange(35)
    segments = jnp.asarray((token >= np.arange(33)[:, None]).astype(np.int32) + (token >= np.arange(33)[:, None] + 2))
    rng = np.random.default_rng(5)
    weights = tuple(jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((33, 35, 3), (33, 3, 3)))
    y, tail, gradients = with_gradients("tpu", arrays, segments, weights)
    exact_y, exact_tail, exact = oracle(arrays, segments, weights)
    assert np.array_equal(tail, exact_tail)
    for i in range(33):
        assert error(y[i], exact_y[i]) <= 1e-6 and error(gradients["x"][i], exact["x"][i]) <= 1e-5, i
    for key in ("w", "b", "reset_tail", "initial_tail"):
        assert error(gradients[key], exact[key]) <= 1e-5, key


def test_interpreter_finds_no_race_and_no_uninitialised_read():
    arrays, segments = inputs(6, batch=2, length=35, channels=5)
    weights = jnp.ones((2, 35, 5)), jnp.ones((2, 3, 5))
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    conv = functools.partial(causal_conv_tpu, chunk=16, interpret=params, segment_ids=segments)
    outputs, pull = jax.vjp(lambda arrays: conv(**arrays), arrays)
    for ours, exact in zip(
        jax.tree.leaves((*outputs, pull(weights)[0])), jax.tree.leaves(oracle(arrays, segments, weights)), strict=True
    ):
        assert error(ours, exact) <= 1e-5
    assert not races_found()


def test_two_runs_are_bit_identical():
    arrays, segments = inputs(7, length=40)
    weights = jnp.ones((2, 40, 6)), jnp.ones((2, 3, 6))
    first, second = (with_gradients("tpu", arrays, segments, weights) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
