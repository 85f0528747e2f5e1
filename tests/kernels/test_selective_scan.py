"""The selective scan compared with a float64 oracle, the authors' vectors, and itself: resets, gradients, state passing."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from scan_cases import CHUNK, IMPLEMENTATIONS, SHAPES, Shape, cotangents, error, make_inputs, oracle, races_found, run

from kernels_pallas.selective_scan.conv import causal_conv_tpu
from kernels_pallas.selective_scan.tpu import selective_scan_tpu
from kernels_pallas.selective_scan.xla import selective_scan_xla

FAST = ("sequential", "associative", "tpu")
GOLDENS = {
    name: np.load(Path(__file__).parents[1] / "goldens" / f"{name}.npz")
    for name in ("mamba_scan_a", "mamba_scan_b", "mamba_conv_step_a")
}
BY_TOKEN = ("u", "dt", "B", "C", "z")  # [B, D, L] in the files, [B, L, D] here
STORED = {"dt": "delta", "dt_bias": "delta_bias"}  # names in the files, where they differ


def golden_inputs(file):
    stored = {name: file[STORED.get(name, name)] for name in (*BY_TOKEN, "A", "D", "dt_bias")}
    arrays = {name: np.moveaxis(array, 1, 2) if name in BY_TOKEN else array for name, array in stored.items()}
    state = np.zeros((file["u"].shape[0], *file["A"].shape), np.float32)
    return jax.tree.map(jnp.asarray, arrays | {"initial_state": state})


@pytest.mark.parametrize(
    "name, implementation",
    [("mamba_scan_a", name) for name in IMPLEMENTATIONS] + [("mamba_scan_b", name) for name in ("sequential", "tpu")],
)
def test_golden_scan(name, implementation):
    file = GOLDENS[name]
    arrays = golden_inputs(file)
    weights = np.moveaxis(file["dout"], 1, 2), file["dlast_state"]
    for prefix, weight in (("grad_", 0.0), ("gradls_", 1.0)):
        y, state, gradients = run(implementation, arrays, None, (weights[0], weight * weights[1]))
        assert error(np.moveaxis(y, 1, 2), file["out"]) <= 5e-6
        assert error(state, file["last_state"]) <= 5e-6
        for key in (*BY_TOKEN, "A", "D", "dt_bias"):
            ours = np.moveaxis(gradients[key], 1, 2) if key in BY_TOKEN else gradients[key]
            assert error(ours, file[prefix + STORED.get(key, key)]) <= 2e-5, (prefix, key)
    plain = {key: x for key, x in arrays.items() if key != "z"} | {"D": np.zeros_like(arrays["D"])}
    y, _, _ = run(implementation, plain, None, weights)
    assert error(np.moveaxis(y, 1, 2), file["out_noD_noz"]) <= 5e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_golden_step(implementation):
    """One token from a given state: what decoding does."""
    file = GOLDENS["mamba_conv_step_a"]
    tokens = {key: file[f"ssm_step_{old}"][:, None] for key, old in zip(BY_TOKEN, ("x", "dt", "B", "C", "z"), strict=True)}
    weights = {key: file[f"ssm_step_{old}"] for key, old in (("A", "A"), ("D", "D"), ("dt_bias", "dt_bias"))}
    arrays = jax.tree.map(jnp.asarray, tokens | weights | {"initial_state": file["ssm_step_state_in"]})
    y, state = IMPLEMENTATIONS[implementation](**arrays)
    np.testing.assert_allclose(y[:, 0], file["ssm_step_out"], atol=3e-6, rtol=0)
    np.testing.assert_allclose(state, file["ssm_step_state_out"], atol=3e-6, rtol=0)


def check_float32(implementation, shape, seed, step, state):
    arrays, reset = make_inputs(shape, seed, step, state)
    weights = cotangents(shape, seed)
    y, final, gradients = run(implementation, arrays, reset, weights)
    exact_y, exact_final, exact_gradients = oracle(arrays, reset, weights)
    assert y.dtype == np.float32 and final.dtype == np.float32
    assert error(y, exact_y) <= 1e-6
    assert error(final, exact_final) <= 1e-6
    assert gradients.keys() == arrays.keys()
    for key, exact in exact_gradients.items():
        assert error(gradients[key], exact) <= 1e-5, key


scales = {"seed": st.integers(0, 2**20), "step": st.sampled_from([1e-3, 1.0, 8.0]), "state": st.floats(0, 5)}


@pytest.mark.parametrize("implementation", ["sequential", "tpu"])
@settings(max_examples=12, deadline=None)
@given(shape=st.sampled_from(SHAPES), **scales)
@example(shape=SHAPES[0], seed=0, step=1.0, state=1.0)
@example(shape=SHAPES[1], seed=1, step=1e-3, state=0.0)
def test_float32_matches_oracle(implementation, shape, seed, step, state):
    check_float32(implementation, shape, seed, step, state)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", FAST)
@settings(max_examples=200, deadline=None)
@given(shape=st.sampled_from(SHAPES), **scales)
def test_float32_matches_oracle_often(implementation, shape, seed, step, state):
    check_float32(implementation, shape, seed, step, state)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    shape=st.builds(
        Shape, st.integers(1, 3), st.integers(1, 100), st.integers(20, 400), st.integers(3, 24), st.booleans(), st.booleans()
    ),
    **scales,
)
def test_any_shape_matches_oracle(shape, seed, step, state):
    check_float32("tpu", shape, seed, step, state)


@settings(max_examples=6, deadline=None)
@given(shape=st.sampled_from(SHAPES[:2]), seed=st.integers(0, 2**20))
def test_bfloat16_is_as_good_as_xla(shape, seed):
    """Inputs of the tokens in bfloat16, parameters and states in float32, as a model gives them."""
    arrays, reset = make_inputs(shape, seed)
    arrays = {key: jnp.asarray(x, jnp.bfloat16 if key in BY_TOKEN else jnp.float32) for key, x in arrays.items()}
    weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), cotangents(shape, seed))
    exact = oracle(arrays, reset, weights)
    ours, theirs = (run(name, arrays, reset, weights) for name in ("tpu", "sequential"))
    assert ours[0].dtype == jnp.bfloat16 and ours[1].dtype == np.float32
    for x, y, reference in zip(*(jax.tree.leaves(z) for z in (ours, theirs, exact)), strict=True):
        assert x.dtype == y.dtype
        assert error(x, reference) <= 2 * error(y, reference) + 1e-6  # both may be exact to float32


@pytest.mark.parametrize("implementation", FAST)
def test_reset_at_every_offset(implementation):
    """Row i of the batch starts a segment at token i: every offset modulo the tile and the group, the first token included."""
    shape = Shape(CHUNK + 1, CHUNK + 3, 3, 8)
    arrays, _ = make_inputs(shape, 3)
    reset = np.eye(shape.batch, shape.length, dtype=bool)
    weights = cotangents(shape, 3)
    ours, exact = run(implementation, arrays, reset, weights), oracle(arrays, reset, weights)
    for i in range(shape.batch):  # each row by its own scale
        assert error(ours[0][i], exact[0][i]) <= 1e-6, i
        for key in (*BY_TOKEN, "initial_state"):
            assert error(ours[2][key][i], exact[2][key][i]) <= 1e-5, (i, key)
    for key in ("A", "D", "dt_bias", "reset_state"):
        assert error(ours[2][key], exact[2][key]) <= 1e-5, key
    assert not np.any(ours[2]["initial_state"][0])  # row 0 is reset at its first token


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gradient_crosses_segments(implementation):
    shape = Shape(1, 70, 5, 4)
    arrays, _ = make_inputs(shape, 5)
    segments = np.repeat([0, 1, 2], [20, 29, 21])[None]
    reset = np.diff(segments, prepend=segments[:, :1]) != 0
    for own in range(3):
        weights = (np.ones((1, 70, 5), np.float32) * (segments == own)[..., None], np.zeros((1, 5, 4), np.float32))
        _, _, gradients = run(implementation, arrays, reset, weights)
        for key in ("u", "dt", "B", "C", "z"):
            per_token = np.abs(gradients[key][0]).max(axis=-1)
            assert np.all(per_token[segments[0] != own] == 0.0), (own, key)
            assert np.all(per_token[segments[0] == own] > 0.0), (own, key)
        assert np.any(gradients["initial_state"]) == (own == 0)
        assert np.any(gradients["reset_state"]) == (own != 0)


@pytest.mark.parametrize("implementation", ["sequential", "tpu"])
def test_segment_ids_mark_the_same_resets(implementation):
    arrays, _ = make_inputs(SHAPES[0], 6)
    segments = jnp.asarray(np.cumsum(np.random.default_rng(6).random((2, 140)) < 0.1, axis=1), jnp.int32)
    scan = jax.jit(lambda **kwargs: IMPLEMENTATIONS[implementation](**arrays, **kwargs))
    by_ids = scan(segment_ids=segments)
    by_reset = scan(reset=jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0)
    assert all(np.array_equal(a, b) for a, b in zip(by_ids, by_reset, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_documents_after_a_shared_prefix(implementation):
    """The prefix is run once and its state given to every document of a row, which equals prefix + document alone."""
    arrays, _ = make_inputs(Shape(1, 8 + 20 + 13, 5, 4), 7)
    weights = {key: arrays[key] for key in ("A", "D", "dt_bias")}
    scan = functools.partial(IMPLEMENTATIONS[implementation], **weights)
    tokens = lambda *spans: {key: jnp.concatenate([arrays[key][:, i:j] for i, j in spans], axis=1) for key in BY_TOKEN}  # noqa: E731
    _, state = scan(**tokens((0, 8)))
    packed, last = scan(
        **tokens((8, 41)), reset_state=state[0], segment_ids=jnp.repeat(jnp.array([[4, 9]]), jnp.array([20, 13]), axis=1)
    )
    for (i, j), rows in (((8, 28), packed[:, :20]), ((28, 41), packed[:, 20:])):
        alone, final = scan(**tokens((0, 8), (i, j)))
        assert error(rows, alone[:, 8:]) <= 1e-6
    assert error(last, final) <= 1e-6


@pytest.mark.parametrize("implementation", ["sequential", "tpu"])
def test_two_halves_equal_the_whole(implementation):
    arrays, reset = make_inputs(Shape(2, 71, 5, 4), 8)
    scan = IMPLEMENTATIONS[implementation]
    weights = cotangents(Shape(2, 71, 5, 4), 8)

    def whole(arrays):
        return scan(**arrays, reset=reset)

    def halves(arrays):
        state, outputs = arrays["initial_state"], []
        for part in (slice(0, 30), slice(30, 71)):
            tokens = {key: arrays[key][:, part] for key in BY_TOKEN}
            y, state = scan(**(arrays | tokens | {"initial_state": state}), reset=reset[:, part])
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1), state

    def with_gradients(f):
        outputs, pull = jax.vjp(f, arrays)
        return outputs, pull(weights)

    (y, state), (gradients,) = jax.jit(functools.partial(with_gradients, halves))()
    (exact_y, exact_state), (exact,) = jax.jit(functools.partial(with_gradients, whole))()
    assert error(y, exact_y) <= 1e-6 and error(state, exact_state) <= 1e-6
    for key, x in exact.items():
        assert error(gradients[key], x) <= 1e-5, key


def test_two_runs_are_bit_identical():
    arrays, reset = make_inputs(SHAPES[1], 9)
    first, second = (run("tpu", arrays, reset, cotangents(SHAPES[1], 9)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


@pytest.mark.parametrize("shape", [Shape(1, 40, 130, 4), Shape(2, 32, 5, 8, gated=False, resets=False)])
def test_interpreter_finds_no_race_and_no_uninitialised_read(shape):
    """Poisoned memory turns a read before a write into NaN; out-of-bounds reads raise; races are reported."""
    arrays, reset = make_inputs(shape, 10)
    weights = cotangents(shape, 10)
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    scan = functools.partial(selective_scan_tpu, chunk=32, columns=1, interpret=params)
    outputs, pull = jax.vjp(lambda arrays: scan(**arrays, reset=reset), arrays)
    exact = oracle(arrays, reset, weights)
    for ours, reference in zip(jax.tree.leaves((*outputs, pull(weights)[0])), jax.tree.leaves(exact), strict=True):
        assert error(ours, reference) <= 1e-5
    assert not races_found()


def test_xla_backward_holds_no_whole_state_sequence():
    length, channels, states = 2048, 32, 16
    arrays, _ = make_inputs(Shape(1, length, channels, states, resets=False), 11)
    loss = lambda arrays: selective_scan_xla(**arrays, chunk=64)[0].sum()  # noqa: E731
    memory = jax.jit(jax.grad(loss)).lower(arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length * channels * states * 4 / 2


def test_refusals_name_the_reason():
    arrays, reset = make_inputs(SHAPES[0], 12)
    with jax.enable_x64(True), pytest.raises(ValueError, match="float64"):
        selective_scan_tpu(**{key: jnp.asarray(x, jnp.float64) for key, x in arrays.items()})
    with pytest.raises(ValueError, match="multiple of 32"):
        selective_scan_tpu(**arrays, chunk=40)
    with pytest.raises(ValueError, match="float16"):
        causal_conv_tpu(arrays["u"].astype(jnp.float16), arrays["A"], arrays["D"])
    with pytest.raises(ValueError, match="not both"):
        selective_scan_xla(**arrays, reset=reset, segment_ids=reset.astype(jnp.int32))
