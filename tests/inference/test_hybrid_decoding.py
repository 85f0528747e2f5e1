"""Hybrid models with a cache: compared with the full forward pass and the authors' generation, with their window and ours."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.config import Hybrid, Model, Runtime
from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.inference.forward import prefill, prepare, step
from metajax.interop.hymba import LAYOUT, model_config
from metajax.interop.layouts import load_model
from metajax.models.cache_bytes import cache_bytes
from metajax.models.lm import LM

GOLDENS = Path(__file__).parents[1] / "goldens"
IMPLEMENTATIONS = {"hymba_a": "auto", "hymba_b": "reference"}
N, PROMPT, VOCAB = 20, 9, 24
LENGTH = np.array([1, 5, 9], np.int32)
HYBRID = Hybrid(prefix_tokens=6, full_layers=(3,), kv_groups=(3, 1, 2), state=4)
SIZES = {"width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 24, "activation": "swiglu", "norm": "rmsnorm"}
CFG = Model(window=3, init_std=0.15, layers=6, hybrid=HYBRID, **SIZES)
FORMS = {
    "triple_and_pair": {},
    "sequential": {"layers": 2, "hybrid.fusion": "sequential", "hybrid.kv_groups": (), "hybrid.full_layers": ()},
    "attention": {"layers": 3, "hybrid.fusion": "attention", "hybrid.kv_groups": (1, 2), "hybrid.full_layers": (0,), "window": 0},
    "mamba2": {"layers": 2, "hybrid.ssm": "mamba2", "hybrid.expand": 8, "hybrid.kv_groups": (), "hybrid.full_layers": ()},
    "width 3": {"layers": 2, "hybrid.d_conv": 3, "hybrid.kv_groups": (), "hybrid.full_layers": ()},
    "mamba": {"layers": 2, "hybrid.fusion": "mamba", "hybrid.kv_groups": (), "hybrid.full_layers": (), "hybrid.prefix_tokens": 0},
}
once = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # programs that run once


def make(form):
    """A model with all parameters at random; programs of the reference compile fastest."""
    options = {"vocab_size": VOCAB, "max_length": N, "meta": None, "runtime": Runtime(unroll=1, implementation="reference")}
    shapes = jax.eval_shape(lambda: LM(override(CFG, FORMS[form]), key=jax.random.key(0), **options))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype), shapes)


def decode(ready, tokens, length, draw, steps):
    """(logits [B, 1 + steps, V], cache after the prompts, cache in the end); draw(position, logits) gives each row's next token, if any."""
    rows, width = tokens.shape
    unused = jnp.full((rows, 1), width)
    logits, cache = prefill(ready, tokens, length, unused, capacity=N + width, meta_capacity=0)

    def body(carry, _):
        logits, cache, at = carry
        token, present = draw(at, logits)
        after, cache = step(ready, cache, token, at, jnp.zeros((rows, N + width), bool), present)
        return (after, cache, at + 1), after

    (_, last, _), rest = jax.lax.scan(body, (logits, cache, length), length=steps)
    return jnp.concatenate([logits[:, None], jnp.moveaxis(rest, 0, 1)], axis=1), cache, last


@pytest.mark.parametrize("form", FORMS)
def test_cached_decoding_equals_the_full_forward_pass(form):
    """Rows of different lengths, until each has 20 tokens, well beyond the windows."""
    model = make(form)
    tokens = jax.random.randint(jax.random.key(1), (len(LENGTH), N), 0, VOCAB)

    @once
    def both(model):
        positions = jnp.broadcast_to(jnp.arange(N), tokens.shape)
        whole = model(tokens, positions=positions, segment_ids=jnp.ones_like(tokens))
        draw = lambda at, _: (jnp.take_along_axis(tokens, jnp.minimum(at, N - 1)[:, None], axis=1)[:, 0], at < N)  # noqa: E731
        return whole, decode(prepare(model), tokens[:, :PROMPT], jnp.asarray(LENGTH), draw, N - 1)[0]

    whole, cached = map(np.asarray, both(model))
    for row, length in enumerate(LENGTH):
        new = N - length
        expected = whole[row, length - 1 :]
        np.testing.assert_allclose(cached[row, : 1 + new], expected, atol=1e-5 * np.abs(whole).max())


