"""The language model: counts, causality, isolation of documents, meta-attention and its dense form, scan variants, captures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metajax.config import MetaTokens, Model, Runtime
from metajax.core.errors import UserError
from metajax.models.layers import Norm
from metajax.models.lm import LM, decay_mask, named_params, param_count
from metajax.models.presets import gpt2_small, llama

B, T, VOCAB = 2, 20, 32
CFG = Model(layers=2, width=16, heads=4, kv_heads=2, mlp_width=24, position="rope", bias=True, init_std=0.2)
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
SEGMENTS = jnp.array([[1] * 9 + [2] * 11, [1] * 6 + [2] * 8 + [0] * 6])
META_POSITIONS = jnp.array([[2, 5, 8, 12, 17], [1, 4, 7, T, T + 1]])  # every segment has some; two are unused
TOKENS = jax.random.randint(jax.random.key(7), (B, T), 0, VOCAB)
META = MetaTokens()
RUNTIME = Runtime()


@functools.cache
def build(cfg=CFG, meta=META, runtime=RUNTIME, seed=0):
    """A model with all parameters away from their special initial values."""

    @jax.jit
    def make(key):
        model = LM(cfg, vocab_size=VOCAB, max_length=T, meta=meta, runtime=runtime, key=key)
        return jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape), model)

    return make(jax.random.key(seed))


@functools.partial(jax.jit, static_argnames="capture")
def run(model, tokens=TOKENS, positions=POSITIONS, segment_ids=SEGMENTS, meta_positions=META_POSITIONS, capture=()):
    return model(tokens, positions=positions, segment_ids=segment_ids, meta_positions=meta_positions, capture=capture)


@jax.jit
def loss_and_gradient(model):
    return jax.value_and_grad(lambda m: jnp.sum(jnp.sin(run(m))))(model)


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol * max(1.0, float(np.abs(y).max()))), a, b)


def abstract(cfg, meta=None, vocab=50304):
    return jax.eval_shape(lambda: LM(cfg, vocab_size=vocab, max_length=1024, meta=meta, runtime=Runtime(), key=jax.random.key(0)))


@pytest.mark.parametrize(
    ("position", "meta", "total", "millions"),
    [
        ("learned", None, 124_373_760, 124.37),
        ("rope", None, 123_587_328, 123.59),
        ("learned", META, 152_694_528, 152.69),
        ("rope", META, 151_908_096, 151.90),
    ],
)
def test_parameter_counts_of_the_meta_token_paper(position, meta, total, millions):
    """arXiv 2509.16278 compares 124M with 152M; the norm before meta-attention (9,216) is our choice."""
    parts = param_count(abstract(gpt2_small(position=position), meta))
    assert parts["total"] == total == sum(n for part, n in parts.items() if part != "total")
    assert abs((total - parts.get("meta_norm", 0)) / 1e6 - millions) < 0.005
    assert parts.get("meta_attention", 0) == (28_311_552 if meta else 0)


def test_parameter_count_with_biases_is_the_published_one():
    assert param_count(abstract(gpt2_small(bias=True), vocab=50257))["total"] == 124_439_808


def test_llama_7b_count():
    assert param_count(abstract(llama(32, 32, 4096), vocab=32000))["total"] == 6_738_415_616


def test_axes_name_every_dimension_and_decide_decay():
    model = build()
    mask = decay_mask(model)
    for name, param in named_params(model).items():
        axes = param.get_metadata()["axes"]
        stacked = name.startswith("blocks.")
        assert len(axes) + stacked == param.ndim, name
        assert named_params(mask)[name].get_raw_value() == (axes != ("norm",)) == (param.ndim - stacked == 2), name
    decay = optax.add_decayed_weights(1.0, mask=decay_mask)
    zero = jax.tree.map(lambda w: np.zeros(w.shape, np.float32), model)
    updates, _ = jax.jit(decay.update)(zero, decay.init(model), model)
    for name, update in named_params(updates).items():
        assert bool(np.any(np.asarray(update[...]))) == named_params(mask)[name].get_raw_value(), name


def test_initial_values():
    model = LM(
        dataclasses.replace(CFG, width=64), vocab_size=256, max_length=T, meta=META, runtime=Runtime(), key=jax.random.key(0)
    )
    for name, param in named_params(model).items():
        if name.endswith((".b", ".bias")):
            assert not np.any(param[...])
        elif name.endswith(".scale"):
            assert np.all(param[...] == 1)
        else:
            residual = ".output." in name or ".down." in name
            assert float(jnp.std(param[...])) == pytest.approx(0.2 / 2 if residual else 0.2, rel=0.1), name
    first, second = named_params(model)["blocks.0.0.mlp.up.w"][...]
    assert not np.allclose(first, second)


@given(st.integers(0, T - 1), st.sampled_from([("gathered", None), ("dense", 3), ("dense_uniform", None), ("causal", 3)]))
@settings(max_examples=12, deadline=None)
def test_causality(t, case):
    form, window = case
    model = build(dataclasses.replace(CFG, window=window), MetaTokens(attention=form))
    before, after = run(model), run(model, TOKENS.at[:, t].add(1) % VOCAB)
    assert np.array_equal(before[:, :t], after[:, :t])
    assert not np.array_equal(before[:, t], after[:, t])


@pytest.mark.parametrize(
    ("form", "implementation"),
    [
        ("none", "xla"),
        ("gathered", "reference"),
        ("gathered", "xla"),
        ("dense", "xla"),
        ("dense_causal", "xla"),
        ("causal", "xla"),
    ],
)
def test_input_gradients_across_documents_are_exactly_zero(form, implementation):
    model = build(meta=MetaTokens(attention=form), runtime=Runtime(implementation=implementation))

    @jax.jit
    def reach(model):
        """[B, T, T]: absolute gradient of the output at one position with respect to the embedding at another."""
        x = model.embed(TOKENS, POSITIONS)

        def row_sums(x, t):
            out, _ = model.decode(x, positions=POSITIONS, segment_ids=SEGMENTS, meta_positions=META_POSITIONS)
            return jnp.sum(jnp.sin(3 * out[:, t]))

        return jnp.moveaxis(jax.lax.map(lambda t: jnp.abs(jax.grad(row_sums)(x, t)).sum(-1), jnp.arange(T)), 0, 1)

    same = np.asarray(SEGMENTS)[:, :, None] == np.asarray(SEGMENTS)[:, None, :]
    allowed = same & np.tril(np.ones((T, T), bool))
    found = np.asarray(reach(model))
    assert np.all(found[~allowed] == 0)
    assert np.all(found[allowed] > 0)


@pytest.mark.parametrize(("position", "norm_position"), [("rope", "pre"), ("learned", "post")])
def test_gathered_equals_dense(position, norm_position):
    cfg = dataclasses.replace(CFG, position=position, norm_position=norm_position)
    gathered, dense = (loss_and_gradient(build(cfg, MetaTokens(attention=form))) for form in ("gathered", "dense"))
    assert_close(gathered[0], dense[0])
    for (name, ours), theirs in zip(named_params(gathered[1]).items(), named_params(dense[1]).values(), strict=True):
        assert_close(ours[...], theirs[...])
        # Softmax does not see a shift of all keys, so a key bias has no gradient without rotation.
        assert np.any(np.asarray(ours[...])) or name.endswith("key.b"), name


@pytest.mark.parametrize("form", ["gathered", "dense"])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_other_rows_get_exactly_nothing_from_meta_attention(form, norm_position):
    model = build(dataclasses.replace(CFG, norm_position=norm_position), MetaTokens(attention=form))
    _, captured = run(model, capture=("meta_out",))
    is_meta = np.zeros((B, T), bool)
    for row, meta_positions in enumerate(np.asarray(META_POSITIONS)):
        is_meta[row, meta_positions[meta_positions < T]] = True
    out = np.asarray(captured["meta_out"])
    assert not out[:, ~is_meta].any()
    assert np.all(np.abs(out[:, is_meta]).max(axis=-1) > 0)


@pytest.mark.parametrize("form", ["gathered", "dense"])
def test_without_metas_the_block_is_the_plain_one(form):
    plain = build(meta=None)
    params = {name: value for name, value in named_params(plain).items()}
    model = build(meta=MetaTokens(attention=form))
    for name, param in named_params(model).items():
        if name in params:
            param[...] = params[name][...]
    expected = run(plain)
    assert np.array_equal(run(model, meta_positions=jnp.zeros((B, 0), jnp.int32)), expected)
    assert np.array_equal(run(model, meta_positions=jnp.full((B, 3), T)), expected)


@pytest.mark.parametrize("form", ["gathered", "dense", "dense_uniform", "causal"])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_rows_of_padding_and_without_metas_stay_finite(form, norm_position):
    model = build(dataclasses.replace(CFG, norm_position=norm_position), MetaTokens(attention=form))
    segments = jnp.stack([SEGMENTS[0], jnp.zeros(T, jnp.int32)])
    meta_positions = jnp.stack([jnp.full(5, T), META_POSITIONS[0]])

    @jax.jit
    def gradient(model):
        return jax.grad(lambda m: jnp.sum(jnp.sin(run(m, segment_ids=segments, meta_positions=meta_positions))))(model)

    assert np.isfinite(run(model, segment_ids=segments, meta_positions=meta_positions)).all()
    for name, value in named_params(gradient(model)).items():
        assert np.isfinite(value[...]).all(), name


@pytest.mark.parametrize(("unroll", "remat"), [(1, "none"), (1, "full"), (0, "full"), (0, "dots"), (1, "dots")])
def test_unroll_and_remat_change_nothing(unroll, remat):
    expected = loss_and_gradient(build())
    ours = loss_and_gradient(build(runtime=Runtime(unroll=unroll, remat=remat)))
    assert_close(ours[0], expected[0])
    for a, b in zip(named_params(ours[1]).values(), named_params(expected[1]).values(), strict=True):
        assert_close(a[...], b[...])


def test_captures_rebuild_the_residual_stream():
    model = build()
    names = ("residual", "mixer_out", "meta_out", "mlp_out", "attention_probabilities", "attention_lse", "final")
    logits, c = run(model, capture=names)
    np.testing.assert_allclose(logits, run(model), atol=1e-5)
    after = c["residual"] + c["mixer_out"] + c["meta_out"] + c["mlp_out"]
    np.testing.assert_allclose(after[:-1], c["residual"][1:], atol=1e-5)
    np.testing.assert_allclose(model.final_norm(after[-1]), c["final"], atol=1e-5)
    np.testing.assert_allclose(model.unembed(c["final"]), logits, atol=1e-5)
    p = c["attention_probabilities"]
    assert p.shape == (2, B, 4, T, T)
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
    across = (SEGMENTS[:, :, None] != SEGMENTS[:, None]) | ~np.tril(np.ones((T, T), bool))
    assert not np.asarray(p)[:, np.broadcast_to(across[:, None], (B, 4, T, T))].any()
    assert c["attention_lse"].shape == (2, B, T, 4)
    with pytest.raises(UserError, match="did you mean 'meta_out'"):
        run(model, capture=("meta_outs",))


def test_positions_are_taken_from_the_data():
    learned = build(dataclasses.replace(CFG, position="learned"), None)
    none = jnp.full((B, T), -1)
    np.testing.assert_array_equal(learned.embed(TOKENS, none), learned.embedding[...][TOKENS])
    assert np.isnan(learned.embed(TOKENS, POSITIONS.at[0, 3].set(T))).any(axis=-1).nonzero()[1].tolist() == [3]
    shifted = run(build(meta=None), positions=POSITIONS + 100)
    np.testing.assert_allclose(shifted, run(build(meta=None)), atol=2e-4)  # rotary positions count by difference
    nope = build(dataclasses.replace(CFG, position="none"), None)
    assert np.array_equal(run(nope, positions=none), run(nope))


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="meta_positions"):
        run(build(), meta_positions=None)
    longer = jnp.zeros((B, T + 1), jnp.int32)
    with pytest.raises(UserError, match="learned positions for 20"):
        build(dataclasses.replace(CFG, position="learned"), None).embed(longer, longer)


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits():
    model = build(dataclasses.replace(CFG, compute_dtype="bfloat16"))
    logits, captured = run(model, capture=("residual",))
    assert captured["residual"].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    exact = np.asarray(run(build()))
    assert 0 < np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


def test_swiglu_untied_rmsnorm():
    cfg = llama(2, 4, 16, kv_heads=2, mlp_width=24, init_std=0.2)
    model = build(cfg, None)
    names = named_params(model)
    assert names["unembedding"].shape == (VOCAB, 16)
    assert "blocks.0.0.mlp.gate.w" in names
    x = jax.random.normal(jax.random.key(0), (B, T, 16))
    gate, up, down = (getattr(model.blocks[0][0].mlp, part).w[...][0] for part in ("gate", "up", "down"))
    first = jax.tree.map(lambda w: w[0], model.blocks[0][0].mlp)
    np.testing.assert_allclose(first(x), (x @ gate / (1 + jnp.exp(-(x @ gate))) * (x @ up)) @ down, atol=1e-5)
    norm = Norm(cfg)(x)
    np.testing.assert_allclose(norm, x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-5), atol=1e-5)
