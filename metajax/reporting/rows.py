"""A training row for people: decoded spans of positions with the same content and target, marked by their loss."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from rich.text import Text

from metajax.core.progress import shown
from metajax.data.encoding import Tokenizer
from metajax.data.rows import Row, RowSource

LEGEND = "blue: metadata   magenta: meta-token   dim: no loss at this position"
COLOURS = {"metadata": "blue", "meta-token": "magenta", "": ""}
PAGE_LETTERS = 1200  # most letters of a row on a run's page


def summary(rows: RowSource) -> str:
    """A source's training rows in one line: their number, where they begin, and how much metadata the documents have."""
    pieces, first = rows.index.pieces, rows.index.offsets[:-1]
    words = f"{len(rows):,} rows, {np.mean(pieces[first, 1] > 0):.1%} begin inside a document"
    lengths = rows.metadata.overhead(np.unique(pieces[:, 0]))
    if lengths.any():
        middle, high = np.percentile(lengths, [50, 95], method="nearest")
        words += f"; metadata tokens a document with delimiters: median {middle}, 95 % within {high}, at most {lengths.max()}"
    return words


@dataclass(frozen=True)
class Span:
    """Neighbouring positions of a row.

    document: number of the document in the row, from 1. holds: "text" or "metadata". asked: the targets (body, metadata, end of
    document, rejected answer or nothing), with the loss weight if it is not 1; if meta-tokens are between, counts of each target.
    pieces: (decoded text, "metadata", "meta-token" or "", whether its positions have no loss).
    """

    document: int
    holds: str
    asked: str
    pieces: tuple[tuple[str, str, bool], ...]

    @property
    def text(self) -> Text:
        """The span as text for the terminal."""
        looks = ((text, COLOURS[kind] + " dim" * silent) for text, kind, silent in self.pieces)
        return Text.assemble(*((shown(text), look) for text, look in looks))

    def __str__(self) -> str:
        return f"{self.document} {self.holds:8} | {self.asked:12} | {self.text.plain}"


def spans(row: Row, tokenizer: Tokenizer) -> list[Span]:
    """The spans of a row in order, without padding."""
    is_meta = row["tokens"] == tokenizer.vocabulary.meta
    asked = _asked(row, tokenizer.vocabulary.eos)
    holds = np.where(row["is_metadata"], "metadata", "text")
    for position in np.flatnonzero(is_meta):  # a meta-token belongs to the text or metadata around it
        holds[position] = holds[position - 1]
    documents = np.cumsum(np.diff(row["segment_ids"], prepend=0) != 0)
    split = asked if "meta_positions" not in row else np.zeros(len(asked), int)
    found = []
    for _, group in groupby(np.flatnonzero(row["segment_ids"] > 0), lambda s: (documents[s], holds[s], split[s])):
        positions = np.array(list(group))
        counts = Counter(asked[positions].tolist())
        words = asked[positions[0]] if len(counts) == 1 else ", ".join(f"{n} {what}" for what, n in counts.items())
        document, what = int(documents[positions[0]]), str(holds[positions[0]])
        found.append(Span(document, what, str(words), _pieces(row, positions, is_meta, tokenizer)))
    return found


def _asked(row: Row, eos: int) -> np.ndarray:
    """The target of each position, as text."""
    weights = row["loss_weights"]
    other = np.where(weights == 0, "nothing", np.where(row["targets"] == eos, "end", "rejected"))
    names = np.where(row["is_body"], "body", np.where(row["asks_metadata"], "metadata", other))
    times = np.array([f"{name} x {w:g}" for name, w in zip(names, weights, strict=True)])
    return np.where((weights == 1) | (names == "nothing"), names, times)


def _pieces(row: Row, positions: np.ndarray, is_meta: np.ndarray, tokenizer: Tokenizer) -> tuple[tuple[str, str, bool], ...]:
    """The decoded positions. Neighbours with the same look are decoded together, so that letters of several tokens stay whole."""
    kind = "metadata" if row["is_metadata"][positions[0]] else ""
    return tuple(
        (tokenizer.decode(row["tokens"][list(part)].tolist()), "meta-token" if meta else kind, bool(silent))
        for (meta, silent), part in groupby(positions, lambda s: (is_meta[s], row["loss_weights"][s] == 0))
    )


def for_page(rows: Any, tokenizer: Tokenizer, count: int) -> list[list[dict[str, Any]]]:
    """The first rows for a run's page: a list of documents with their pieces, up to PAGE_LETTERS letters."""
    found = []
    for n in range(count):
        documents: dict[int, list[Any]] = {}
        left = PAGE_LETTERS
        for span in spans(rows[n], tokenizer):
            for text, kind, silent in span.pieces:
                if left > 0:
                    short = text if len(text) <= left else text[:left] + " ..."
                    documents.setdefault(span.document, []).append([short, kind, silent])
                left -= len(text)
        found.append([{"document": number, "pieces": pieces} for number, pieces in documents.items()])
    return found