def test_on_a_tpu_the_prompt_goes_through_the_kernels_and_single_tokens_do_not():
    def make():
        cfg = override(CFG, {"layers": 2, "hybrid.full_layers": (), "hybrid.kv_groups": (2,)})
        return prepare(LM(cfg, vocab_size=VOCAB, max_length=N, meta=None, runtime=Runtime(unroll=1), key=jax.random.key(0)))

    def read(ready):
        unused, length = jnp.full((1, 1), 512), jnp.array([512])
        return prefill(ready, jnp.zeros((1, 512), int), length, unused, capacity=1024, meta_capacity=0)

    def more(ready, cache):
        return step(ready, cache, jnp.zeros(1, int), jnp.array([512]), jnp.zeros((1, 1024), bool), jnp.ones(1, bool))

    ready = jax.eval_shape(make)
    texts = [
        jax.jit(program).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
        for program, arguments in ((read, (ready,)), (more, (ready, jax.eval_shape(read, ready)[1])))
    ]
    for kernel in ("prefix_window_attention_forward", "selective_scan_forward", "causal_conv_forward"):
        assert kernel in texts[0], kernel
    assert "tpu_custom_call" not in texts[1]


# ------------------------------------------------------------------------------------------------- the authors' generation


@functools.cache
def golden(name):
    z = np.load(GOLDENS / f"{name}.npz")
    state = {k.removeprefix("sd/"): v for k, v in z.items() if k.startswith("sd/")}
    return z, load_model(
        state,
        model_config(json.loads(str(z["config_json"]))),
        LAYOUT,
        runtime=Runtime(unroll=1, implementation=IMPLEMENTATIONS[name]),
    )


@functools.cache
def greedy(name, window):
    """Both runs of a file as two rows of one batch: (drawn ids, logits, cache of the meta tokens, cache after the prompts, final cache)."""
    z, model = golden(name)
    prompts = [z[f"dec{i}_prompt_ids"][0] for i in range(2)]
    length = np.array([len(prompt) for prompt in prompts])
    counts = np.array([z[f"dec{i}_cached_ids"].shape[1] for i in range(2)]) - length
    tokens = np.stack([np.pad(prompt, (0, length.max() - len(prompt))) for prompt in prompts])

    @once
    def run(model):
        ready = prepare(model, window)
        draw = lambda at, logits: (jnp.argmax(logits, -1), at < length + counts - 1)  # noqa: E731
        return decode(ready, tokens, jnp.asarray(length), draw, int(counts.max()) - 1), ready.prefix

    (logits, *caches), prefix = jax.tree.map(np.asarray, run(model))
    ids = [[*prompts[i], *logits[i, : counts[i]].argmax(-1)] for i in range(2)]
    return ids, [logits[i, : counts[i]] for i in range(2)], prefix, *caches


def of_all(runs, read):
    """read(layer) of all layers that have it, in order, [L, ...]."""
    found = []
    for groups in runs:
        layers = [read(layer) for layer in groups]
        if any(layer is not None for layer in layers):
            stacked = np.stack([layer for layer in layers if layer is not None], axis=1)
            found.append(stacked.reshape(-1, *stacked.shape[2:]))
    return np.concatenate(found)


def far(found, expected):
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("name", ["hymba_a", "hymba_b"])
def test_greedy_ids_and_logits_with_the_window_of_the_released_cache(name):
    z, (ids, logits, *_) = golden(name)[0], greedy(name, "W")
    for i in range(2):
        assert ids[i] == z[f"dec{i}_cached_ids"][0].tolist()
        assert far(logits[i], z[f"dec{i}_cached_logits"][0]) < 3e-4


