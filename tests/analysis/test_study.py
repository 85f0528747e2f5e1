"""Numbers of the analyses on a model, compared with computations by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import entr, softmax, stdtrit

from metajax.analysis.attention import maps
from metajax.analysis.caching import by_distance, caching, cosine, resemblance
from metajax.analysis.common.numbers import pooled
from metajax.analysis.common.study import open_study
from metajax.analysis.interventions import intervene, interventions
from metajax.analysis.overhead import OF_META_TOKENS, overhead, random_batch, twins
from metajax.analysis.sharpening import sharpness
from metajax.analysis.theory import meta_rows
from metajax.config import MetaTokens, Tasks
from metajax.core.errors import UserError
from metajax.data.pipeline import open_corpora
from metajax.models.masks import Mask
from metajax.models.rotary import rotary_table
from metajax.training.program import Program
from metajax.training.step import MODEL_INPUTS
from metajax.vision.analyses import check_analyses

TASKS = Tasks(names=("copying", "list_recall"), train_length=48, eval_lengths=(32, 64), eval_examples=6, span=3)
RUN = {"tasks": TASKS, "meta_tokens": MetaTokens(), "evaluation.documents": 0}
RUN |= {"data.tokenizer": "bpe:512+tasks", "data.sequence_length": 64}


@pytest.fixture
def opened(tiny_config, paths):
    def run(**changes):
        config = tiny_config(**RUN | changes)
        corpora = open_corpora(config, paths)
        program = Program.build(config, corpora.tokenizer.vocabulary.size, jax.devices()[:1])
        model = jax.tree.map(lambda x: 6 * x, program.create_state().model)  # attention that is not almost uniform
        return program, corpora, model

    return run


def first_layer_scores(model, batch):
    """Scores before the softmax of the first block's causal attention, [B, H, T, T]; -inf at masked pairs."""
    block = jax.tree.map(lambda x: x[0], model.blocks[0][0])
    x = block.mixer_norm(model.embed(batch["tokens"], batch["positions"], batch["meta_positions"]))
    q, k, _ = block.mixer.attention.split(x, rotary_table(model.cfg, batch["positions"]))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    return np.asarray(jnp.where(Mask().dense(batch["segment_ids"])[:, None], scores, -jnp.inf), np.float64)


def test_rows_mark_their_meta_tokens_and_their_question(opened):
    study = open_study(*opened(), task="copying", prompts=5)
    meta = study.corpora.tokenizer.vocabulary.meta
    assert study.rows["tokens"].shape == (5, 32) and study.count == 5  # 64 is beyond the training length
    for n in range(5):
        meta_positions = np.flatnonzero(study.rows["tokens"][n] == meta)
        assert (study.first_meta[n], study.last_meta[n]) == (meta_positions[0], meta_positions[-1]) and len(meta_positions) == 2
        text = study.labels(n)
        assert text[meta_positions[0]] == text[meta_positions[1]] == "_PAUSE_" and "".join(text).endswith("A:")
        assert study.queries_after(study.first_meta)[n].sum() == len(text) - meta_positions[0] - 1
    assert open_study(*opened(), prompts=5).task == "list_recall"


def test_sharpness_and_meta_rows_against_scores_by_hand(opened):
    program, corpora, model = opened()
    study = open_study(program, corpora, model, task="copying", prompts=5)
    found = study.over_prompts("test", sharpness, model) | study.over_prompts("test", meta_rows, model)
    scores = first_layer_scores(model, {k: jnp.asarray(study.rows[k]) for k in MODEL_INPUTS})
    rows = softmax(scores, axis=-1)
    there = study.rows["segment_ids"].astype(bool)[:, None] & np.ones((5, 2, 1), bool)
    np.testing.assert_allclose(found["peak"][:, 0][there], scores.max(axis=-1)[there], rtol=2e-5, atol=2e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found["peak"][:, 1][there], scores.max(axis=-1)[there], rtol=2e-5, atol=2e-5)
    got = study.over_prompts("test", sharpness, model)["entropy"][:, 0]
    np.testing.assert_allclose(got[there], entr(rows).sum(axis=-1)[there], rtol=2e-5, atol=2e-5)
    expected = np.stack([rows[n, :, :, study.last_meta[n]] for n in range(5)])
    np.testing.assert_allclose(found["p"][:, 0][there], expected[there], rtol=2e-5, atol=1e-6)


