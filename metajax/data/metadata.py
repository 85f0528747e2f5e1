"""Document metadata as token ids: templates, delimiters, which documents keep their metadata, and the shuffled control."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from metajax.config import Config, Metadata
from metajax.core.errors import UserError, nearest, require
from metajax.core.sealed import Blocks
from metajax.data.annotators import annotate, parse_field
from metajax.data.encoding import Tokenizer, Vocabulary
from metajax.data.positions import Spot, after, spots

# A doubled brace; {column|filter:format}, the column quoted or not; other text; a character that matches none of these.
_PIECE = re.compile(r'(\{\{|\}\})|\{((?:"(?:[^"]|"")*"|[^"{}|:!]+)(?:\|[^{}|:!]*)*)(?::([^{}]*))?\}|([^{}]+)|(.)', re.DOTALL)


@lru_cache
def _parsed(template: str) -> tuple[tuple[str | None, str], ...]:
    """(None, text) and (field with its filters, format) in order; raises UserError if it does not parse."""
    pieces = []
    for brace, field, form, text, wrong in (found.groups("") for found in _PIECE.finditer(template)):
        if wrong:
            raise UserError(
                f"metadata.template = {template!r}: a brace without its other half, or a field that is none. A field is a column in braces, "
                'such as {url}; a name with one of {}|:!" has to be in double quotes, {"og:title"}; a brace as text is doubled'
            )
        pieces.append((field, form) if field else (None, brace[:1] or text))
    return tuple(pieces)


def template_fields(template: str) -> tuple[str, ...]:
    """The metadata fields of a template, with their filters; raises UserError if it has none or does not parse."""
    pieces = [(field, form) for field, form in _parsed(template) if field is not None]
    require(bool(pieces), f"metadata.template = {template!r} names no field; put one in braces, such as {{url}}")
    try:
        for _, form in pieces:
            format("", form)
    except ValueError as error:
        remedy = 'what follows a colon is a format; a name with a colon has to be in double quotes, such as {"og:title"}'
        raise UserError(f"metadata.template = {template!r}: {error}; {remedy}") from None
    return tuple(field for field, _ in pieces)


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its fields replaced by values."""
    return "".join(form if field is None else format(values[field], form) for field, form in _parsed(template))


def render(template: str, columns: Mapping[str, Sequence[str | None]]) -> list[str | None]:
    """The template filled in for each document; None for a document that lacks a field.

    columns: the columns of `template_columns`, each with a value or None for every document.
    """
    names = dict.fromkeys(template_fields(template))
    rows = zip(*(annotate(name, columns[parse_field(name)[0]]) for name in names), strict=True)
    return [None if None in row else fill(template, dict(zip(names, row, strict=True))) for row in rows]


def template_columns(template: str) -> set[str]:
    """The columns of a corpus that a template reads; raises UserError for an unknown filter."""
    return {parse_field(name)[0] for name in template_fields(template)}


def check_fields(template: str, available: set[str], corpus: str) -> None:
    """Raise UserError if no document of the corpus has a field that the template names."""
    for name in sorted(template_columns(template) - available):
        has = f"it has {', '.join(sorted(available)) or 'none'}"
        raise UserError(f"metadata.template = {template!r}: {corpus} has no field {name!r}{nearest(name, available)}; {has}")


SHUFFLED = 0x5F0F  # makes the shuffle independent of the choice of which documents keep metadata


@dataclass(frozen=True)
class MetadataIds:
    """The metadata ids of every piece of a document, by document.

    ids: int32 [N], the concatenated strings; offsets: int64 [S + 1]; owner: int32 [D], the index of the string that a document
    shows: its own, another document's (shuffled control), a shared one, EMPTY (only delimiters), or NOTHING.
    """

    ids: np.ndarray | Blocks
    offsets: np.ndarray
    owner: np.ndarray
    before: tuple[int, ...]
    after: tuple[int, ...]

    EMPTY, NOTHING = -1, -2

    def __getitem__(self, document: int) -> np.ndarray:
        owner = int(self.owner[document])
        if owner == self.NOTHING:
            return np.zeros(0, np.int32)
        own = self.ids[self.offsets[owner] : self.offsets[owner + 1]] if owner >= 0 else ()
        return np.concatenate([self.before, own, self.after]).astype(np.int32)

    def lengths(self) -> np.ndarray:
        """int64 [D]: metadata tokens of each piece of each document, including delimiters."""
        own = np.diff(self.offsets)[np.maximum(self.owner, 0)] * (self.owner >= 0)
        return np.where(self.owner == self.NOTHING, 0, own + len(self.before) + len(self.after))


