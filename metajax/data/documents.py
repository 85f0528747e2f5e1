"""Documents, the interface of a source of documents, and the train/validation split."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from metajax.core.errors import UserError


@dataclass(frozen=True)
class Document:
    """A text with its metadata and its origin, the unit of the train/validation split: a module, a source package or a site.

    Documents of one origin share boilerplate, so a split by row would put copies of training text into the validation part.
    """

    text: str
    metadata: dict[str, str]
    origin: str


class BadRecord(UserError):
    """A corrupt record; the message names file, record and reason."""


class Source(ABC):
    """A corpus of numbered documents. Sources are picklable, so that other processes can read parts of one."""

    spec: str  # as written in `data.sources`

    @cached_property
    def tally(self) -> Counter[str]:
        """Counts of the documents read so far in this process, such as those without an origin (`metajax.data.sources.files`)."""
        return Counter()

    @abstractmethod
    def __len__(self) -> int:
        """Number of records."""

    @abstractmethod
    def read(self, records: range) -> Iterator[Document | BadRecord]:
        """The documents of these ascending records, in order. A record that cannot be used gives an error with the reason."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest that changes whenever the content may have changed. It is cheap and reads no record."""

    def manifest(self) -> dict[str, Any]:
        """JSON-ready: kind, number of records, files with bytes and sha256. Reads the files completely."""
        kind = self.spec.partition(":")[0]
        return {"kind": kind, "spec": self.spec, "records": len(self), "fingerprint": self.fingerprint()}

    def where(self, record: int) -> str:
        """File and record, for messages."""
        return f"{self.spec}, record {record}"

    def __getitem__(self, record: int) -> Document:
        """One record, for looking at a few. Raises IndexError beyond the end, and BadRecord if it cannot be used."""
        if not 0 <= record < len(self):
            raise IndexError(f"record {record} of {len(self)} in {self.spec}")
        [found] = self.read(range(record, record + 1))
        if isinstance(found, BadRecord):
            raise found
        return found


BUCKETS = 10_000


def origin_bucket(origin: str) -> int:
    """The origin's bucket for the split, int(sha1(origin)) mod BUCKETS: the same on every host and in every run."""
    return int(hashlib.sha1(origin.encode()).hexdigest(), 16) % BUCKETS


def is_validation(origin: str, share: float) -> bool:
    """Whether an origin belongs to the validation part: the buckets below share * BUCKETS.

    A larger share only moves origins out of training. The share of documents differs, because origins differ in size.
    """
    return origin_bucket(origin) < round(share * BUCKETS)
