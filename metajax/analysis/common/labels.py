"""Validation documents with labels from their metadata, one in each row, for probes, guidance and attention to metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int

from metajax.analysis.common.study import Study, text_row
from metajax.core.errors import require
from metajax.data.annotators import UNKNOWN
from metajax.data.cache import build_metadata_table
from metajax.data.metadata import check_fields, delimiters
from metajax.data.pipeline import Corpora, row_capacity
from metajax.data.rows import stack


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


def texts_of(corpora: Corpora, template: str, documents: Int[np.ndarray, " N"]) -> list[str | None]:
    """A template's text for each document; None if a field is missing or unknown."""
    cache, tokenizer = corpora.caches[0], corpora.tokenizer
    check_fields(template, set(cache.manifest["metadata_fields"]), cache.manifest["source"]["spec"])
    table = build_metadata_table(cache, tokenizer, template)
    texts = [None if table[d] is None else tokenizer.decode(table[d].tolist()) for d in documents.tolist()]
    return [None if text == UNKNOWN else text for text in texts]


def classes_of(texts: Sequence[str | None], least: int) -> tuple[Int[np.ndarray, " N"], list[str]]:
    """(class of each text, -1 for None and for classes of fewer than `least`; their names, the most frequent first)."""
    names = [name for name, count in Counter(text for text in texts if text is not None).most_common() if count >= least]
    return numbers_of(texts, names), names


def numbers_of(texts: Sequence[str | None], names: Sequence[str]) -> Int[np.ndarray, " N"]:
    """The index of each text in `names`, or -1."""
    numbers = {name: i for i, name in enumerate(names)}
    return np.array([numbers.get(text, -1) for text in texts], np.int64)


def matched(
    classes: Int[np.ndarray, " N"], lengths: Float[np.ndarray, " N"], bins: int, rng: np.random.Generator
) -> Bool[np.ndarray, " N"]:
    """Choose equally many documents of every class in each of `bins` ranges of length; one bin: only balanced classes."""
    known = lengths[classes >= 0]
    edges = np.quantile(known, np.linspace(0, 1, bins + 1)[1:-1]) if len(known) else np.zeros(0)
    bin_of = np.searchsorted(edges, lengths)
    chosen = np.zeros(len(classes), bool)
    for at in range(bins):
        groups = [np.flatnonzero((bin_of == at) & (classes == c)) for c in range(classes.max(initial=-1) + 1)]
        size = min(map(len, groups), default=0)
        for group in groups:
            chosen[rng.permutation(group)[:size]] = True
    return chosen


def opening(corpora: Corpora, metadata: Sequence[int] | None) -> tuple[list[int], list[str]]:
    """(ids before a body, the part of each: bos, begin, metadata or end); None: no metadata at all."""
    recipe, bos = corpora.config.metadata, [corpora.tokenizer.vocabulary.bos]
    if metadata is None:
        return bos, ["bos"]
    before, after = delimiters(recipe, corpora.tokenizer)
    ids = [*before, *metadata, *after]
    parts = ["begin"] * len(before) + ["metadata"] * len(metadata) + ["end"] * len(after)
    return (bos + ids, ["bos", *parts]) if recipe.bos_eos == "outside" else (ids + bos, [*parts, "bos"])


def with_rows(study: Study, openings: Sequence[Sequence[int]], documents: Int[np.ndarray, " N"], longest: int) -> Study:
    """The study on these documents: opening, then body, at most `longest` positions a row; `is_body` marks the body's positions."""
    cache, pad = study.corpora.caches[0], study.corpora.tokenizer.vocabulary.pad
    width = min(longest, row_capacity(study.corpora.config))
    pairs = zip(openings, documents.tolist(), strict=True)
    return replace(study, rows=stack([text_row([*head, *cache[d].tolist()], width, len(head), pad) for head, d in pairs]))
