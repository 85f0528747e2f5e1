"""Rows of answer pairs for DPO: both answers of a pair are in one row, as two segments with the same prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from metajax.core.errors import UserError, nearest, require
from metajax.data.annotators import field_of
from metajax.data.cache import MetadataTable, TokenCache, build_metadata_table
from metajax.data.encoding import Tokenizer
from metajax.data.metadata import Placement
from metajax.data.packing import RowIndex, Where, pack
from metajax.data.rows import Row, RowSource


@dataclass(frozen=True)
class Answers:
    """Ids of an answer: number 2d is the chosen answer of document d, 2d + 1 the rejected one."""

    chosen: TokenCache
    rejected: MetadataTable

    def __call__(self, answer: int) -> np.ndarray:
        return self.rejected.ids_of(answer // 2) if answer % 2 else self.chosen[answer // 2]


class PairRows(RowSource):
    """Rows whose segments alternate between chosen and rejected answers. Bits per byte counts only chosen ones as body."""

    def __getitem__(self, index: int) -> Row:
        row = super().__getitem__(index)
        return row | {"is_body": row["is_body"] & (row["segment_ids"] % 2 == 1)}


def pair_rows(
    column: str, tokenizer: Tokenizer, cache: TokenCache, placement: Placement, documents: np.ndarray, capacity: int, where: Where
) -> PairRows:
    """The pairs of `documents` (ids, in order), packed best-fit. Their prompts are the metadata of `placement`.

    Args:
      column: of the rejected answer. where: document id -> its file and record, for errors.

    Raises:
      UserError: a record lacks one of the three texts, or is longer than a row of `capacity` positions.
    """
    known, spec = cache.manifest["metadata_fields"], cache.manifest["source"]["spec"]
    problem = f"{spec} has no such column{nearest(column, known)}; it has {', '.join(known)}"
    require(column in known, f"dpo.rejected = {column!r}: {problem}")
    rejected = build_metadata_table(cache, tokenizer, f"{{{field_of(column)}}}")
    inputs = np.stack([cache.lengths, np.diff(rejected.offsets)], axis=1).astype(np.int64) + 1
    needed = inputs[documents].sum(axis=1) + 2 * placement.overhead(documents)
    [(spot, prompts)] = placement.parts
    wrong = {
        "no prompt (metadata.template)": prompts.owner[documents] < 0,
        "no chosen answer": inputs[documents, 0] == 1,
        f"no rejected answer ({column!r})": inputs[documents, 1] == 1,
    }
    wrong[f"its two answers with their prompts take more than the {capacity} positions of a row (data.sequence_length)"] = (
        needed > capacity
    )
    for reason, found in wrong.items():
        if found.any():
            raise UserError(f"{where(int(documents[found].min()))}: {reason}; so are {found.sum()} of {len(found)} records")
    index = pack(documents, needed, np.zeros_like(needed), capacity, "best_fit")
    pairs = index.pieces[:, :1]
    halves = np.stack([2 * pairs + [0, 1], np.zeros((len(pairs), 2)), inputs[pairs[:, 0]]], axis=-1)
    index = RowIndex(halves.reshape(-1, 3).astype(np.int32), 2 * index.offsets)
    both = replace(placement, parts=((spot, replace(prompts, owner=np.repeat(prompts.owner, 2))),))
    return PairRows(index, Answers(cache, rejected), both, tokenizer.vocabulary, capacity)
