"""Does text drawn behind metadata have its topic, and does guidance make it more so: URLs Help, Topics Guide (arXiv 2505.16570).

Each text is drawn from z_empty + g (z_context - z_empty) behind a held-out document's own metadata. Whether it has that document's topic is
judged by a linear classifier of token counts, trained on training documents cut to the same length; what guidance costs is seen in the
nats a token that the model itself gives the text without metadata. Grid, sampler and judge are not stated in the paper.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from metajax.analysis.labels import check_labels, classes_of, matched, opening, some_documents, texts_of
from metajax.analysis.study import Study
from metajax.core.errors import require
from metajax.data.cache import build_metadata_table
from metajax.data.questions import Question
from metajax.evaluation.multiple_choice import score
from metajax.inference.decoding import Sampling
from metajax.inference.forward import prepare
from metajax.inference.generation import generate

STRENGTHS = (0.0, 1.0, 1.5, 2.0, 3.0)
TOKENS, TEXTS = 48, 96  # of a text; texts drawn at each strength, as many of each topic
LEARNED, TESTED, CLASSES = (
    6_000,
    1_000,
    6,
)  # documents that the classifier learns from and is tested on; topics, the most frequent
BUCKETS, STEPS = 4_096, 200  # of token ids; of the classifier's training


def counts_of(bodies: list[np.ndarray]) -> Float[np.ndarray, "N buckets"]:
    """log(1 + count) of each token among the first TOKENS, ids modulo BUCKETS, of length 1."""
    counts = np.zeros((len(bodies), BUCKETS), np.float32)
    for row, ids in zip(counts, bodies, strict=True):
        np.add.at(row, ids[:TOKENS] % BUCKETS, 1)
    counts = np.log1p(counts)
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-6)


def train_classifier(
    x: Float[np.ndarray, "N buckets"], y: Int[np.ndarray, " N"], classes: int
) -> Float[np.ndarray, "buckets classes"]:
    """Multinomial logistic regression by full-batch AdamW."""
    tx, x, y = optax.adamw(5e-2, weight_decay=1e-3), jnp.asarray(x), jnp.asarray(y)

    def loss(w: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(x @ w, y).mean()

    def step(carry: Any, _: None) -> tuple[Any, None]:
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    start = jnp.zeros((x.shape[1], classes))
    return np.asarray(jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), None, length=STEPS)[0][0])(start))


def _topics(study: Study, split: str, count: int, names: list[str] | None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(documents of the most frequent topics, as many of each; their topics; the topics' names)."""
    documents = some_documents(study.corpora, split, TOKENS // 2, count)
    texts = texts_of(study.corpora, study.corpora.config.evaluation.labels[0], documents)
    if names is None:
        names = classes_of(texts, 2)[1][:CLASSES]
    numbers = {name: i for i, name in enumerate(names)}
    classes = np.array([numbers.get(text, -1) for text in texts])
    kept = matched(classes, np.zeros(len(classes)), 1, np.random.default_rng(0))
    return documents[kept], classes[kept], names


def guidance(study: Study) -> dict[str, Any]:
    """For each strength g (as "g_1_5"): share of texts with the topic of their metadata, and nats a token without metadata; beside them the
    classifier's accuracy on real held-out texts and chance."""
    corpora, recipe = study.corpora, study.corpora.config.metadata
    check_labels(study, "guidance")
    fits = recipe is not None and recipe.position != "append" and not recipe.tokens
    require(
        fits, "guidance: needs metadata that stands in front of the text and says something (metadata.position, metadata.tokens)"
    )
    cache, tokenizer = corpora.caches[0], corpora.tokenizer
    documents, topics, names = _topics(study, "train", LEARNED, None)
    require(len(names) >= 2, f"guidance: {corpora.config.evaluation.labels[0]} has no two topics")
    weights = train_classifier(counts_of([cache[d] for d in documents.tolist()]), topics, len(names))
    documents, topics, _ = _topics(study, "held_out", TESTED, names)
    require(len(documents) > 0, "guidance: a topic has no held-out document; name one with fewer values in evaluation.labels")
    real = counts_of([cache[d] for d in documents.tolist()])
    table = build_metadata_table(cache, tokenizer, recipe.template)
    said = np.array([table[d] is not None for d in documents.tolist()])
    order = np.concatenate([np.flatnonzero(said & (topics == c))[: TEXTS // len(names)] for c in range(len(names))])
    require(len(order) > 0, "guidance: no held-out document of these topics has metadata")
    contexts = [table[d].tolist() for d in documents[order].tolist()]
    out = {
        "topics": names, "texts": len(order), "chance": 1 / len(names), "tokens": TOKENS,
        "real": {"accuracy": float(np.mean((real @ weights).argmax(1) == topics)), "documents": len(topics)},
    }  # fmt: skip
    ready, head = prepare(study.model), opening(corpora, () if recipe.prepended else None)[0]
    for strength in STRENGTHS:
        texts = generate(
            ready, corpora.config, tokenizer, [""] * len(order), count=TOKENS, context=contexts, guidance=strength, sampling=Sampling(1.0)
        )  # fmt: skip
        ids = [np.array(tokenizer.encode(text), np.int64) for text in texts]
        right = (counts_of(ids) @ weights).argmax(1) == topics[order]
        written = [text for text in texts if text]
        likely = score(study.program, corpora, study.model, [Question(("",), (text,), (text,), 0) for text in written], head)
        tokens = sum(len(tokenizer.encode(text)) for text in written)
        share = float(right.mean())
        out[f"g_{strength:g}".replace(".", "_")] = {
            "accuracy": share, "half": 1.96 * float(np.sqrt(share * (1 - share) / len(order))), "nats": float(-likely[:, 0].sum() / max(tokens, 1)),
            "example": {"topic": names[topics[order][0]], "context": tokenizer.decode(contexts[0]), "text": texts[0]},
        }  # fmt: skip
    return out
