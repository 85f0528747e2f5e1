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
Pieces = list[tuple[int, int, int]]
Where = Callable[[int], str]  # a document id -> its name in an error


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
    documents: np.ndarray, inputs: np.ndarray, overhead: np.ndarray, capacity: int, style: str, where: Where = str
) -> RowIndex:
    """Pack `documents` into rows of `capacity` tokens.

    Args:
      documents: int [D]; ids written to the index, in order.
      inputs: int [D]; body length + 1 of each document.
      overhead: int [D]; metadata tokens in every piece of a document, including delimiters.
      style: "concat" fills each row to its end and cuts documents there; "best_fit" cuts only documents longer than a
        row and places each piece in the fullest row that has room (best-fit decreasing); "new_document" begins every row
        with a new document and drops the rest of a document that the row's end cuts.

    Raises:
      UserError: metadata leaves no room for body tokens in a row.
    """
    if len(documents) and int(overhead.max()) > most_overhead(capacity):
        worst = int(np.argmax(overhead))
        raise UserError(
            f"document {where(int(documents[worst]))}: {int(overhead[worst])} metadata tokens, which leaves no room for the body in a row "
            f"of {capacity}; choose a shorter metadata.template or a larger data.sequence_length, or metadata.too_long=drop"
        )
    if style == "best_fit":
        rows = _best_fit(documents, inputs, overhead, capacity)
    else:
        rows = _in_order(documents, inputs, overhead, capacity, drops_rest=style == "new_document")
    pieces = np.array([piece for row in rows for piece in row], np.int32).reshape(-1, 3)
    return RowIndex(pieces, np.cumsum([0, *map(len, rows)], dtype=np.int64))


def most_overhead(capacity: int) -> int:
    """The most metadata tokens that leave room in a row for a piece of MIN_PIECE inputs."""
    return max(0, capacity - MIN_PIECE)


def _in_order(documents: np.ndarray, inputs: np.ndarray, overhead: np.ndarray, capacity: int, drops_rest: bool) -> list[Pieces]:
    rows: list[Pieces] = []
    used = capacity
    for document, total, extra in zip(documents.tolist(), inputs.tolist(), overhead.tolist(), strict=True):
        start = 0
        while start < total:
            room, rest = capacity - used - extra, total - start
            if room < min(MIN_PIECE if extra else 1, rest):
                rows.append([])
                used = 0
                continue
            length = min(room, rest)
            rows[-1].append((document, start, length))
            used += extra + length
            start = total if drops_rest else start + length
    return rows


def _best_fit(documents: np.ndarray, inputs: np.ndarray, overhead: np.ndarray, capacity: int) -> list[Pieces]:
    room = capacity - overhead
    full = inputs // room
    rows: list[Pieces] = []
    for document, chunks, length in zip(documents.tolist(), full.tolist(), room.tolist(), strict=True):
        rows.extend([(document, chunk * length, length)] for chunk in range(chunks))
    rest = inputs - full * room
    size = np.where(rest > 0, rest + overhead, 0)
    open_rows: dict[int, list[int]] = {}  # room left -> rows with exactly that much
    levels: list[int] = []  # its keys, sorted
    for i in np.argsort(-size, kind="stable")[: np.count_nonzero(size)].tolist():
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
    return rows
