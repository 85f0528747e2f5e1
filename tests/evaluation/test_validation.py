"""Validation bits per byte: packed rows compared with one document at a time, and the counts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from metajax.config import Metadata, MetaTokens
from metajax.data.metadata import uniform_hash
from metajax.data.pipeline import EVALUATION_SEED, open_corpora
from metajax.evaluation.validation import evaluate_validation
from metajax.training.program import Program

METADATA = Metadata(position="none", template="{topic}")


def prepare(config, paths):
    corpora = open_corpora(config, paths)
    program = Program.build(config, corpora.tokenizer.vocabulary.size, jax.devices()[:1])
    return corpora, program, program.create_state().model


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_packed_rows_equal_one_document_at_a_time(tiny_config, paths, packing):
    """Evaluation cuts no document that fits in a row, so its loss is that of the document alone."""
    config = tiny_config(**{"data.packing": packing, "data.sequence_length": 512, "evaluation.documents": 6})
    corpora, program, model = prepare(config, paths)
    cache, vocabulary = corpora.caches[0], corpora.tokenizer.vocabulary
    available = cache.documents("validation", config.data.validation_share)
    chosen = available[np.argsort(uniform_hash(EVALUATION_SEED, available), kind="stable")][:6]
    assert cache.lengths[chosen].max() < 512
    nats = 0.0
    for document in chosen:
        body = cache[int(document)]
        tokens = jnp.asarray([[vocabulary.bos, *body[:-1]]], jnp.int32)
        positions = jnp.arange(tokens.shape[1])[None]
        logits = model(tokens, positions=positions, segment_ids=jnp.ones_like(tokens))
        nats += float(cross_entropy(logits, jnp.asarray(body, jnp.int32)[None]).sum())
    result = evaluate_validation(program, corpora, model, "none")
    expected = nats / math.log(2) / int(np.asarray(cache.bytes)[chosen].sum())
    assert result["bpb"] == pytest.approx(expected, rel=1e-5)
    assert result["body_tokens"] == int(np.asarray(cache.lengths)[chosen].sum())
    assert result["documents"] == 6


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(tiny_config, paths):
    config = tiny_config(metadata=METADATA, meta_tokens=MetaTokens(), **{"evaluation.conditions": "none,right,shuffled,empty"})
    corpora, program, model = prepare(config, paths)
    flat = jax.tree.map(jnp.zeros_like, model)
    size = corpora.tokenizer.vocabulary.size
    results = {c: evaluate_validation(program, corpora, flat, c) for c in config.evaluation.conditions}
    for result in results.values():
        assert result["nats_per_token"] == pytest.approx(math.log(size), rel=1e-6)
        assert result["bpb"] == pytest.approx(math.log2(size), rel=1e-6), "a byte is a token here"
    assert results["none"]["metadata_tokens"] == 0
    assert results["right"]["metadata_tokens"] > results["empty"]["metadata_tokens"] > 0


def test_the_same_documents_and_tokens_in_every_condition(tiny_config, paths):
    config = tiny_config(metadata=METADATA, **{"evaluation.conditions": "none,right,shuffled,empty"})
    corpora, program, model = prepare(config, paths)
    results = [evaluate_validation(program, corpora, model, c) for c in config.evaluation.conditions]
    for key in ("documents", "body_bytes", "body_tokens"):
        assert len({r[key] for r in results}) == 1, key
    assert len({r["bpb"] for r in results}) == 4, "the conditions give the model different inputs"


def test_appended_metadata_changes_no_body_score(tiny_config, paths):
    """Appended metadata changes no body score, by causality; it has a score of its own."""
    recipe = Metadata(position="append", template="{topic}")
    conditions = ("none", "right", "shuffled", "empty")
    corpora, program, model = prepare(tiny_config(metadata=recipe, **{"data.sequence_length": 512}), paths)  # no document is cut
    results = {c: evaluate_validation(program, corpora, model, c) for c in conditions}
    for condition in conditions[1:]:
        assert results[condition]["bpb"] == pytest.approx(results["none"]["bpb"], rel=1e-6)
        assert results[condition]["metadata_tokens"] > 0
    scores = [results[c]["metadata_nats_per_token"] for c in conditions]
    assert scores[0] is None and len(set(scores[1:])) == 3