def test_several_batches_of_prompts_equal_one_batch(opened, monkeypatch):
    study = open_study(*opened(), prompts=5)
    whole = study.over_prompts("test", sharpness, study.model)
    monkeypatch.setattr("metajax.analysis.common.study.BATCH_FLOATS", 2 * 2 * 2 * 32 * 32)
    parts = study.over_prompts("test", sharpness, study.model)
    for name, values in whole.items():
        assert parts[name].shape == values.shape == (5, 2, 2, 32)
        np.testing.assert_allclose(parts[name], values, rtol=1e-5, atol=1e-5)


def test_cosines_with_residuals_and_embeddings(opened):
    program, corpora, model = opened()
    study = open_study(program, corpora, model, task="copying", prompts=3)
    found = study.over_prompts("test", resemblance, model)
    embedding = np.asarray(model.embedding[...], np.float64)[study.rows["tokens"]]
    embedding /= np.linalg.norm(embedding, axis=-1, keepdims=True)
    expected = np.stack([embedding[n] @ embedding[n, study.last_meta[n]] for n in range(3)])
    for name in ("same_layer", "embedding"):  # with rotary positions the input of the first block is the embedding
        np.testing.assert_allclose(found[name][:, 0], expected, atol=2e-6)
    assert np.abs(found["same_layer"][:, 1] - found["embedding"][:, 1]).max() > 1e-3
    assert float(cosine(jnp.zeros(4), jnp.ones(4))) == 0


def test_distances_count_back_from_the_anchor():
    values = np.arange(24, dtype=float).reshape(2, 1, 12)
    mean, half, n = by_distance(values, np.array([3, 2]))
    assert n.tolist() == [2, 2, 1] and mean[0].tolist() == [(2 + 13) / 2, (1 + 12) / 2, 0]
    assert half[0, 0] == pytest.approx(stdtrit(1, 0.975) * np.std([2, 13], ddof=1) / np.sqrt(2)) and np.isnan(half[0, 2])


@pytest.mark.parametrize("form", ["gathered", "dense", "causal"])
def test_meta_maps_equal_meta_attention(opened, form):
    """Rows with a key sum to 1. Weighting the values with them gives the model's own output."""
    program, corpora, model = opened(**{"meta_tokens": MetaTokens(attention=form)})
    study = open_study(program, corpora, model, task="copying", prompts=2)
    batch = {k: jnp.asarray(study.rows[k]) for k in MODEL_INPUTS}
    _, seen = model(batch["tokens"], **{k: batch[k] for k in MODEL_INPUTS[1:]}, capture=("meta_out", "meta_values"))
    weights = study.over_prompts("test", maps, model)["meta"][:, 0]
    meta_positions = study.rows["meta_positions"]
    if form == "dense":
        weights = np.stack([weights[n][:, meta_positions[n]][:, :, meta_positions[n]] for n in range(2)])
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, seen["meta_values"][0])
    added = jax.tree.map(lambda x: x[0], model.blocks[0][0]).meta_attention.merge(out)
    whole = np.asarray(seen["meta_out"][0])
    expected = np.stack([whole[n, meta_positions[n]] for n in range(2)]) if form in ("gathered", "dense") else whole
    np.testing.assert_allclose(np.asarray(added), expected, atol=2e-5)
    np.testing.assert_allclose(weights[:, :, -1].sum(axis=-1), 1, atol=1e-5)


