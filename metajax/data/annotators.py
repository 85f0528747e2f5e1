"""Filters behind a metadata field: {url|host}, {score|tenths}, {url|host|top1000}. What a template shows is a column and its filters.

A filter maps the values of a whole column, None where a document has none; one that cannot be applied to a value gives None. The
papers' names clash, so here each part of an address has one name:

  scheme    https://                       "prefix" in Beyond URLs
  host      www.example.co.uk:80           "domain" in Beyond URLs, the default in MeCo
  domain    example.co.uk                  the registered domain, by tldextract's bundled list; the host where there is none
  tld       co.uk                          "URL suffix" in MeCo
  path      /a/b.html?x=1#y                "suffix" in Beyond URLs
  hash      a UUID that stands for the value: groups without words (MeCo)
  topK      the value where it is one of the K most frequent of the corpus, else the word unknown (MeCo)
  floor, round, tenths, capK               of numbers: 3.27 becomes 3, 3, 32 and K at most; ties round to the even number
  year, month                              of an ISO date: 2024, 2024-05
  or_unknown                               the word unknown where a document has no value
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, Decimal, InvalidOperation
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any

from metajax.config import UserError, nearest

Column = list[str | None]
UNKNOWN = "unknown"
VERSION = 1  # raise when a filter below changes what it gives


def split_url(url: str) -> tuple[str, str, str]:
    """(scheme with its ://, host, path with query and fragment); parts that are not there are ''."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    end = re.search(r"[/?#]|$", rest).start()
    return scheme + separator, rest[:end], rest[end:]


@lru_cache
def _suffixes() -> Any:
    import tldextract  # slow to import, and only two filters need it

    return tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)  # the bundled list alone: no network, no cache


@lru_cache(maxsize=1 << 16)
def _site(host: str) -> tuple[str, str | None]:
    """(registered domain or else the host without its port, public suffix or None)."""
    parts = _suffixes()(host)
    return parts.top_domain_under_public_suffix or re.sub(r":\d*$", "", host), parts.suffix or None


def _number(change: Callable[[Decimal], Decimal | str], value: str) -> str | None:
    try:
        number = Decimal(value)
    except InvalidOperation:
        return None
    return str(change(number)) if number.is_finite() else None


def _whole(rounding: str, number: Decimal) -> Decimal:
    return number.to_integral_value(rounding)


def _prefix(pattern: str, value: str) -> str | None:
    match = re.match(pattern, value)
    return match and match.group()


_EACH: dict[str, Callable[[str], str | None]] = {  # of one value
    "scheme": lambda value: split_url(value)[0] or None,
    "host": lambda value: split_url(value)[1] or None,
    "path": lambda value: split_url(value)[2],
    "domain": lambda value: _site(split_url(value)[1])[0] or None,
    "tld": lambda value: _site(split_url(value)[1])[1],
    "hash": lambda value: str(uuid.uuid5(uuid.NAMESPACE_URL, value)),
    "floor": partial(_number, partial(_whole, ROUND_FLOOR)),
    "round": partial(_number, partial(_whole, ROUND_HALF_EVEN)),
    "tenths": partial(_number, lambda number: f"{int(_whole(ROUND_FLOOR, 10 * number)):02d}"),
    "year": partial(_prefix, r"\d{4}"),
    "month": partial(_prefix, r"\d{4}-\d{2}"),
}
_NUMBERED = ("top", "cap")
FILTERS = (*_EACH, *(f"{name}K" for name in _NUMBERED), "or_unknown")


def _filter(name: str) -> Callable[[Column], Column]:
    """The column function of a filter; UserError for an unknown name."""
    if name in _EACH:
        return partial(_map, _EACH[name])
    if name == "or_unknown":
        return lambda column: [UNKNOWN if value is None else value for value in column]
    numbered = re.fullmatch(rf"({'|'.join(_NUMBERED)})(\d+)", name)
    if numbered is None:
        raise UserError(f"metadata filter {name!r} is unknown{nearest(name, FILTERS)}; known: {', '.join(FILTERS)}")
    kind, number = numbered[1], int(numbered[2])
    return partial(_top, number) if kind == "top" else partial(_map, partial(_number, lambda value: min(value, Decimal(number))))


def _map(change: Callable[[str], str | None], column: Column) -> Column:
    return [None if value is None else change(value) for value in column]


def _top(count: int, column: Column) -> Column:
    """The `count` most frequent values; of equally frequent ones the first in the alphabet."""
    frequent = sorted(Counter(value for value in column if value is not None).items(), key=lambda item: (-item[1], item[0]))
    kept = {value for value, _ in frequent[:count]}
    return [value if value is None or value in kept else UNKNOWN for value in column]


def split_field(name: str) -> tuple[str, list[Callable[[Column], Column]]]:
    """(column, its filters in order) of `column|filter|filter`; UserError for an unknown filter."""
    column, *filters = name.split("|")
    return column, [_filter(each) for each in filters]


def annotate(name: str, column: Sequence[str | None]) -> Column:
    """The values of a field with filters, from those of its column."""
    values = list(column)
    for each in split_field(name)[1]:
        values = each(values)
    return values


def annotators_version(names: Sequence[str]) -> list[Any]:
    """What the values of these fields depend on beside the corpus, JSON-ready."""
    filters = {each for name in names for each in name.split("|")[1:]}
    return [VERSION, version("tldextract")] if filters & {"domain", "tld"} else [VERSION] if filters else []
