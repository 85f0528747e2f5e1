"""A mixer and a position scheme in a user's file: named in a config, trained, counted and decoded without other changes."""

import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metajax import registry
from metajax.config import Hybrid, Model
from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.inference.forward import prefill, prepare, step
from metajax.models.cache_bytes import cache_bytes
from metajax.models.flops import flops_per_token
from metajax.models.lm import named_params
from metajax.models.mixers import MIXERS
from metajax.models.rotary import SCHEMES
from metajax.models.specs import layer_specs
from metajax.training.program import build_model

OWN = Path(__file__).parents[1] / "own"
B, T, VOCAB = 2, 12, 32


@pytest.fixture
def config(own_registry, tmp_path, monkeypatch):
    (tmp_path / "own_parts").mkdir()
    for name in ("shift", "slow"):
        shutil.copy(OWN / f"{name}.py", tmp_path / "own_parts")
    monkeypatch.syspath_prepend(tmp_path)
    registry.load("own_parts")
    hybrid = Hybrid(ssm="shift", prefix_tokens=3)
    model = Model(3, 16, 2, mlp_width=24, bias=False, position="slow", hybrid=hybrid)
    yield override(registry.base("quickstart")("cpu"), {"meta_tokens": None, "model": model})
    del MIXERS._known["shift"], SCHEMES["slow"]
    for module in [module for module in sys.modules if module.partition(".")[0] == "own_parts"]:
        del sys.modules[module]


def test_own_parts_are_trained_counted_and_decoded(config):
    model = build_model(config, VOCAB, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)
    segments = jnp.array([[1] * 5 + [2] * 7, [1] * 12])
    positions = jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None], jnp.arange(T)[None]
    inputs = {"positions": jnp.concatenate(positions), "segment_ids": segments}
    optimizer = optax.sgd(0.1)

    @jax.jit
    def train(model, state):
        nll = lambda m: optax.softmax_cross_entropy_with_integer_labels(m(tokens, **inputs), jnp.roll(tokens, -1, 1)).mean()  # noqa: E731
        loss, gradient = jax.value_and_grad(nll)(model)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(model, updates), state, loss

    first, state, before = train(model, optimizer.init(model))
    second, _, after = train(first, state)
    assert after < before
    moved = [name for name, w in named_params(second).items() if not np.array_equal(w[...], named_params(model)[name][...])]
    assert "blocks.0.0.mixer.shift.w.w" in moved and "prefix" in moved

    parts = flops_per_token(config, VOCAB)
    assert parts["shift"] == pytest.approx(3 * 3 * 2 * 16**2 * (1 + 3 / (config.data.batch_size * config.row_positions)))
    assert cache_bytes(config.model, 10, rows=B)["state"] == B * 3 * 4 * 16

    alone = {"positions": jnp.broadcast_to(jnp.arange(T), (B, T)), "segment_ids": jnp.ones((B, T), jnp.int32)}
    whole = jax.jit(lambda m: m(tokens, **alone))(second)
    ready = prepare(second)
    logits, cache = prefill(ready, tokens[:, :8], jnp.array([3, 8]), jnp.full((B, 1), 8), capacity=T, meta_capacity=0)
    np.testing.assert_allclose(logits, whole[jnp.arange(B), jnp.array([2, 7])], atol=1e-5)
    present = jnp.array([True, True])
    logits, _ = step(ready, cache, tokens[jnp.arange(B), jnp.array([3, 8])], jnp.array([3, 8]), jnp.zeros((B, T), bool), present)
    np.testing.assert_allclose(logits, whole[jnp.arange(B), jnp.array([3, 8])], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "ropee"}, "expected one of learned, none, rope, linear, llama3, ntk, yarn; did you mean 'rope'"),
        ({"hybrid.ssm": "mambda2"}, "did you mean 'mamba2'"),
        ({"hybrid.ssm": "meta_attention"}, "name a mixer other than attention"),
        ({"hybrid.meta_tokens": 2}, "is hybrid.prefix_tokens now"),
        ({"heads": 128}, "needs an even head width"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(changes, message):
    with pytest.raises(UserError, match=message):
        layer_specs(override(Model(hybrid=Hybrid()), changes))
