"""Assembling one row from its pieces: tokens, targets, loss weights, segments - all decided here.

Row anatomy (every array has one entry a slot; `finish` adds positions):
  tokens        int32    what the model reads
  targets       int32    what it is asked for at this slot
  loss_weights  float32  weight of that question in the training loss; 0 on padding
  is_body       bool     the target is a token of a document's body (what bits per byte counts)
  is_metadata   bool     the slot holds metadata or one of its delimiters (for counting and for `show --rows`)
  asks_metadata bool     the target is such a token
  segment_ids   int32    documents of the row numbered from 1; 0 is padding
  positions     int32    index inside the segment
  meta_slots    int32    [M], where the meta-tokens are, sorted; absent without injection
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from metajax.data.encoding import Vocabulary
from metajax.data.metadata import Sides
from metajax.data.packing import RowIndex

Row = dict[str, np.ndarray]
BEGIN, FRONT, BODY, BEHIND, END, NOTHING = range(6)  # what a slot holds, and what it is asked for


class RowSource:
    """Random access to assembled rows, for `grain.MapDataset.source`.

    Args:
      index: which pieces make which row.
      read: document id -> its body ids.
      metadata: what stands beside every piece of a document.
      vocabulary: special ids.
      capacity: slots of a row before meta-tokens are injected.
    """

    def __init__(
        self, index: RowIndex, read: Callable[[int], np.ndarray], metadata: Sides, vocabulary: Vocabulary, capacity: int
    ):
        self.index, self.read, self.metadata, self.vocabulary, self.capacity = index, read, metadata, vocabulary, capacity
        front, behind = metadata.loss_weights
        self._weights = np.array([0.0, front, 1.0, behind, 1.0, 0.0], np.float32)  # of BEGIN .. NOTHING as a target

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, n: Any) -> Row:
        row: Row = {
            "tokens": np.full(self.capacity, self.vocabulary.pad, np.int32),
            "targets": np.full(self.capacity, self.vocabulary.pad, np.int32),
            "loss_weights": np.zeros(self.capacity, np.float32),
            "is_body": np.zeros(self.capacity, bool),
            "is_metadata": np.zeros(self.capacity, bool),
            "asks_metadata": np.zeros(self.capacity, bool),
            "segment_ids": np.zeros(self.capacity, np.int32),
        }
        at = 0
        for segment, (document, start, length) in enumerate(self.index.row(int(n)).tolist(), 1):
            piece = self._piece(document, start, length)
            end = at + len(piece["tokens"])
            for name, values in piece.items():
                row[name][at:end] = values
            row["segment_ids"][at:end] = segment
            at = end
        return row

    def _piece(self, document: int, start: int, length: int) -> Row:
        """Inputs start .. start + length - 1 of a document between its metadata; input 0 is the BOS.

        Every slot is asked for the next one, with two exceptions where a document is cut. In front of a later piece the last
        metadata token asks nothing: the piece before has asked for the first body token already. The last body token of a
        piece that goes on asks for that token, so that no body token is lost or depends on metadata behind the text; the
        metadata behind it is asked for from its second token on.
        """
        body, (front, behind) = self.read(document), self.metadata.ids(document)
        begins, ends = start == 0, start + length > len(body)
        inside = body[max(start, 1) - 1 : start + length - 1]
        bos, eos = ([self.vocabulary.bos] * begins, BEGIN), ([self.vocabulary.eos] * ends, END)
        if self.metadata.outside:
            parts = [bos, (front, FRONT), (inside, BODY), (behind, BEHIND), eos]
        else:
            parts = [(front, FRONT), bos, (inside, BODY), eos, (behind, BEHIND)]
        stream = np.concatenate([*(ids for ids, _ in parts), [self.vocabulary.pad]]).astype(np.int32)
        kinds = np.repeat([*(kind for _, kind in parts), NOTHING], [*(len(ids) for ids, _ in parts), 1])
        stream, targets, kinds, asked = stream[:-1], stream[1:].copy(), kinds[:-1], kinds[1:].copy()
        if not ends:
            last = len(stream) - len(behind) - 1
            targets[last], asked[last] = body[start + length - 1], BODY
        if not begins and len(front):
            asked[len(front) - 1] = NOTHING
        if kinds[-1] == END:  # a target alone
            stream, kinds, targets, asked = stream[:-1], kinds[:-1], targets[:-1], asked[:-1]
        return {
            "tokens": stream,
            "targets": targets,
            "loss_weights": self._weights[asked],
            "is_body": asked == BODY,
            "is_metadata": (kinds == FRONT) | (kinds == BEHIND),
            "asks_metadata": (asked == FRONT) | (asked == BEHIND),
        }


def finish(row: Row, *, attend_across_documents: bool) -> Row:
    """Add positions (index inside the segment); with attention across documents the row is one segment."""
    segments = row["segment_ids"]
    if attend_across_documents:
        segments = (segments > 0).astype(np.int32)
    starts = np.flatnonzero(np.diff(segments, prepend=-1))
    lengths = np.diff(np.append(starts, len(segments)))
    positions = np.arange(len(segments)) - np.repeat(starts, lengths)
    return row | {"segment_ids": segments, "positions": positions.astype(np.int32)}


def padding_row(like: Row, pad: int) -> Row:
    """A row of padding with the shapes of `like`: fills up the last evaluation batch."""
    empty = {name: np.zeros_like(values) for name, values in like.items()}
    empty["tokens"][:], empty["targets"][:] = pad, pad
    if "meta_slots" in like:
        empty["meta_slots"] = like["meta_slots"].copy()
    return empty


def stack(rows: Sequence[Row]) -> Row:
    """Rows as one batch: every array gains a leading axis."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
