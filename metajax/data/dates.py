"""Year and month of a date, in the formats that occur in corpora."""

from __future__ import annotations

import re
from datetime import UTC, datetime

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


def year_and_month(text: str) -> str | None:
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
