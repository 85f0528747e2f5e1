"""Packing documents into rows using only their lengths. The result is an index of pieces, not tokens.

A document of n body tokens is the sequence BOS, b1 ... bn of n + 1 inputs whose targets are b1 ... bn, EOS. A piece is a
run of those inputs. The target of a piece's last input is the next token of its document, so every body token is predicted
exactly once, wherever rows are cut. Metadata is repeated in every piece of its document; it takes room but replaces no body
tokens. The style "new_document" (MeCo) drops the rest of a row's last document that does not fit.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from metajax.core.errors import UserError

MIN_PIECE = 16  # inputs that a piece with metadata has at least, unless the rest of its document is shorter


@dataclass(frozen=True)
class RowIndex:
    """The pieces of every row.

    pieces: int32 [P, 3], columns document, start, length, in inputs of the document (input 0 is its BOS).
    offsets: int64 [R + 1]; row r holds pieces offsets[r] : offsets[r + 1].
    """

    pieces: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, n: int) -> np.ndarray:
        """The pieces of row n, int32 [k, 3]."""
        return self.pieces[self.offsets[n] : self.offsets[n + 1]]


def pack(
    documents: np.ndarray, inputs: np.ndarray, overhead: np.ndarray, capacity: int, style: str, where: Callable[[int], str] = str
) -> RowIndex:
    """Pack `documents` (ids, in order) with `inputs` and `overhead` tokens each into rows of `capacity` tokens.

    Args:
      documents: int [D]; ids written to the index.
      inputs: int [D]; body length + 1 of each document.
      overhead: int [D]; metadata tokens in every piece of a document, including delimiters.
      capacity: tokens of a row.
      style: "concat" fills each row to its end and cuts documents there; "best_fit" cuts only documents longer than a
        row and places each piece in the fullest row that has room (best-fit decreasing); "new_document" begins every row
        with a new document and drops the rest of a document that the row's end cuts.
      where: document id -> its name in an error.

    Raises:
      UserError: metadata leaves no room for body tokens in a row.
    """
    if len(documents) and int(overhead.max()) > most_overhead(capacity):
        worst = int(np.argmax(overhead))
        raise UserError(
            f"document {where(int(documents[worst]))}: {int(overhead[worst])} metadata tokens, which leaves no room for the body in a row "
            f"of {capacity}; choose a shorter metadata.template or a larger data.sequence_length, or metadata.too_long=drop"
        )
    styles = {"concat": _concat, "best_fit": _best_fit, "new_document": _new_document}
    return styles[style](documents, inputs, overhead, capacity)


def most_overhead(capacity: int) -> int:
    """The most metadata tokens that leave room in a row for a piece of MIN_PIECE inputs."""
    return max(0, capacity - MIN_PIECE)


def _concat(documents: np.ndarray, inputs: np.ndarray, overhead: np.ndarray, capacity: int) -> RowIndex:
    pieces: list[tuple[int, int, int]] = []
    offsets, used = [0], 0
    for document, total, extra in zip(documents.tolist(), inputs.tolist(), overhead.tolist(), strict=True):
        start = 0
        while start < total:
            room = capacity - used - extra
            if room < min(MIN_PIECE if extra else 1, total - start):
                offsets.append(len(pieces))
                used = 0
                continue
            length = min(room, total - start)
            pieces.append((document, start, length))
            start += length
            used += extra + length
            if used == capacity:
                offsets.append(len(pieces))
                used = 0
    if used:
        offsets.append(len(pieces))
    return RowIndex(np.array(pieces, np.int32).reshape(-1, 3), np.array(offsets, np.int64))


def _new_document(documents: np.ndarray, inputs: np.ndarray, overhead: np.ndarray, capacity: int) -> RowIndex:
    pieces: list[tuple[int, int, int]] = []
    offsets, used = [0], 0
    for document, total, extra in zip(documents.tolist(), inputs.tolist(), overhead.tolist(), strict=True):
        if used and capacity - used - extra < min(MIN_PIECE if extra else 1, total):
            offsets.append(len(pieces))
            used = 0
        length = min(capacity - used - extra, total)
        pieces.append((document, 0, length))
        used += extra + length
    if used:
        offsets.append(len(pieces))
    return RowIndex(np.array(pieces, np.int32).reshape(-1, 3), np.array(offsets, np.int64))


def _best_fit(documents: np.ndarray, inputs: np.ndarray, overhead: np.ndarray, capacity: int) -> RowIndex:
    room = capacity - overhead
    full = inputs // room
    rows: list[list[tuple[int, int, int]]] = []
    for document, chunks, length in zip(documents.tolist(), full.tolist(), room.tolist(), strict=True):
        rows.extend([(document, chunk * length, length)] for chunk in range(chunks))
    rest = inputs - full * room
    size = np.where(rest > 0, rest + overhead, 0)
    order = np.argsort(-size, kind="stable")
    open_rows: dict[int, list[int]] = {}  # room left -> rows with exactly that much
    levels: list[int] = []  # its keys, sorted
    for i in order[: int((size > 0).sum())].tolist():
        need = int(size[i])
        at = bisect.bisect_left(levels, need)
        if at < len(levels):
            left = levels[at]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del open_rows[left], levels[at]
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append((int(documents[i]), int(full[i] * room[i]), int(rest[i])))
        if left - need not in open_rows:
            bisect.insort(levels, left - need)
        open_rows.setdefault(left - need, []).append(row)
    lengths = [len(row) for row in rows]
    pieces = [piece for row in rows for piece in row]
    return RowIndex(np.array(pieces, np.int32).reshape(-1, 3), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