@pytest.mark.parametrize("name", ["hymba_a", "hymba_b"])
def test_greedy_ids_with_the_window_of_training(name):
    """They equal the authors' full recomputation, which differs from their cached generation."""
    z, ids = golden(name)[0], greedy(name, "W+1")[0]
    for i in range(2):
        assert ids[i] == z[f"dec{i}_uncached_ids"][0].tolist()
        assert ids[i] != z[f"dec{i}_cached_ids"][0].tolist()


@pytest.mark.parametrize("name", ["hymba_a", "hymba_b"])
def test_caches_equal_those_of_the_authors(name):
    """Caches of the meta tokens, then those after the longer prompt (the second row), then the final states."""
    z, (*_, prefix, cache, last) = golden(name)[0], greedy(name, "W")
    for place, (keys, tails) in enumerate((("meta_k", "meta_conv_states"), ("meta_v", "meta_ssm_states"))):
        kept = of_all(prefix, lambda left: left["attention"][place] if "attention" in left else None)  # noqa: B023
        assert far(np.moveaxis(kept, 2, 3), z[keys]) < 5e-5
        found = of_all(prefix, lambda left: left["mamba"][place])  # noqa: B023
        assert far(found if place else np.moveaxis(found, 2, 3), z[tails][..., 0 if place else 1 :]) < 5e-5
    for when, state, tail in ((cache, "prefill_ssm_states", "prefill_conv_states"), (last, "final_ssm_states", None)):
        assert far(of_all(when, lambda kinds: kinds["mamba"][1][:, 1:]), z[state]) < 5e-5
        if tail:  # of four columns the oldest is not used
            found = of_all(when, lambda kinds: kinds["mamba"][0][:, 1:])
            assert far(np.moveaxis(found, 2, 3), z[tail][..., 1:]) < 5e-5
    metas = z["meta_k"].shape[3]
    for layer in (0, 1):  # layer 0 attends to all, layer 1 in a window
        kept = cache[layer][0]["attention"]
        positions, newest = kept.k.shape[2], int(kept.length[1]) - 1
        token = newest - (newest - np.arange(positions)) % positions
        assert np.sum(token >= 0) == min(positions, newest + 1) and (positions > newest) == (layer == 0)
        for ours, theirs in ((kept.k, z[f"prefill_k_{layer}"]), (kept.v, z[f"prefill_v_{layer}"])):
            there = np.moveaxis(theirs[0], 0, 1)[metas:][token[token >= 0]]
            assert far(ours[0, 1, token >= 0], there) < 2e-5


def test_bytes_of_the_caches():
    """Bytes of the arrays on the device, by part, compared with the formula."""
    model, (*_, prefix, cache, _) = golden("hymba_a")[1], greedy("hymba_a", "W+1")
    layers = [kinds for groups in cache for kinds in groups]
    owners = [kinds["attention"] for kinds in layers if "attention" in kinds]
    capacity = max(kept.k.shape[2] for kept in owners)
    held = {
        "full": sum(kept.k.nbytes + kept.v.nbytes for kept in owners if kept.k.shape[2] == capacity),
        "window": sum(kept.k.nbytes + kept.v.nbytes for kept in owners if kept.k.shape[2] < capacity),
        "meta": sum(array.nbytes for array in jax.tree.leaves(prefix) if array.dtype != bool),
        "state": sum(kinds["mamba"][1].nbytes for kinds in layers),
        "conv": sum(kinds["mamba"][0].nbytes for kinds in layers),
    }
    assert min(held.values()) > 0
    assert held == cache_bytes(model.cfg, capacity, rows=2)


def test_an_unknown_window_is_refused():
    with pytest.raises(UserError, match=r"W\+1 or W"):
        prepare(golden("hymba_b")[1], "W-1")
