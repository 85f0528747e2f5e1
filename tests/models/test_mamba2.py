"""Mamba-2 compared with its recurrence, token by token, and isolation of documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.models.mixers.base import LayerSpec
from metajax.models.mixers.mamba2 import CHUNK, Mamba2, chunked_scan
from metajax.models.presets import hymba_300m

B, H, P, N = 2, 3, 4, 5


def operands(length, starts, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"x": (B, length, H, P), "b": (B, length, N), "c": (B, length, N), "initial": (B, H, P, N), "reset": (H, P, N)}
    made = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    made["dt"], made["A"] = np.exp(rng.normal(size=(B, length, H)) - 1), -np.exp(rng.normal(size=H))
    made["segments"] = np.zeros((B, length), np.int32)
    for row, at in starts:
        made["segments"][row, at:] += 1
    return made


def recurrence(m):
    """float64, one token at a time."""
    h, out = m["initial"].copy(), []
    for t in range(m["x"].shape[1]):
        for row in range(B):
            if t and m["segments"][row, t] != m["segments"][row, t - 1]:
                h[row] = m["reset"]
        decay = np.exp(m["dt"][:, t] * m["A"])[..., None, None]
        h = decay * h + np.einsum("bh,bhp,bn->bhpn", m["dt"][:, t], m["x"][:, t], m["b"][:, t])
        out.append(np.einsum("bhpn,bn->bhp", h, m["c"][:, t]))
    return np.stack(out, 1), h


scan = jax.jit(lambda m: chunked_scan(m["x"], m["dt"], m["A"], m["b"], m["c"], m["segments"], m["initial"], m["reset"]))


@pytest.mark.parametrize(
    ("length", "starts"),
    [
        (1, []),
        (CHUNK, [(0, 1), (0, 2), (1, CHUNK - 1)]),
        (2 * CHUNK + 7, [(0, CHUNK), (1, CHUNK - 1), (1, CHUNK + 1), (0, 2 * CHUNK + 3), (1, 2 * CHUNK + 6)]),
        (3 * CHUNK, [(0, 5)]),
    ],
)
def test_chunks_equal_the_recurrence(length, starts):
    made = operands(length, starts)
    y, last = scan(jax.tree.map(jnp.asarray, made))
    expected, state = recurrence(made)
    np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(last, state, atol=2e-5 * np.abs(state).max())


def test_no_document_reaches_another():
    made = jax.tree.map(jnp.asarray, operands(CHUNK + 20, [(0, 30), (1, CHUNK + 2)]))
    inside = {name: made.pop(name) for name in ("x", "dt", "b", "c")}

    def of_second(inside):
        y, _ = scan(made | inside)
        return jnp.sum(jnp.where((made["segments"] == 1)[..., None, None], jnp.sin(y), 0.0))

    for name, gradient in jax.jit(jax.grad(of_second))(inside).items():
        gradient = np.asarray(gradient)
        assert not gradient[np.asarray(made["segments"]) == 0].any(), name
        assert gradient[np.asarray(made["segments"]) == 1].all(), name


def test_two_calls_joined_by_the_state_are_one():
    made = jax.tree.map(jnp.asarray, operands(CHUNK + 9, [(0, CHUNK)]))
    whole, last = scan(made)
    parts = lambda cut: {n: v[:, cut] if n in ("x", "dt", "b", "c", "segments") else v for n, v in made.items()}  # noqa: E731
    first, state = scan(parts(slice(None, 41)))
    second, joined = scan(parts(slice(41, None)) | {"initial": state})
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-5 * float(jnp.abs(whole).max()))
    np.testing.assert_allclose(joined, last, atol=1e-5 * float(jnp.abs(last).max()))


def test_heads_must_fit():
    cfg = override(hymba_300m(), {"hybrid.ssm": "mamba2", "width": 1008, "position": "none"})
    with pytest.raises(UserError, match=r"2016 channels"):
        Mamba2(cfg, LayerSpec(), "auto", jax.random.key(0))
