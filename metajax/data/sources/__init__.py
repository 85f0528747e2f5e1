"""Sources of documents: from a spec KIND[:PATH][?text=COLUMN&origin=COLUMN&join=FOLDER&on=COLUMN&markers=true] to a Source.

A module with `@source(KIND)` defines one kind. To add a source, do the same in a file of `experiments/`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from metajax.core.errors import UserError, nearest, require
from metajax.core.registries import Registry
from metajax.data.cache import read_documents
from metajax.data.documents import Source
from metajax.data.sources.files import JOINED, NO_ORIGIN, Columns, Files, Request
from metajax.data.sources.joined import Joined

_OPTIONS = ("text", "origin", "join", "on", "markers")

source: Registry[Callable[[Request], Source]] = Registry("kind of source", __name__)


def open_source(spec: str, *, cache_dir: Path, data_dir: Path | None) -> Source:
    """The source of a spec; raises UserError for an unknown kind or option, a missing file or an empty corpus."""
    request = parse_spec(spec, cache_dir, data_dir)
    corpus = source.find(request.kind, f"data source {spec!r}")(request)
    if not request.columns.join:
        return corpus
    if not isinstance(corpus, Files):
        raise UserError(f"data source {spec!r}: join= is for files of documents; leave it out")
    return Joined(corpus, request)


def parse_spec(spec: str, cache_dir: Path = Path("cache"), data_dir: Path | None = None) -> Request:
    """Parse a spec; raises UserError for an unknown option."""
    head, _, query = spec.partition("?")
    kind, _, path = head.partition(":")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name, value in options.items():
        known = f"{nearest(name, _OPTIONS)}; known: {', '.join(_OPTIONS)}"
        require(name in _OPTIONS, f"data source {spec!r}: unknown option {name!r}{known}")
        require(bool(value), f"data source {spec!r}: option {name!r} is empty")
    markers = options.pop("markers", "false").lower()
    require(markers in ("true", "false"), f"data source {spec!r}: markers={markers} is neither true nor false")
    return Request(spec, kind, path, Columns(**options, markers=markers == "true"), bool(query), cache_dir, data_dir)


def place_of(manifest: Mapping[str, Any], on_bad_record: str, cache_dir: Path, data_dir: Path | None, document: int) -> str:
    """File and record of a document of a token cache, for messages. The numbers of documents count only good records."""
    corpus = open_source(manifest["source"]["spec"], cache_dir=cache_dir, data_dir=data_dir)
    bad = set(manifest.get("unencodable", ()))
    good = (n for n, found in read_documents(corpus, on_bad_record) if found is not None and n not in bad)
    return corpus.where(next(itertools.islice(good, document, None)))


def source_notes(spec: str, documents: int, tally: Mapping[str, int], ids: str | None = None) -> list[str]:
    """Notes for the user about the documents of a source, one line each. ids: example ids of documents and labels, if joined."""
    lines, of = [], f"of {documents:,} documents"
    if tally.get(NO_ORIGIN):
        lines.append(
            f"{spec}: {tally[NO_ORIGIN]:,} {of} have no origin: no value in a column `origin` or `url`. Each counts as a site of "
            "its own, so that pages of one site may be on both sides of the split; name the column of the site or its address "
            "with ?origin=COLUMN"
        )
    joined = tally.get(JOINED, 0)
    if ids is not None and joined < documents:
        lines.append(f"{spec}: {joined:,} {of} ({joined / documents:.1%}) have labels from join={'' if joined else '; ' + ids}")
    return lines