@dataclass(frozen=True)
class Placement:
    """All metadata of every piece, in order: where each string is, and its ids by document.

    outside: whether BOS and EOS are outside the metadata (BOS metadata body metadata EOS) or next to the body.
    """

    parts: tuple[tuple[Spot, MetadataIds], ...] = ()
    outside: bool = True

    def overhead(self, documents: np.ndarray) -> np.ndarray:
        """int64 [K]: positions that a piece of each document needs besides its inputs. An EOS before metadata takes one too."""
        total, last = np.zeros((2, len(documents)), np.int64)
        for spot, ids in self.parts:
            lengths = ids.lengths()[documents]
            total += lengths
            last += lengths * (spot.at is after)
        return total + (0 if self.outside else last > 0)


def uniform_hash(seed: int, documents: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each (seed, document), by SplitMix64. It does not depend on the order or the worker."""
    with np.errstate(over="ignore"):
        z = documents.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed) * np.uint64(0xD1B54A32D192ED03)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


def dropped_owner(recipe: Metadata) -> int:
    """What a document with dropped metadata shows: EMPTY or NOTHING. Plain text has no delimiters, so NOTHING."""
    return MetadataIds.EMPTY if recipe.when_dropped == "empty" and recipe.wrap == "special_tokens" else MetadataIds.NOTHING


def owners(
    recipe: Metadata,
    condition: str,
    has_metadata: np.ndarray,
    documents: np.ndarray,
    seed: int,
    strings: np.ndarray | None = None,
) -> np.ndarray:
    """The document whose metadata each document shows: int32 [D], see `MetadataIds.owner`.

    Args:
      condition: "training" (keep or drop by a hash of (seed, document)), or what evaluation shows: "none", "right",
        "empty", "shuffled" (each document shows another one's string, so the set of strings is the same).
      has_metadata: bool [D]; whether the template could be filled in for a document.
      documents: int [K]; the documents in use, in order; others show nothing.
      seed: of this choice; with different seeds, two sources drop their documents independently.
      strings: int [D]; equal for documents with equal metadata, so that shuffling gives each another string. None: all differ.

    In training, `assigned` = "shuffled" permutes the documents at random, and a document may keep its own string by chance.
    Never showing the own string would carry information about it, and a swap of whole groups would only rename them.
    """
    owner = np.full(len(has_metadata), MetadataIds.NOTHING, np.int32)
    if condition == "none" or (condition == "training" and recipe.position == "none"):
        return owner
    dropped = dropped_owner(recipe)
    owner[documents] = np.where(has_metadata[documents], documents, dropped)
    sharing = documents[has_metadata[documents]]
    if condition == "training":
        if recipe.assigned == "shuffled":
            owner[sharing] = sharing[np.argsort(uniform_hash(seed ^ SHUFFLED, sharing), kind="stable")]
        owner[documents[uniform_hash(seed, documents) >= recipe.keep]] = dropped
    elif condition == "empty":
        owner[documents] = MetadataIds.EMPTY
    elif condition == "shuffled":
        problem = "the shuffled control needs two documents with metadata to exchange it and found one"
        require(len(sharing) != 1, f"{problem}; raise evaluation.documents")
        # Sorted by string and rolled by the largest group's size, no document gets its own string, unless one has the majority.
        _, group, sizes = np.unique(sharing if strings is None else strings[sharing], return_inverse=True, return_counts=True)
        grouped = sharing[np.argsort(group, kind="stable")]
        owner[grouped] = np.roll(grouped, max(sizes, default=0))
    return owner


def delimiters(recipe: Metadata, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Delimiter ids before and after a metadata string."""
    vocabulary = tokenizer.vocabulary
    return ((), ()) if recipe.wrap == "plain" else ((vocabulary.context_begin,), (vocabulary.context_end,))


def special_targets(config: Config, vocabulary: Vocabulary) -> set[int]:
    """The special ids that are training targets: the end of a document, and those of metadata that carries a loss."""
    recipe, ids = config.metadata, {vocabulary.eos}
    if recipe is not None and recipe.position != "none" and any(spot.loss_weight for spot in spots(recipe)):
        ids |= set(vocabulary.spare[: recipe.tokens])
        if recipe.wrap == "special_tokens":
            ids |= {vocabulary.context_begin, vocabulary.context_end}
    return ids
