"""Guidance: does text generated after metadata have its topic, and more so with guidance?

Texts drawn from z_empty + g (z_context - z_empty) after the metadata of validation documents, and the share that a classifier of real texts
assigns to the topic of that metadata. Nats a token are the model's own for these texts without metadata: the cost of guidance.

Source: URLs Help, Topics Guide (arXiv 2505.16570). Grid, sampler and judge are not stated in the paper. Here the judge is a linear classifier
of token counts, trained on training documents cut to the same length.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common import labels
from metajax.analysis.common.numbers import key_of, values_of
from metajax.analysis.common.study import Study, descent, documents_of
from metajax.core.errors import require
from metajax.data.cache import build_metadata_table
from metajax.evaluation.multiple_choice import score
from metajax.evaluation.questions import Question
from metajax.inference.decoding import Sampling
from metajax.inference.forward import prepare
from metajax.inference.generation import generate
from metajax.reporting.figures import look
from metajax.reporting.panels import GREY, panels

STRENGTHS = (0.0, 1.0, 1.5, 2.0, 3.0)
TOKENS, TEXTS = 48, 96  # tokens of a text; texts drawn at each strength, equally many of each topic
LEARNED, TESTED = 6_000, 1_000  # documents that train and test the classifier
CLASSES = 6  # number of topics, the most frequent ones
BUCKETS, STEPS = 4_096, 200  # buckets of token ids; steps of the classifier's training


def counts_of(bodies: list[np.ndarray]) -> Float[np.ndarray, "N buckets"]:
    """log(1 + count) of each token among the first TOKENS, ids modulo BUCKETS, L2-normalised."""
    counts = np.stack([np.bincount(ids[:TOKENS] % BUCKETS, minlength=BUCKETS).astype(np.float32) for ids in bodies])
    counts = np.log1p(counts)
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-6)


def train_classifier(
    x: Float[np.ndarray, "N buckets"], y: Int[np.ndarray, " N"], classes: int
) -> Float[np.ndarray, "buckets classes"]:
    """Multinomial logistic regression by full-batch AdamW."""
    tx, x, y = optax.adamw(5e-2, weight_decay=1e-3), jnp.asarray(x), jnp.asarray(y)
    update = descent(lambda w: optax.softmax_cross_entropy_with_integer_labels(x @ w, y).mean(), tx)
    start = jnp.zeros((x.shape[1], classes))
    return np.asarray(jax.jit(lambda w: jax.lax.scan(update, (w, tx.init(w)), None, length=STEPS)[0][0])(start))


def _topics(study: Study, split: str, count: int, names: list[str] | None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(documents of the most frequent topics, equally many of each; their topics; the topics' names)."""
    documents = documents_of(study.corpora, split, TOKENS // 2)[:count]
    texts = labels.texts_of(study.corpora, study.corpora.config.evaluation.labels[0], documents)
    names = labels.classes_of(texts, 2)[1][:CLASSES] if names is None else names
    classes = labels.numbers_of(texts, names)
    kept = labels.matched(classes, np.zeros(len(classes)), 1, np.random.default_rng(0))
    return documents[kept], classes[kept], names


def _needs(study: Study) -> None:
    recipe = study.corpora.config.metadata
    labels.check_labels(study)
    has_text = recipe is not None and recipe.position != "append" and not recipe.tokens
    require(has_text, "needs metadata with text, before the document (metadata.position, metadata.tokens)")


@analysis(
    "guidance",
    title="Guided generation",
    fits=lambda study: labels.has_labels(study) and labels.has_context(study) and not study.corpora.config.metadata.tokens,
    needs=_needs,
    on_prompts=False,
)
def guidance(study: Study) -> dict[str, Any]:
    """For each strength g (as "g_1_5"): share of texts with the topic of their metadata, and nats per token without metadata.
    Also the classifier's accuracy on real validation texts, and chance."""
    corpora, recipe = study.corpora, study.corpora.config.metadata
    cache, tokenizer = corpora.caches[0], corpora.tokenizer
    documents, topics, names = _topics(study, "train", LEARNED, None)
    require(len(names) >= 2, f"guidance: {corpora.config.evaluation.labels[0]} has no two topics")
    weights = train_classifier(counts_of([cache[d] for d in documents.tolist()]), topics, len(names))

    def topics_of(bodies: list[np.ndarray]) -> np.ndarray:
        return (counts_of(bodies) @ weights).argmax(1)

    documents, topics, _ = _topics(study, "validation", TESTED, names)
    require(len(documents) > 0, "guidance: a topic has no validation document; name one with fewer values in evaluation.labels")
    real = {"accuracy": float(np.mean(topics_of([cache[d] for d in documents.tolist()]) == topics)), "documents": len(topics)}
    table = build_metadata_table(cache, tokenizer, recipe.template)
    described = np.array([table[d] is not None for d in documents.tolist()])
    order = np.concatenate([np.flatnonzero(described & (topics == c))[: TEXTS // len(names)] for c in range(len(names))])
    require(len(order) > 0, "guidance: no validation document of these topics has metadata")
    contexts, wanted = [table[d].tolist() for d in documents[order].tolist()], topics[order]
    out = {"topics": names, "texts": len(order), "chance": 1 / len(names), "tokens": TOKENS, "real": real}
    ready, head = prepare(study.model), labels.opening(corpora, () if recipe.prepended else None)[0]
    options = {"count": TOKENS, "context": contexts, "sampling": Sampling(1.0)}
    for strength in STRENGTHS:
        texts = generate(ready, corpora.config, tokenizer, [""] * len(order), guidance=strength, **options)
        ids = [np.array(tokenizer.encode(text), np.int64) for text in texts]
        questions = [Question(("",), (text,), (text,), 0) for text in texts if text]
        likely = score(study.program, corpora, study.model, questions, head)
        share = float((topics_of(ids) == wanted).mean())
        nats = float(-likely[:, 0].sum() / max(sum(map(len, ids)), 1))
        example = {"topic": names[wanted[0]], "context": tokenizer.decode(contexts[0]), "text": texts[0]}
        half = 1.96 * float(np.sqrt(share * (1 - share) / len(order)))
        out[key_of("g", strength)] = {"accuracy": share, "half": half, "nats": nats, "example": example}
    return out


@guidance.headlines
def headlines(numbers: Numbers) -> list[str]:
    found, real = values_of("g", numbers), numbers["real"]
    lines = []
    for g, n in found.items():
        share = f"{n['accuracy']:.1%} ± {n['half']:.1%} of {numbers['texts']} texts have the topic of their metadata"
        lines.append(f"g = {g}: {share}, {n['nats']:.2f} nats a token")
    lines.append(f"the classifier on {real['documents']:,} real texts: {real['accuracy']:.1%}; chance {numbers['chance']:.1%}")
    return lines + [f"g = {g}, after {n['example']['context']!r}: {n['example']['text']!r}" for g, n in found.items()]


@guidance.figures
def figures(result: Numbers) -> Figures:
    found = values_of("g", result)
    figure, (axes,) = panels(1, 1, 2.6)
    accuracy, half = ([n[key] for n in found.values()] for key in ("accuracy", "half"))
    axes.errorbar([float(g) for g in found], accuracy, yerr=half, fmt="o-", color=look(0)[0], capsize=2)
    axes.axhline(result["chance"], color=GREY, linewidth=1)
    axes.axhline(result["real"]["accuracy"], color=GREY, linewidth=1, linestyle="--")
    axes.set(xlabel="g", ylabel="texts with their topic")
    return [(figure, "With 95 % intervals over texts; grey: chance, and (dashed) the classifier on real texts.")]
