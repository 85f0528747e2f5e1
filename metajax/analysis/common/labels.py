"""Validation documents with labels from their metadata, one in each row, for probes, guidance and attention to metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int

from metajax.analysis.common.study import Study
from metajax.core.errors import require
from metajax.data.annotators import UNKNOWN
from metajax.data.cache import build_metadata_table
from metajax.data.metadata import check_fields, delimiters, uniform_hash
from metajax.data.pipeline import EVALUATION_SEED, Corpora, row_capacity
from metajax.data.rows import Row, finish, stack


def has_labels(study: Study) -> bool:
    """Whether `evaluation.labels` names templates, and these analyses are meant for the model."""
    return bool(study.corpora.config.evaluation.labels) and study.model.meta is None


def check_labels(study: Study) -> None:
    """Raise UserError if `evaluation.labels` is empty, or if meta-tokens are inserted in the text of the rows."""
    config, remedy = study.corpora.config, "such as --set evaluation.labels={section}"
    require(bool(config.evaluation.labels), f"evaluation.labels names no template, {remedy}")
    require(config.meta_tokens is None, "made for models without inserted meta-tokens in their text (meta_tokens)")


def has_context(study: Study) -> bool:
    """Whether the run shows metadata before the text."""
    recipe = study.corpora.config.metadata
    return recipe is not None and recipe.prepended


def some_documents(corpora: Corpora, split: str, least: int, most: int) -> Int[np.ndarray, " N"]:
    """At most `most` documents of the first source with at least `least` body tokens, in an order fixed by the corpus."""
    data, cache = corpora.config.data, corpora.caches[0]
    found = cache.documents(split, data.validation_share, data.min_bytes)
    found = found[cache.lengths[found] >= least]
    return found[uniform_hash(EVALUATION_SEED, found).argsort()][:most]


def texts_of(corpora: Corpora, template: str, documents: Int[np.ndarray, " N"]) -> list[str | None]:
    """A template's text for each document; None if a field is missing or unknown."""
    cache, tokenizer = corpora.caches[0], corpora.tokenizer
    check_fields(template, set(cache.manifest["metadata_fields"]), cache.manifest["source"]["spec"])
    table = build_metadata_table(cache, tokenizer, template)
    texts = [None if table[d] is None else tokenizer.decode(table[d].tolist()) for d in documents.tolist()]
    return [None if text == UNKNOWN else text for text in texts]


def classes_of(texts: Sequence[str | None], least: int) -> tuple[Int[np.ndarray, " N"], list[str]]:
    """(class of each text, -1 for None and for classes of fewer than `least`; their names, the most frequent first)."""
    counts = Counter(text for text in texts if text is not None)
    names = [name for name, count in counts.most_common() if count >= least]
    numbers = {name: i for i, name in enumerate(names)}
    return np.array([numbers.get(text, -1) for text in texts], np.int64), names


def matched(
    classes: Int[np.ndarray, " N"], lengths: Float[np.ndarray, " N"], bins: int, rng: np.random.Generator
) -> Bool[np.ndarray, " N"]:
    """Choose equally many documents of every class in each of `bins` ranges of length; one bin: only balanced classes."""
    there = classes >= 0
    edges = np.quantile(lengths[there], np.linspace(0, 1, bins + 1)[1:-1]) if there.any() else np.zeros(0)
    place = np.searchsorted(edges, lengths)
    chosen = np.zeros(len(classes), bool)
    for at in range(bins):
        groups = [np.flatnonzero((place == at) & (classes == c)) for c in range(classes.max(initial=-1) + 1)]
        size = min(map(len, groups), default=0)
        for group in groups:
            chosen[rng.permutation(group)[:size]] = True
    return chosen


def opening(corpora: Corpora, metadata: Sequence[int] | None) -> tuple[list[int], list[int]]:
    """(ids before a body, the kind of each: 0 for BOS, 1 and 3 for the delimiters, 2 for metadata); None: no metadata at all."""
    recipe, bos = corpora.config.metadata, [corpora.tokenizer.vocabulary.bos]
    if metadata is None:
        return bos, [0]
    before, after = delimiters(recipe, corpora.tokenizer)
    ids = [*before, *metadata, *after]
    kinds = [1] * len(before) + [2] * len(metadata) + [3] * len(after)
    return (bos + ids, [0, *kinds]) if recipe.bos_eos == "outside" else (ids + bos, [*kinds, 0])


def with_rows(study: Study, openings: Sequence[Sequence[int]], documents: Int[np.ndarray, " N"], longest: int) -> Study:
    """The study on these documents: opening, then body, at most `longest` positions a row; `is_body` marks the body's positions."""
    corpora = study.corpora
    cache, pad = corpora.caches[0], corpora.tokenizer.vocabulary.pad
    width = min(longest, row_capacity(corpora.config))
    rows: list[Row] = []
    for head, document in zip(openings, documents.tolist(), strict=True):
        ids = np.array([*head, *cache[document].tolist()], np.int32)[: width + 1]
        count = len(ids) - 1
        there, body = np.arange(width) < count, np.arange(width) >= len(head)
        row = {name: np.full(width, pad, np.int32) for name in ("tokens", "targets")}
        row["tokens"][:count], row["targets"][:count] = ids[:-1], ids[1:]
        row |= {"is_body": there & body, "is_metadata": there & ~body, "segment_ids": there.astype(np.int32)}
        rows.append(finish(row | {"loss_weights": (there & body).astype(np.float32)}, attend_across_documents=False))
    return replace(study, rows=stack(rows))
