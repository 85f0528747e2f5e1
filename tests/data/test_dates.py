"""Year and month from the date formats in corpora."""

import pytest

from metajax.data.annotators import annotate


@pytest.mark.fault(15)
@pytest.mark.parametrize(
    "date",
    [
        "2024-05-11",
        "2024-05-11T08:00:00Z",
        "2024-05-11 08:00:00.123456789",
        "2024-05-11 08:00:00+02:00",
        "2024/5/1 8:00",
        "2024.05.11",
        "2024-05",
        "20240511",
        "20240511083000",
        "20240511T083000Z",
        "13/05/2024",
        "05/13/2024 08:00",
        "05/05/2024",
        "1714521600",
        "1714521600.5",
        "1714521600000",
        "1714521600000.0",
        "1714521600123456",
        "1714521600123456789",
        "Sat, 11 May 2024 08:00:00 GMT",
        "Sat, 11 May 2024 08:00:00 -0500",
        "Sat May 11 08:00:00 2024",
        "May 2024",
        "May 11, 2024",
        "11-May-2024",
    ],
)
def test_dates_of_may(date):
    assert annotate("date|month", [date]) == ["2024-05"]
    assert annotate("date|year", [date]) == ["2024"]


@pytest.mark.fault(15)
@pytest.mark.parametrize("year", ["2024", "2024.0", "11/05/2024"])
def test_a_year_alone_or_with_a_month_that_may_be_the_day(year):
    assert annotate("date|year", [year]) == ["2024"]
    assert annotate("date|month", [year]) == [None]


@pytest.mark.fault(15)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "20245",
        "2024 edition",
        "2024-13-01",
        "2024-02-30",
        "31/02/2024",
        "-1714521600",
        "99999999999",
        "12345678",
        "Maybe 2024",
        "march 1999 to may 2000",
        "0",
        "nan",
    ],
)
def test_text_that_is_no_date_gives_nothing(text):
    assert annotate("date|year", [text]) == annotate("date|month", [text]) == [None]