def test_interventions_fit_the_position_scheme(opened, monkeypatch):
    program, corpora, model = opened()
    study = open_study(program, corpora, model, task="copying", prompts=2)
    monkeypatch.setattr("metajax.analysis.interventions.evaluate_tasks", lambda program, corpora, model: logits(model))
    inputs = {k: jnp.asarray(v) for k, v in study.rows.items() if k in MODEL_INPUTS}
    logits = jax.jit(lambda model: model(inputs["tokens"], **{k: inputs[k] for k in MODEL_INPUTS[1:]}))
    found = interventions.measure(study)
    assert list(found) == ["none", "zero_position", "zero_position_causal", "zero_position_meta", "zero_token"]
    np.testing.assert_array_equal(found["none"], logits(model))
    for name, other in itertools.combinations(found, 2):
        assert np.abs(found[name] - found[other]).max() > 1e-3, f"{name} and {other} are the same"
    learned = opened(**{"model.position": "learned"})[2]
    assert list(intervene(learned)) == ["none", "zero_position", "zero_token"]


def test_batches_of_twins_differ_only_in_their_meta_tokens(opened):
    program, corpora, _ = opened()
    vocabulary = corpora.tokenizer.vocabulary
    for name, config in twins(program.config, vocabulary.size).items():
        batch = random_batch(config, vocabulary)
        meta = batch["tokens"] == vocabulary.meta
        assert batch["tokens"].shape == (config.data.batch_size, 64) and (batch["segment_ids"] == 1).all()
        assert (meta.sum(axis=1) == (0 if name == "plain" else 6)).all() and ("meta_positions" in batch) == (name != "plain")
        assert not batch["loss_weights"][:, :-1][meta[:, 1:]].any() and batch["loss_weights"].sum() > 64


@pytest.mark.slow
def test_overhead_times_the_twins_in_turn(opened, monkeypatch):
    monkeypatch.setattr("metajax.analysis.overhead.ROUNDS", 2)
    found = overhead.measure(open_study(*opened(), task="copying", prompts=2))
    assert found["none"]["step"]["ratio"] == 1 and (found["rows"], found["sequence_length"]) == (4, 64)
    for name in OF_META_TOKENS:
        assert found[name]["step"]["ms"] > 0 and found[name]["generation"]["tokens_per_second"] > 0, name


def test_pooling_counts_prompts_not_rows():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 3, 5)) + rng.normal(size=(40, 1, 1))
    chosen = rng.random((40, 3, 5)) < 0.5
    found = pooled(values, chosen)
    assert found["mean"] == pytest.approx(values[chosen].mean()) and found["median"] == np.median(values[chosen])
    assert found["positive"] == (values[chosen] > 0).mean() and (found["values"], found["prompts"]) == (chosen.sum(), 40)
    naive = stdtrit(39, 0.975) * values[chosen].std() / np.sqrt(chosen.sum())
    assert found["half"] > 1.5 * naive
    whole = pooled(values, np.ones_like(chosen))
    means = values.mean(axis=(1, 2))  # of equal prompts: the mean of their means
    assert whole["half"] == pytest.approx(stdtrit(39, 0.975) * means.std(ddof=1) / np.sqrt(40))


def test_mistakes_are_named(opened):
    program, corpora, model = opened()
    with pytest.raises(UserError, match=r"unknown task 'list_recal'; did you mean 'list_recall'"):
        open_study(program, corpora, model, task="list_recal")
    with pytest.raises(UserError, match="no spread"):
        open_study(program, corpora, model, prompts=1)
    for changes, message in (
        ({"meta_tokens": None}, "meta_tokens is null"),
        ({"tasks.placement": "none"}, r"tasks.placement = 'none'"),
    ):
        with pytest.raises(UserError, match=f"caching: .*{message}"):
            caching.check(open_study(*opened(**changes)))
    with pytest.raises(UserError, match=r"raise model.max_positions"):
        open_study(*opened(**{"model.position": "learned"}), length=80)
    with pytest.raises(UserError, match=r"--what: unknown 'cachin'; did you mean 'caching'"):
        check_analyses("--what", ("cachin",))
