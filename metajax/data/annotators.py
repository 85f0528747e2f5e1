"""Filters of a metadata field: {url|host}, {score|tenths}, {url|host|top1000}. A template names a column and its filters.

A filter maps the values of a whole column. A missing value is None, and a filter that does not apply to a value gives None.
The papers' names clash, so each part of an address has one name here:

  scheme    https://                       "prefix" in Beyond URLs
  host      www.example.co.uk              "domain" in Beyond URLs, the default in MeCo; without user and port, in lower case
  domain    example.co.uk                  the registered domain, by tldextract's bundled list; the host if there is none
  tld       co.uk                          "URL suffix" in MeCo
  path      /a/b.html?x=1#y                "suffix" in Beyond URLs
  hash      a UUID made from the value: groups without readable names (MeCo)
  topK      the value if it is one of the K most frequent in the corpus, otherwise the word unknown (MeCo)
  floor, round, tenths, capK               of numbers: 3.27 becomes 3, 3, 32, and at most K; ties round to the even number
  year, month                              of a date or of seconds since 1970: 2024, 2024-05
  or_unknown                               the word unknown if a document has no value

Numbers are written with all digits, never with an exponent. A column name that contains one of {}|:!" is written in double
quotes, "og:title"|top9; a double quote within it is doubled.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import MAX_EMAX, MIN_EMIN, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any

from metajax.core.errors import UserError, nearest, require
from metajax.data.addresses import parts

Column = list[str | None]
UNKNOWN = "unknown"
VERSION = 2  # raise it when a filter below changes its results
_DIGITS = 10_000  # of a number, at most
_EXACT = Context(prec=3 * _DIGITS, Emax=MAX_EMAX, Emin=MIN_EMIN)
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,9})?\s*")
_FIELD = re.compile(r'(?:"((?:[^"]|"")*)"|([^"{}|:!]+))((?:\|[^{}|:!]*)*)')  # a column, quoted or not, and its filters
_TIME = r"(?:[T ]?[0-9]{1,2}:?[0-9]{2}\S*(?: \S+)?)?"
_YEAR_FIRST = re.compile(rf"([0-9]{{4}})(?:([-/.])([0-9]{{1,2}})(?:\2([0-9]{{1,2}}){_TIME})?)?")
_COMPACT = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})(?:T?[0-9]{4}(?:[0-9]{2})?(?:\.[0-9]+)?(?:Z|[+-][0-9:]+)?)?")
_YEAR_LAST = re.compile(rf"([0-9]{{1,2}})([-/.])([0-9]{{1,2}})\2([0-9]{{4}}){_TIME}")
_EPOCH = re.compile(r"([0-9]{9,10}|[0-9]{12,13}|[0-9]{15,16}|[0-9]{18,19})(?:\.[0-9]+)?")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_NAMES = re.compile(
    r"\b(jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b"
)
_LONGEST = 48  # characters of a date that names its month, at most


@lru_cache
def _suffixes() -> Any:
    import tldextract  # imported here: it is slow to import, and only two filters need it

    return tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)  # only the bundled list: no network, no cache


@lru_cache(maxsize=1 << 16)
def _site(host: str) -> tuple[str, str | None]:
    """(registered domain, or the host if there is none; public suffix or None)."""
    found = _suffixes()(host)
    return found.top_domain_under_public_suffix or host, found.suffix or None


def _part(number: int, value: str) -> str | None:
    found = parts(value)
    return found and (found[number] if number == 2 else found[number] or None)


def _of_site(number: int, value: str) -> str | None:
    host = _part(1, value)
    return host and _site(host)[number]


def plain(number: Decimal) -> str:
    """The digits of a finite number, without an exponent or a sign of zero; with an exponent above 10,000 digits."""
    return format(number if number else abs(number), "f" if _is_short(number) else "")


def _is_short(number: Decimal) -> bool:
    exponent = number.as_tuple().exponent  # a letter if the number is not finite
    return isinstance(exponent, int) and abs(number.adjusted()) < _DIGITS and abs(exponent) < _DIGITS


def _number(change: Callable[[Decimal], Decimal], width: int, value: str) -> str | None:
    number = Decimal(value.strip()) if _NUMBER.fullmatch(value) else None
    return None if number is None or not _is_short(number) else plain(_EXACT.normalize(change(number))).zfill(width)


def _whole(rounding: str, tens: int, number: Decimal) -> Decimal:
    return _EXACT.scaleb(number, tens).to_integral_value(rounding, _EXACT)


def _year_and_month(text: str) -> str | None:
    """`2024-05`, or `2024` if the month is missing or may be the day; None if the text is no date.

    Accepted: 2024-05-11, also with / or . and with a time; 20240511, also with a time; 11/05/2024 (the year, and the month if it
    cannot be the day); English month names; seconds, milli-, micro- and nanoseconds since 1970, with 9 digits or more.
    """
    text = text.strip().removesuffix(".0")  # from a column of floats
    if found := _YEAR_FIRST.fullmatch(text):
        year, _, month, day = found.groups()
        return year if month is None else _checked(year, month, day or "1")
    if (found := _COMPACT.fullmatch(text)) and (date := _checked(*found.groups())):
        return date
    if found := _EPOCH.fullmatch(text):
        digits = found[1]
        return f"{datetime.fromtimestamp(int(digits) // 1000 ** ((len(digits) - 8) // 3), UTC):%Y-%m}"
    if found := _YEAR_LAST.fullmatch(text):
        one, _, other, year = found.groups()
        dates = {date for date in (_checked(year, one, other), _checked(year, other, one)) if date}
        return dates.pop() if len(dates) == 1 else year if dates else None
    names = _NAMES.findall(text.lower()) if len(text) <= _LONGEST else []
    years = re.findall(r"(?<![0-9:+])(?<![ 0-9]-)[0-9]{4}(?![0-9:])", text)
    if len(names) == 1 and len(years) == 1:
        return f"{years[0]}-{_MONTHS.index(names[0][:3]) + 1:02d}"
    return None


def _checked(year: str, month: str, day: str) -> str | None:
    """Year and month; None if the date does not exist."""
    try:
        return f"{datetime(int(year), int(month), int(day)):%Y-%m}".zfill(7)
    except ValueError:
        return None


def _month(value: str) -> str | None:
    found = _year_and_month(value)
    return found if found and len(found) > 4 else None


_EACH: dict[str, Callable[[str], str | None]] = {  # filters of a single value
    "scheme": partial(_part, 0),
    "host": partial(_part, 1),
    "path": partial(_part, 2),
    "domain": partial(_of_site, 0),
    "tld": partial(_of_site, 1),
    "hash": lambda value: str(uuid.uuid5(uuid.NAMESPACE_URL, value)),
    "floor": partial(_number, partial(_whole, ROUND_FLOOR, 0), 1),
    "round": partial(_number, partial(_whole, ROUND_HALF_EVEN, 0), 1),
    "tenths": partial(_number, partial(_whole, ROUND_FLOOR, 1), 2),
    "year": lambda value: (_year_and_month(value) or "")[:4] or None,
    "month": _month,
}
FILTERS = (*_EACH, "topK", "capK", "or_unknown")


def _filtered(name: str, column: Column) -> Column:
    """A column after a filter; raises UserError for an unknown filter."""
    change, numbered = _EACH.get(name), re.fullmatch(r"(top|cap)([0-9]{1,9})", name)
    if name == "or_unknown":
        return [UNKNOWN if value is None else value for value in column]
    if numbered and numbered[1] == "cap":
        change = partial(_number, partial(min, Decimal(numbered[2])), 1)
    if change is not None:
        return [None if value is None else change(value) for value in column]
    if numbered is None:
        raise UserError(f"metadata filter {name!r} is unknown{nearest(name, FILTERS)}; known: {', '.join(FILTERS)}")
    most = int(numbered[2])
    require(most > 0, f"metadata filter {name!r}: at least top1")
    counts = Counter(value for value in column if value is not None)
    kept = {value for value, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]}
    return [value if value is None or value in kept else UNKNOWN for value in column]


def parse_field(name: str) -> tuple[str, list[str]]:
    """(column, names of its filters) of `column|filter|filter`; raises UserError if it does not parse or a filter is unknown."""
    found = _FIELD.fullmatch(name)
    if found is None:
        raise UserError(f'metadata field {name!r}: a column whose name has one of {{}}|:!" has to be in double quotes')
    quoted, bare, joined = found.groups()
    filters = joined.split("|")[1:]
    for each in filters:
        _filtered(each, [])
    return bare if quoted is None else quoted.replace('""', '"'), filters


def field_of(column: str) -> str:
    """A column's name as written in a template: in double quotes if it needs them."""
    found = _FIELD.fullmatch(column)
    return column if found and found[2] == column else '"' + column.replace('"', '""') + '"'


def annotate(name: str, column: Sequence[str | None]) -> Column:
    """The values of a field: those of its column after all filters."""
    values = list(column)
    for each in parse_field(name)[1]:
        values = _filtered(each, values)
    return values


def annotators_version(names: Sequence[str]) -> list[Any]:
    """Versions that the values of these fields depend on besides the corpus, JSON-ready."""
    filters = {each for name in names for each in parse_field(name)[1]}
    return [VERSION, version("tldextract")] if filters & {"domain", "tld"} else [VERSION] if filters else []
