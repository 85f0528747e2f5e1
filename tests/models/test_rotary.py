"""Rotary tables compared with numbers from the YaRN and Hymba authors' code, and the constants that their papers imply."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.config import Model, hymba_ntk_factor
from metajax.models import rotary

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "rope_a.npz")
POSITIONS = GOLDEN["positions"]


def field(group, name):
    return GOLDEN[f"{group}/{name}"][()]


def frequencies(scheme, dim, base, factor=1.0):
    scaled = {"rope_factor": float(factor), "rope_original_length": 2048} if scheme == "ntk" else {}
    return rotary.SCHEMES[scheme](Model(position=scheme, width=int(dim), heads=1, rope_theta=float(base), **scaled))[0]


def assert_frequencies(ours, group, name="inv_freq"):
    np.testing.assert_allclose(ours, field(group, name), rtol=1e-6, atol=0)


def assert_tables(frequencies, group, magnitude=1.0):
    cos, sin = rotary.rotary_angles(frequencies, jnp.asarray(POSITIONS)[None], magnitude)
    gate = (1e-6 + 2e-7 * POSITIONS)[:, None]
    for ours, name in ((cos, "cos"), (sin, "sin")):
        assert np.all(np.abs(np.tile(ours[0], 2) - field(group, name)) <= gate), name


@pytest.mark.parametrize("group", [f"yarn{i}" for i in range(8)])
def test_yarn(group):
    dim, base, length, factor = (field(group, n) for n in ("dim", "base", "original_length", "scale"))
    betas = float(field(group, "beta_fast")), float(field(group, "beta_slow"))
    assert rotary.yarn_range(int(dim), float(base), int(length), *betas) == tuple(field(group, "low_high"))
    magnitude = rotary.yarn_magnitude(float(factor), float(field(group, "attn_factor")))
    assert abs(magnitude - field(group, "mscale")) < 1e-6
    ours = rotary.yarn_frequencies(
        int(dim),
        float(base),
        int(length),
        float(factor),
        extrapolation=float(field(group, "extrapolation_factor")),
        beta_fast=betas[0],
        beta_slow=betas[1],
    )
    assert_frequencies(ours, group)
    assert_tables(ours, group, magnitude)


@pytest.mark.parametrize("group", [f"ntk{i}" for i in range(4)])
def test_ntk(group):
    ours = frequencies("ntk", field(group, "dim"), field(group, "base"), field(group, "alpha"))
    assert_frequencies(ours, group)


@pytest.mark.parametrize("group", ["linear0", "linear1"])
def test_unscaled(group):
    ours = frequencies("rope", field(group, "dim"), field(group, "base"))
    assert_frequencies(ours, group, "inv_freq_unscaled")


@pytest.mark.parametrize("group", [f"hymba{i}" for i in range(4)])
def test_hymba(group):
    dim, base = field(group, "dim"), field(group, "base")
    if str(field(group, "rope_type")) == "ntk":
        factor = hymba_ntk_factor(int(field(group, "max_position_embeddings")), int(field(group, "orig_max_position_embeddings")))
        ours = frequencies("ntk", dim, base, factor)
    else:
        ours = frequencies("rope", dim, base)
    assert_frequencies(ours, group)
    assert_tables(ours, group)
    cos, sin = rotary.rotary_angles(ours, jnp.asarray(POSITIONS)[None])
    rotated = rotary.apply_rotary(jnp.moveaxis(jnp.asarray(field(group, "q_in")), 1, 2), cos, sin)
    gate = (1e-6 + 2e-7 * POSITIONS)[:, None] * 2 * np.abs(field(group, "q_in")).max()
    assert np.all(np.abs(np.moveaxis(rotated, 2, 1) - field(group, "q_rotated")) <= gate)


def test_yarn_constants_of_the_meta_token_paper():
    assert rotary.yarn_range(64, 10_000.0, 1024) == (5, 18)
    assert rotary.yarn_magnitude(4.0) == pytest.approx(1.13863, abs=5e-6)
    assert rotary.yarn_magnitude(8.0) == pytest.approx(1.20794, abs=5e-6)


def test_table_reads_the_configuration():
    positions = jnp.array([[-1, 0, 3, 900]])
    shape = dict(width=64, heads=1, rope_theta=10_000.0)
    yarn = Model(position="yarn", rope_factor=4.0, rope_original_length=1024, **shape)
    cos, _ = rotary.rotary_table(yarn, positions)
    np.testing.assert_allclose(cos[0, :2], 1.13863, atol=5e-6)
    ntk = Model(position="ntk", rope_factor=7.0, rope_original_length=2048, **shape)
    cos, _ = rotary.rotary_table(ntk, positions)
    np.testing.assert_allclose(cos[0, 3, 1], np.cos(900 * 74534.83 ** (-2 / 64)), atol=3e-4)
    cos, sin = rotary.rotary_table(Model(position="rope", **shape), positions)
    np.testing.assert_allclose(sin[0, 2, 0], np.sin(3), atol=1e-6)
    assert rotary.rotary_table(Model(position="learned", **{**shape, "rope_theta": Model.rope_theta}), positions) is None


def test_rotation_depends_only_on_the_distance():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(i, j):
        table = rotary.rotary_angles(frequencies("rope", 16, 100.0), jnp.array([[i, j]]))
        rotated = rotary.apply_rotary(jnp.concatenate([q, k], axis=1), *table)
        return jnp.vdot(rotated[0, 0, 0], rotated[0, 1, 0])

    np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
