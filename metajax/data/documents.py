"""Documents, what a source of documents offers, and which documents are held out."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

from metajax.core.errors import UserError


@dataclass(frozen=True)
class Document:
    """A text with its metadata, and the unit of the train/held-out split that it comes from.

    `origin` is a module, a source package or a site, never the row: documents of one origin share boilerplate, so a
    split by row would put copies of training text into the held-out part.
    """

    text: str
    metadata: dict[str, str]
    origin: str


class BadRecord(UserError):
    """A corrupt record; the message names file, record and reason."""


def place(source: Source, record: int) -> str:
    """File and record of a source's record, as messages name them."""
    where = getattr(source, "where", None)
    return where(record) if where is not None else f"{source.spec}, record {record}"


class Source(Protocol):
    """Random access to documents. Implementations are picklable, so that reader processes can hold them."""

    spec: str

    def __len__(self) -> int:
        """Number of records."""
        ...

    def __getitem__(self, i: int) -> Document:
        """Record i, 0 <= i < len; raises IndexError beyond, BadRecord where the record is corrupt."""
        ...

    def fingerprint(self) -> str:
        """Hex digest that changes whenever the content may have changed; cheap, reads no record."""
        ...

    def manifest(self) -> dict[str, Any]:
        """JSON-ready: kind, versions, number of records, files with bytes and sha256. Reads the files whole."""
        ...


def tally_of(source: Source) -> Counter[str]:
    """What a source has counted of the documents read so far in this process; empty for one that does not count."""
    return getattr(source, "tally", Counter())


BUCKETS = 10_000


def origin_bucket(origin: str) -> int:
    """The origin's place on the split, int(sha1(origin)) mod BUCKETS: the same on every host and in every run."""
    return int(hashlib.sha1(origin.encode()).hexdigest(), 16) % BUCKETS


def is_held_out(origin: str, share: float) -> bool:
    """Whether an origin belongs to the held-out part: the buckets below share * BUCKETS.

    Growing the share only moves origins out of training. The share of documents differs from `share` as origins
    differ in size.
    """
    return origin_bucket(origin) < round(share * BUCKETS)
