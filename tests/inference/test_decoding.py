"""Cached decoding compared with the full forward pass, the ring buffer, and sampling of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metajax.config import MetaTokens, Model, Runtime
from metajax.core.errors import UserError
from metajax.inference.decoding import Rules, Sampling, advance, start
from metajax.inference.forward import Ring, prefill, prepare, step
from metajax.models.lm import LM
from metajax.models.mixers import KeyValues

B, N, PROMPT, VOCAB = 3, 16, 8, 24
SCHEMES = {
    "learned": {"position": "learned"},
    "rope": {"position": "rope"},
    "yarn": {"position": "yarn", "rope_factor": 4.0, "rope_original_length": 8},
    "none": {"position": "none"},
}
META = MetaTokens()


@functools.cache
def build(meta, window=None, scheme="rope"):
    cfg = Model(layers=2, width=16, heads=4, kv_heads=2, mlp_width=24, bias=True, init_std=0.3, window=window, **SCHEMES[scheme])
    return LM(cfg, vocab_size=VOCAB, max_length=N, meta=meta, runtime=Runtime(unroll=1), key=jax.random.key(5))


def meta_positions_of(is_meta, length, width):
    """int32 [B, N]: the meta-tokens among the first `length` of each row, then `width`."""
    out = np.full((B, N), width, np.int32)
    for row, flags, n in zip(out, is_meta, length, strict=True):
        found = np.flatnonzero(flags[:n])
        row[: len(found)] = found
    return jnp.asarray(out)


@jax.jit
def full(model, tokens, is_meta):
    """Logits of whole rows, [B, N, V]."""
    meta_positions = jnp.sort(jnp.where(is_meta, jnp.arange(N), N), axis=1)
    positions = jnp.broadcast_to(jnp.arange(N), (B, N))
    return model(tokens, positions=positions, segment_ids=jnp.ones((B, N), jnp.int32), meta_positions=meta_positions)


@jax.jit
def cached(ready, tokens, is_meta, length, meta_positions):
    """[N - 1, B, V]: logits after the prompts, then after each further token, until the shortest row is full; and where each row was."""
    metas = ready.model.meta is not None
    logits, cache = prefill(ready, tokens[:, :PROMPT], length, meta_positions, capacity=N, meta_capacity=N if metas else 0)

    def body(carry, _):
        cache, at = carry
        token = jnp.take_along_axis(tokens, at[:, None], axis=1)[:, 0]
        logits, cache = step(ready, cache, token, at, is_meta, at < N - 1)
        return (cache, jnp.minimum(at + 1, N - 1)), (logits, at)

    _, (rest, at) = jax.lax.scan(body, (cache, length), length=N - 1)
    return jnp.concatenate([logits[None], rest]), jnp.concatenate([length[None] - 1, at])


CASES = [
    (None, None, "learned"),
    (None, 0, "none"),
    (META, 4, "learned"),
    (META, 9, "yarn"),
    (MetaTokens(attention="dense", zero_position="meta"), 1, "rope"),
    (MetaTokens(attention="none", embedding="zero", zero_position="causal"), None, "rope"),
    (MetaTokens(attention="causal", embedding="frozen", zero_position="both"), 3, "learned"),
    (MetaTokens(attention="dense_uniform", zero_position="both"), 5, "yarn"),
]


@pytest.mark.parametrize(("meta", "window", "scheme"), CASES)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_cached_decoding_equals_the_full_forward_pass(meta, window, scheme, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    length = np.array([data.draw(st.integers(1, PROMPT)) for _ in range(B)])
    is_meta = rng.random((B, N)) < data.draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    is_meta[:, 0] = False
    tokens = np.where(is_meta, VOCAB - 1, rng.integers(VOCAB - 1, size=(B, N)))
    model = build(meta, window, scheme)
    expected = np.asarray(full(model, tokens, is_meta))
    logits, at = cached(prepare(model), tokens, is_meta, length, meta_positions_of(is_meta, length, PROMPT)[:, :PROMPT])
    for ours, where in zip(np.asarray(logits), np.asarray(at), strict=True):
        theirs = expected[np.arange(B), where]
        new = where < N - 1  # a full row reads its last token again and again
        np.testing.assert_allclose(ours[new], theirs[new], atol=1e-5 * np.abs(expected).max())
        assert np.array_equal(ours[new].argmax(-1), theirs[new].argmax(-1))


def rules(sampling=None, banned=(), eos=-1, ask_real=False, seed=0):
    flags = np.isin(np.arange(VOCAB), banned)
    return Rules(
        jnp.asarray(flags), jnp.asarray(eos), jax.random.key(seed), None, sampling or Sampling(temperature=0.0), ask_real
    )


def begin(model, tokens, is_meta, length, count, how):
    meta_positions = meta_positions_of(is_meta, length, PROMPT)[:, :PROMPT]
    prompt = np.maximum(tokens[:, :PROMPT], 0)
    return start(prepare(model), tokens, is_meta, prompt, length, meta_positions, count, how, capacity=N, meta_capacity=N)


@pytest.mark.parametrize("ask_real", [False, True])
def test_rows_of_different_lengths_equal_the_full_forward_pass(ask_real):
    """Greedy rows, each predicted from the previous (ordinary) position until its count or its end token."""
    model = build(META)
    rng = np.random.default_rng(3)
    is_meta = rng.random((B, N)) < 0.35
    length, count = np.array([2, 5, 7], np.int32), 4
    is_meta[:, 0] = False
    is_meta[np.arange(B), length - 1] = False
    expected = np.where(is_meta, VOCAB - 1, rng.integers(VOCAB - 1, size=(B, N))).astype(np.int32)
    started = np.where(is_meta | (np.arange(N) < length[:, None]), expected, -1)
    drawn = []
    for row in range(B):
        asked, new = length[row] - 1, []
        for position in range(length[row], N):
            if not is_meta[row, position] and len(new) < count:
                logits = np.array(full(model, expected, is_meta))[row, asked]
                logits[-2:] = -np.inf
                expected[row, position] = logits.argmax()
                new.append(int(logits.argmax()))
            if not (is_meta[row, position] and ask_real):
                asked = position
        drawn.append(new)
    how = rules(banned=(VOCAB - 2, VOCAB - 1), ask_real=ask_real)
    state = begin(model, started, is_meta, length, count, how)
    for _ in range(N):  # in strides of 1 and 3 meta_positions
        state = advance(prepare(model), state, how, 1)
        state = advance(prepare(model), state, how, 3)
    found = [row[n:][~flags[n:] & (row[n:] >= 0)].tolist() for row, n, flags in zip(state.tokens, length, is_meta, strict=True)]
    assert found == drawn
    assert not state.left.any()
    eos = drawn[1][1]
    how = rules(banned=(VOCAB - 2, VOCAB - 1), ask_real=ask_real, eos=eos)
    state = advance(prepare(model), begin(model, started, is_meta, length, count, how), how, N)
    for row, n, flags, whole in zip(state.tokens, length, is_meta, drawn, strict=True):
        new = row[n:][~flags[n:] & (row[n:] >= 0)].tolist()
        assert new == (whole[: whole.index(eos) + 1] if eos in whole else whole)


@given(st.integers(1, 6), st.lists(st.integers(1, 7), min_size=2, max_size=2), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_the_ring_buffer_keeps_the_newest_keys(capacity, lengths, more):
    """Token t is its own key; an absent row keeps its cache."""
    length = np.array(lengths)
    tokens = jnp.broadcast_to(jnp.arange(1.0, 20.0)[None, None, :, None, None], (2, 2, 19, 1, 1))
    real = jnp.broadcast_to(jnp.arange(7) < length[:, None], (2, 2, 7))
    kept = Ring.create(KeyValues(tokens[:, :, :7], -tokens[:, :, :7], real), capacity)
    for _ in range(more):
        new = jnp.broadcast_to((kept.length + 1.0)[None, :, None, None, None], (2, 2, 1, 1, 1))
        kept = kept.append(KeyValues(new, -new, jnp.broadcast_to(jnp.array([[True], [False]]), (2, 2, 1))))
    k, v, visible = kept.past()
    assert np.array_equal(v, -k)
    for row, n in enumerate([length[0] + more, length[1]]):
        for layer in range(2):
            seen = sorted(np.asarray(k)[layer, row, np.asarray(visible)[layer, row], 0, 0])
            assert seen == list(range(max(1, n - capacity + 1), n + 1))


def test_ordinary_tokens_skip_meta_attention():
    """Its weights may be NaN, because no meta-token is read."""
    model = jax.tree.map(lambda x: x, build(META))
    query = model.blocks[0][0].meta_attention.query.w
    query[...] = jnp.full_like(query[...], jnp.nan)
    ring = Ring(jnp.ones((2, B, N, 2, 4)), jnp.ones((2, B, N, 2, 4)), jnp.full(B, 3))
    cache = (({"attention": ring, "meta_attention": ring},),)
    run = jax.jit(lambda is_meta: step(prepare(model), cache, jnp.arange(B), jnp.full(B, 3), is_meta, jnp.ones(B, bool)))
    logits, after = run(jnp.zeros((B, N), bool))
    assert np.isfinite(logits).all()
    assert after[0][0]["attention"].length.tolist() == [4] * B
    assert after[0][0]["meta_attention"].length.tolist() == [3] * B
    assert np.isnan(run(jnp.zeros((B, N), bool).at[0, 3].set(True))[0][0]).all()


def test_sampling_keeps_the_shares_it_should():
    chances = np.array([0.05, 0.4, 0.0, 0.3, 0.25])
    expected = {
        Sampling(1.0): chances,
        Sampling(1.0, top_k=2): [0, 4 / 7, 0, 3 / 7, 0],
        Sampling(1.0, top_k=99): chances,
        Sampling(1.0, top_p=0.71): [0, 0.4 / 0.95, 0, 0.3 / 0.95, 0.25 / 0.95],
        Sampling(1.0, top_p=0.69): [0, 4 / 7, 0, 3 / 7, 0],
        Sampling(1.0, top_k=3, top_p=0.72): [0, 4 / 7, 0, 3 / 7, 0],
        Sampling(0.5): chances**2 / 0.315,
        Sampling(0.0): [0, 1, 0, 0, 0],
    }

    @jax.jit
    def draw(keys):
        return [jax.vmap(functools.partial(sampling.draw, jnp.log(chances)))(keys) for sampling in expected]

    drawn = draw(jax.random.split(jax.random.key(0), 4000))
    for ours, (sampling, shares) in zip(drawn, expected.items(), strict=True):
        found = np.bincount(ours, minlength=5) / len(ours)
        np.testing.assert_allclose(found, shares, atol=0.03, err_msg=str(sampling))
        assert not found[np.equal(shares, 0)].any(), sampling


@pytest.mark.parametrize(
    ("fields", "message"), [({"temperature": -1}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 0}, "top_p")]
)
def test_impossible_sampling_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Sampling(**fields)
