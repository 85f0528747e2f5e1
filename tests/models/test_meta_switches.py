"""The switches of meta-tokens: forms of the second attention, embeddings of meta-tokens, and interventions on a trained model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lm import CFG, META, META_POSITIONS, POSITIONS, RUNTIME, SEGMENTS, TOKENS, VOCAB, B, T, build, run

from metajax.config import MetaTokens
from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.models.lm import LM, named_params, with_intervention
from metajax.models.rotary import rotary_table
from metajax.training.program import abstract_model
from metajax.training.state import from_arrays, to_arrays

FORMS = ("gathered", "dense", "dense_uniform", "dense_causal", "causal")
UNTIED = dataclasses.replace(CFG, tied=False)
IS_META = np.array([[t in row for t in range(T)] for row in META_POSITIONS.tolist()])
NONE = jnp.zeros((B, 0), jnp.int32)


def first_layer(model, x):
    """(q, k, v) of the second attention in the first block, [B, T, H or KV, D], not rotated, in float64 NumPy."""
    block = jax.tree.map(lambda w: w[0], model.blocks[0][0])
    return [np.asarray(y, np.float64) for y in block.meta_attention.split(block.meta_norm(x), None)], block


def rotated(x, positions):
    cos, sin = (np.asarray(y, np.float64)[:, :, None] for y in rotary_table(CFG, jnp.asarray(positions)))
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def second_attention(model, captured, forbidden, positions=POSITIONS, dtype=np.float64):
    """The second attention as the paper writes it, a mask P of 0 and `forbidden` added to the scores, in arithmetic of `dtype`."""
    (q, k, v), block = first_layer(model, captured["residual"][0] + captured["mixer_out"][0])
    q, k = rotated(q, positions), rotated(k, positions)
    k, v = (np.repeat(y, q.shape[2] // k.shape[2], axis=2) for y in (k, v))
    scores = (np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])).astype(dtype)
    scores = scores + np.where(IS_META[:, None, :, None] & IS_META[:, None, None, :], dtype(0), dtype(forbidden))
    same = np.asarray(SEGMENTS)[:, None, :, None] == np.asarray(SEGMENTS)[:, None, None, :]
    scores = np.where(same & np.tril(np.ones((T, T), bool)), scores, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = np.nan_to_num(weights / weights.sum(-1, keepdims=True))  # a row that forbids everything: 0
    out = np.einsum("bhqk,bkhd->bqhd", weights, v)
    out = np.asarray(block.meta_attention.merge(jnp.asarray(out, jnp.float32)))
    return np.where(np.isneginf(forbidden) & ~IS_META[..., None], 0, out)


@pytest.mark.parametrize(
    ("form", "forbidden", "dtype"),
    [
        ("gathered", -np.inf, np.float64),
        ("dense", -np.inf, np.float64),
        ("dense_uniform", -1e9, np.float32),
        ("dense_causal", -1e4, np.float64),
        ("causal", 0.0, np.float64),
    ],
)
def test_each_form_is_the_papers_formula_under_its_constant(form, forbidden, dtype):
    """A finite mask constant cancels in ordinary rows or absorbs the scores by rounding; each form states which."""
    model = build(meta=MetaTokens(attention=form))
    _, captured = run(model, capture=("residual", "mixer_out", "meta_out"))
    np.testing.assert_allclose(captured["meta_out"][0], second_attention(model, captured, forbidden, dtype=dtype), atol=2e-5)


def test_all_forms_have_the_same_parameters():
    shapes = [{name: p.shape for name, p in named_params(build(meta=MetaTokens(attention=form))).items()} for form in FORMS]
    assert all(s == shapes[0] for s in shapes)


def test_the_parameter_matched_control_needs_no_meta_tokens():
    model = build(meta=MetaTokens(inject="none", rate=0, attention="causal"))
    expected = run(model)
    assert np.array_equal(run(model, meta_positions=None), expected)
    assert np.array_equal(run(model, meta_positions=NONE), expected)
    assert np.abs(expected - run(build(meta=None))).max() > 1e-3


@pytest.mark.parametrize("form", ["dense_uniform", "dense_causal"])
def test_ordinary_rows_attend_without_any_meta_token(form):
    model = build(meta=MetaTokens(attention=form))
    _, captured = run(model, meta_positions=NONE, capture=("meta_out",))
    assert np.all(np.abs(captured["meta_out"]).max(axis=-1) > 0)


@pytest.mark.parametrize(("embedding", "std"), [("frozen", 0.2), ("zero", 0.0)])
def test_a_fixed_meta_embedding_depends_on_no_parameter(embedding, std):
    meta = MetaTokens(embedding=embedding)
    model, other = build(UNTIED, meta), build(UNTIED, meta, seed=1)
    x, y = (m.embed(TOKENS, POSITIONS, META_POSITIONS) for m in (model, other))
    assert np.array_equal(x[IS_META], y[IS_META])
    assert float(jnp.std(x[IS_META])) == pytest.approx(std, rel=0.3)
    assert np.array_equal(x[~IS_META], model.embedding[...][TOKENS][~IS_META])
    assert named_params(model).keys() == named_params(build(UNTIED)).keys()
    tokens = jnp.where(IS_META, VOCAB - 1, TOKENS % (VOCAB - 1))
    gradient = jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(run(m, tokens)))))(model)
    assert not np.any(gradient.embedding[...][VOCAB - 1])
    assert np.any(gradient.embedding[...][0])


def test_zeroed_positions_are_left_out_of_the_embedding_or_rotate_by_nothing():
    learned = dataclasses.replace(CFG, position="learned")
    x = build(learned, dataclasses.replace(META, zero_position="both")).embed(TOKENS, POSITIONS, META_POSITIONS)
    assert np.array_equal(x[IS_META], build(learned).embedding[...][TOKENS][IS_META])
    assert np.array_equal(x[~IS_META], build(learned).embed(TOKENS, POSITIONS, META_POSITIONS)[~IS_META])
    at_zero = jnp.where(IS_META, 0, POSITIONS)  # a rotary angle of 0 is position 0
    for form in ("gathered", "dense", "dense_causal"):
        model = build(meta=MetaTokens(attention=form))
        both = run(with_intervention(model, zero_position="both"))
        np.testing.assert_allclose(both, run(model, positions=at_zero), atol=1e-5)
        assert np.abs(both - run(model)).max() > 1e-3


@pytest.mark.parametrize("form", ["gathered", "dense"])
def test_the_scope_of_zeroed_positions_is_one_attention(form):
    model = build(meta=MetaTokens(attention=form))
    names = ("residual", "mixer_out", "meta_out")
    scopes = {
        scope: run(with_intervention(model, zero_position=scope), capture=names)[1]
        for scope in ("none", "causal", "meta", "both")
    }
    first = {scope: np.asarray(captured["mixer_out"][0]) for scope, captured in scopes.items()}
    assert np.array_equal(first["causal"], first["both"])
    assert np.array_equal(first["meta"], first["none"])
    assert np.abs(first["both"] - first["none"]).max() > 1e-4
    for scope, captured in scopes.items():
        positions = np.where(IS_META & (scope in ("meta", "both")), 0, POSITIONS)
        expected = second_attention(model, captured, -np.inf, positions)
        np.testing.assert_allclose(captured["meta_out"][0], expected, atol=2e-5)


@pytest.mark.parametrize("changes", [{"zero_position": "both"}, {"zero_position": "meta", "embedding": "zero"}])
def test_an_intervention_is_another_config_with_the_same_parameters(changes, tiny_config):
    config = tiny_config(meta_tokens=MetaTokens())
    trained = abstract_model(config, VOCAB)
    trained = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), trained)
    changed = override(config, {f"meta_tokens.{name}": value for name, value in changes.items()})
    restored = from_arrays(abstract_model(changed, VOCAB), to_arrays(trained), "the run")
    intervened = with_intervention(trained, **changes)
    assert np.array_equal(run(restored), run(intervened))
    assert np.abs(run(restored) - run(trained)).max() > 1e-3
    assert trained.meta == MetaTokens()


def test_impossible_interventions_are_refused():
    with pytest.raises(UserError, match="its meta_tokens is null"):
        with_intervention(build(meta=None), zero_position="both")
    with pytest.raises(UserError, match="choose none or both"):
        with_intervention(build(dataclasses.replace(CFG, position="learned")), zero_position="meta")
    with pytest.raises(UserError, match="cannot be changed"):
        with_intervention(build(), attention="dense")
    with pytest.raises(UserError, match="meta_positions"):
        LM(CFG, vocab_size=VOCAB, max_length=T, meta=MetaTokens(embedding="zero"), runtime=RUNTIME, key=jax.random.key(0)).embed(
            TOKENS, POSITIONS
        )
