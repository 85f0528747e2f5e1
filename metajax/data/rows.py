"""Assembling one row from its pieces: tokens, targets, loss weights, segments - all decided here.

Row anatomy (every array has one entry a slot; `finish` adds positions):
  tokens        int32    what the model reads
  targets       int32    what it is asked for at this slot
  loss_weights  float32  weight of that question in the training loss; 0 on padding
  is_body       bool     the target is a token of a document's body (what bits per byte counts)
  is_metadata   bool     the slot holds metadata or one of its delimiters (for counting and for `show --rows`)
  segment_ids   int32    documents of the row numbered from 1; 0 is padding
  positions     int32    index inside the segment
  meta_slots    int32    [M], where the meta-tokens are, sorted; absent without injection
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from metajax.data.metadata import MetadataIds
from metajax.data.packing import RowIndex
from metajax.data.tokenizers import Vocabulary

Row = dict[str, np.ndarray]


class RowSource:
    """Random access to assembled rows, for `grain.MapDataset.source`.

    Args:
      index: which pieces make which row.
      read: document id -> its body ids.
      metadata: the ids in front of every piece of a document; None for none.
      vocabulary: special ids.
      capacity: slots of a row before meta-tokens are injected.
      metadata_loss_weight: weight of predicting metadata tokens.
    """

    def __init__(
        self,
        index: RowIndex,
        read: Callable[[int], np.ndarray],
        metadata: MetadataIds | None,
        vocabulary: Vocabulary,
        capacity: int,
        metadata_loss_weight: float = 0.0,
    ):
        self.index, self.read, self.metadata = index, read, metadata
        self.vocabulary, self.capacity, self.metadata_loss_weight = vocabulary, capacity, metadata_loss_weight

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, n: Any) -> Row:
        row: Row = {
            "tokens": np.full(self.capacity, self.vocabulary.pad, np.int32),
            "targets": np.full(self.capacity, self.vocabulary.pad, np.int32),
            "loss_weights": np.zeros(self.capacity, np.float32),
            "is_body": np.zeros(self.capacity, bool),
            "is_metadata": np.zeros(self.capacity, bool),
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
        """Inputs start : start + length of a document, its metadata after the BOS or in front of a later piece."""
        vocabulary, body = self.vocabulary, self.read(document)
        # Inputs start .. start + length and one more, for the targets: BOS is input 0, EOS the target after the last token.
        inside = body[max(start - 1, 0) : start + length]
        before, after = [vocabulary.bos][: start == 0], [vocabulary.eos][: start + length > len(body)]
        sequence = np.concatenate([before, inside, after]).astype(np.int32)
        tokens, targets = sequence[:-1], sequence[1:]
        weights = np.ones(length, np.float32)
        is_body = np.arange(start, start + length) < len(body)  # the target after the last body token is EOS
        meta = self.metadata[document] if self.metadata is not None else np.zeros(0, np.int32)
        if not len(meta):
            plain = np.zeros(length, bool)
            return {"tokens": tokens, "targets": targets, "loss_weights": weights, "is_body": is_body, "is_metadata": plain}
        # Metadata goes behind a BOS, whose question (the first body token) moves to the last metadata token. In front
        # of a later piece that token asks nothing: the piece before has asked for its first token already.
        head = 1 if start == 0 else 0
        last = (targets[0], weights[0], is_body[0]) if head else (tokens[0], 0.0, False)
        asked = np.full(len(meta) - 1 + head, self.metadata_loss_weight, np.float32)
        return {
            "tokens": np.concatenate([tokens[:head], meta, tokens[head:]]),
            "targets": np.concatenate([meta if head else meta[1:], [last[0]], targets[head:]]),
            "loss_weights": np.concatenate([asked, np.array([last[1]], np.float32), weights[head:]]),
            "is_body": np.concatenate([np.zeros(len(asked), bool), [last[2]], is_body[head:]]),
            "is_metadata": np.repeat([False, True, False], [head, len(meta), length - head]),
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
