"""The information in metadata fields: their entropies, their mutual information, and their information about words.

The information about words is measured on documents from other origins than the counted ones. Their words are coded with word
frequencies of documents with the same value, shrunk towards those of all documents, and the saved bits are counted. This is a
lower estimate of the mutual information of the field and one word; over a text it does not add up, because words are redundant.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.metrics import mutual_info_score

from metajax.data.annotators import Column, field_of
from metajax.data.documents import BUCKETS, BadRecord, Document, Source, origin_bucket
from metajax.data.metadata import render, template_columns, template_fields
from metajax.data.sources import source_notes
from metajax.data.sources.files import NO_TEXT
from metajax.data.sources.joined import Joined

SAMPLE = 200_000  # documents of a larger corpus that are read, evenly spaced
_COLUMNS = 200  # most columns looked at: those that most documents have
URL_PARTS = ("scheme", "host", "domain", "tld", "path")
_SHRINK = tuple(10.0**n for n in range(1, 8))  # pseudo-counts: words of all documents mixed into those of a value
_RARE = 5  # words counted fewer times are one class
_COUNTED, _CHOOSING, _MEASURED = range(3)  # 70, 10 and 20 % of the origins
_PAIRS = 10  # most fields in the table of pairs


@dataclass(frozen=True)
class Field:
    """One field over the documents: number of documents with it, distinct values, entropy in bits, most frequent values.

    bits_a_word: bits saved per word in coding documents of other origins; None if no such document has the field.
    """

    name: str
    documents: int
    distinct: int
    entropy: float
    common: list[tuple[str, int]]
    bits_a_word: float | None


@dataclass(frozen=True)
class Survey:
    """A corpus or an evenly spaced sample of it: sizes of texts in bytes, origins, fields, and information of pairs of fields.

    notes: further remarks, a line each.
    pairs: [N][N] mutual information in bits over documents that have both fields, with entropy on the diagonal. `paired` names
    the N fields: those with two or more documents per value on average, since a unique value determines every other field.
    """

    every: int
    documents: list[Document]
    sizes: np.ndarray
    origins: int
    fields: list[Field]
    paired: list[str]
    pairs: list[list[float]]
    notes: list[str]


def survey(source: Source, more: Sequence[str] = ()) -> Survey:
    """Survey a corpus. `more`: templates to survey besides its own columns, such as {url|host|top100}.

    Columns that hold addresses are also surveyed by their parts.
    """
    every = -(-len(source) // SAMPLE)
    documents, notes = _readable(source, range(0, len(source), every))
    coverage = Counter(name for d in documents for name in d.metadata)
    if len(coverage) > _COLUMNS:
        notes.append(f"{len(coverage):,} columns; here are the {_COLUMNS} that most documents have")
    shown = sorted(dict(coverage.most_common(_COLUMNS)))
    named = (name for template in more for name in template_columns(template))
    columns = {name: [d.metadata.get(name) for d in documents] for name in dict.fromkeys([*shown, *named])}
    templates = [f"{{{field_of(name)}}}" for name in shown]
    templates += [f"{{{field_of(name)}|{part}}}" for name in shown if _is_url(columns[name]) for part in URL_PARTS]
    words = Words(documents)
    fields, numbers = [], {}
    for template in dict.fromkeys([*templates, *more]):
        values = render(template, columns)
        name = template[1:-1] if f"{{{template_fields(template)[0]}}}" == template else template
        known, numbers[name] = Counter(value for value in values if value is not None), number_values(values)
        bits = words.bits_saved(numbers[name])
        fields.append(Field(name, known.total(), len(known), entropy(numbers[name]), known.most_common(3), bits))
    paired = [f.name for f in fields if 1 < f.distinct <= f.documents / 2][:_PAIRS]
    pairs = [[mutual_information(numbers[a], numbers[b]) for b in paired] for a in paired]
    sizes = np.array([len(d.text.encode()) for d in documents])
    return Survey(every, documents, sizes, len({d.origin for d in documents}), fields, paired, pairs, notes)


def _readable(source: Source, records: range) -> tuple[list[Document], list[str]]:
    """(the documents, remarks on them and on unreadable records); BadRecord if no record can be read."""
    found = list(source.read(records))
    documents = [document for document in found if isinstance(document, Document)]
    first = next((document for document in found if isinstance(document, BadRecord)), None)
    if not documents:
        raise first
    bad = len(records) - len(documents)
    notes = [f"{bad:,} of {len(records):,} records cannot be read, first {first}"] if bad else []
    tally = Counter(source.tally)
    notes += source_notes(source.spec, len(documents), tally, source.ids() if isinstance(source, Joined) else None)
    left_out = {name.removeprefix(NO_TEXT): count for name, count in tally.items() if name.startswith(NO_TEXT) and count}
    notes += [f"column {name!r}: {count:,} values cannot be text and are left out" for name, count in left_out.items()]
    return documents, notes


def _is_url(column: Column) -> bool:
    values = [value for value in column if value is not None]
    return sum("://" in value[:10] for value in values) > len(values) / 2


def number_values(values: Column) -> np.ndarray:
    """int64 [D]: equal numbers for equal values, -1 for a missing value."""
    numbers: dict[str | None, int] = {None: -1}
    return np.array([numbers.setdefault(value, len(numbers) - 1) for value in values], np.int64)


def entropy(numbers: np.ndarray) -> float:
    """Entropy in bits of the values' frequencies among the documents that have one."""
    counts = np.unique(numbers[numbers >= 0], return_counts=True)[1]
    return float(stats.entropy(counts, base=2)) if len(counts) else 0.0


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information of two fields in bits, from the frequencies over the documents that have both."""
    both = (a >= 0) & (b >= 0)
    return float(mutual_info_score(a[both], b[both]) / np.log(2)) if both.any() else 0.0


class Words:
    """The words of documents as numbers, and the part of the measurement that each document's origin belongs to."""

    def __init__(self, documents: Sequence[Document]):
        numbers: dict[str, int] = {}
        of = [[numbers.setdefault(w, len(numbers)) for w in re.findall(r"\w+", d.text.lower())] for d in documents]
        self.distinct = len(numbers)
        self.words = np.array([w for own in of for w in own], np.int64)
        self.document = np.repeat(np.arange(len(of)), [len(own) for own in of])
        share = np.array([origin_bucket(d.origin) / BUCKETS for d in documents])
        self.part = np.where(share < 0.2, _MEASURED, np.where(share < 0.3, _CHOOSING, _COUNTED))

    def bits_saved(self, values: np.ndarray) -> float | None:
        """Bits per word saved by knowing `values` (int64 [D], -1 for none) on documents that were not counted."""
        value, part = values[self.document], self.part[self.document]
        counted, choosing, measured = ((value >= 0) & (part == one) for one in (_COUNTED, _CHOOSING, _MEASURED))
        if not counted.any() or not measured.any():
            return None
        counts = np.bincount(self.words[counted], minlength=self.distinct)
        words = np.where(counts[self.words] >= _RARE, self.words, self.distinct)
        everywhere = np.bincount(words[counted], minlength=self.distinct + 1) / counted.sum()
        of_value = np.bincount(value[counted], minlength=values.max() + 1)
        keys = value * (self.distinct + 1) + words
        pairs, together = np.unique(keys[counted], return_counts=True)

        def saved(chosen: np.ndarray, shrink: float) -> float:
            """Total bits saved on the chosen words."""
            at = np.minimum(np.searchsorted(pairs, keys[chosen]), len(pairs) - 1)
            count = np.where(pairs[at] == keys[chosen], together[at], 0)
            plain = np.maximum(everywhere[words[chosen]], 1 / counted.sum())  # if no rare word was counted, assume one
            return float(np.log2((count / plain + shrink) / (of_value[value[chosen]] + shrink)).sum())

        best = max(_SHRINK, key=lambda shrink: saved(choosing, shrink))
        return saved(measured, best) / int(measured.sum())
