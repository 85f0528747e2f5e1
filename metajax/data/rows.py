"""Assembles one row from its pieces. All tokens, targets, loss weights and segments are decided here.

Arrays of a row (each has one entry per position; `finish` adds `positions`):
  tokens        int32    what the model reads
  targets       int32    the token to predict at this position
  loss_weights  float32  weight of that target in the training loss; 0 on padding
  is_body       bool     the target is a token of a document's body (bits per byte counts these)
  is_metadata   bool     the position holds metadata or one of its delimiters (for counting and for `show --rows`)
  asks_metadata bool     the target is metadata or one of its delimiters
  segment_ids   int32    documents of the row numbered from 1; 0 is padding
  positions     int32    index inside the segment
  meta_positions int32   [M], sorted positions of the meta-tokens; absent without injection
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from metajax.data.encoding import Vocabulary
from metajax.data.metadata import Placement
from metajax.data.packing import RowIndex
from metajax.data.positions import after, before

Row = dict[str, np.ndarray]
BEGIN, BODY, END, NOTHING, METADATA = range(5)  # kinds of positions and targets; METADATA + i is part i of the metadata
KINDS = dict.fromkeys(("is_body", "is_metadata", "asks_metadata"), bool)
KINDS |= {"tokens": np.int32, "targets": np.int32, "loss_weights": np.float32, "segment_ids": np.int32}


@dataclass(frozen=True)
class RowSource:
    """Random access to assembled rows, for `grain.MapDataset.source`.

    read: document id -> its body ids. capacity: positions of a row before meta-tokens are injected.
    """

    index: RowIndex
    read: Callable[[int], np.ndarray]
    metadata: Placement
    vocabulary: Vocabulary
    capacity: int

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Row:
        pieces = [self._piece(*piece) for piece in self.index.row(int(index)).tolist()]
        return joined(pieces, self.capacity, self.vocabulary.pad)

    def _piece(self, document: int, start: int, length: int) -> Row:
        """Inputs start .. start + length - 1 of a document with its metadata; input 0 is the BOS.

        The target of every position is the next token, with two exceptions if a document is cut. First, the last metadata token
        before a later piece has no target: the previous piece has already predicted that piece's first body token. Second, the
        last body token of a piece whose document continues predicts the next body token. So no body token is lost or predicted
        from metadata after the text. The loss on the metadata after it is then taken from its second token on.
        """
        body, metadata = self.read(document), self.metadata
        begins, ends = start == 0, start + length > len(body)
        inside = body[max(start, 1) - 1 : start + length - 1]
        first, last, parts, cut, lead = [], [], [], 0, 0
        for kind, (spot, of_documents) in enumerate(metadata.parts, METADATA):
            ids = of_documents[document]
            if spot.at is before or spot.at is after:
                (first if spot.at is before else last).append((ids, kind))
                continue
            at = spot.at(len(inside))
            parts += [(inside[cut:at], BODY), (ids, kind)]
            cut, lead = at, lead + len(ids) * (at == 0)
        parts.append((inside[cut:], BODY))
        bos, eos = ([self.vocabulary.bos] * begins, BEGIN), ([self.vocabulary.eos] * ends, END)
        parts = [bos, *first, *parts, *last, eos] if metadata.outside else [*first, bos, *parts, eos, *last]
        stream = np.concatenate([*(ids for ids, _ in parts), [self.vocabulary.pad]]).astype(np.int32)
        kinds = np.repeat([*(kind for _, kind in parts), NOTHING], [*(len(ids) for ids, _ in parts), 1])
        stream, targets, kinds, asked = stream[:-1], stream[1:].copy(), kinds[:-1], kinds[1:].copy()
        if not ends:
            at = len(stream) - sum(len(ids) for ids, _ in last) - 1
            targets[at], asked[at] = body[start + length - 1], BODY
        lead += sum(len(ids) for ids, _ in first)
        if not begins and lead:
            asked[lead - 1] = NOTHING
        if kinds[-1] == END:  # EOS is only a target
            stream, kinds, targets, asked = stream[:-1], kinds[:-1], targets[:-1], asked[:-1]
        weights = np.array([0.0, 1.0, 1.0, 0.0, *(spot.loss_weight for spot, _ in metadata.parts)], np.float32)
        made = {"tokens": stream, "targets": targets, "loss_weights": weights[asked], "is_body": asked == BODY}
        return made | {"is_metadata": kinds >= METADATA, "asks_metadata": asked >= METADATA}


def joined(pieces: Sequence[Row], length: int, pad: int) -> Row:
    """A row whose segments are the pieces in order, followed by padding. Arrays that a piece lacks are 0."""
    row = {name: np.full(length, pad if name in ("tokens", "targets") else 0, kind) for name, kind in KINDS.items()}
    at = 0
    for segment, piece in enumerate(pieces, 1):
        end = at + len(piece["tokens"])
        for name, values in piece.items():
            row[name][at:end] = values
        row["segment_ids"][at:end] = segment
        at = end
    return row


def finish(row: Row, *, attend_across_documents: bool) -> Row:
    """Add positions (index inside the segment). With attention across documents, the row is one segment."""
    segments = row["segment_ids"]
    if attend_across_documents:
        segments = (segments > 0).astype(np.int32)
    starts = np.flatnonzero(np.diff(segments, prepend=-1))
    lengths = np.diff(np.append(starts, len(segments)))
    positions = np.arange(len(segments)) - np.repeat(starts, lengths)
    return row | {"segment_ids": segments, "positions": positions.astype(np.int32)}


def padding_row(like: Row, pad: int) -> Row:
    """A row of padding with the shapes of `like`, to fill up the last evaluation batch."""
    empty = {name: np.zeros_like(values) for name, values in like.items()}
    empty["tokens"][:], empty["targets"][:] = pad, pad
    return empty | {name: like[name] for name in like.keys() & {"meta_positions"}}


def stack(rows: Sequence[Row]) -> Row:
    """Rows as one batch: every array gains a leading axis."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def batches(rows: Sequence[Row], size: int, pad: int) -> list[Row]:
    """All rows in batches of `size`; padding rows fill the last one."""
    rows = [*rows, *[padding_row(rows[0], pad)] * (-len(rows) % size)]
    return [stack(rows[n : n + size]) for n in range(0, len(rows), size)]
