"""Filters of metadata fields: parts of addresses, numbers, dates, frequent values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metajax.core.errors import UserError
from metajax.data.addresses import split_url
from metajax.data.annotators import annotate, annotators_version, field_of, parse_field
from metajax.data.metadata import render

ADDRESS = "https://www.example.co.uk:8080/a/b.html?x=1#y"


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        # address: scheme, host, domain, tld, path
        (ADDRESS, ("https://", "www.example.co.uk", "example.co.uk", "co.uk", "/a/b.html?x=1#y")),
        ("http://numpy.org", ("http://", "numpy.org", "numpy.org", "org", "")),
        ("docs.scipy.org/doc", (None, "docs.scipy.org", "scipy.org", "org", "/doc")),
        ("https://who.github.io/page", ("https://", "who.github.io", "github.io", "io", "/page")),
        ("https://boards.4chan.org?b", ("https://", "boards.4chan.org", "4chan.org", "org", "?b")),
        ("http://127.0.0.1:80/x", ("http://", "127.0.0.1", "127.0.0.1", None, "/x")),
        ("http://localhost/x", ("http://", "localhost", "localhost", None, "/x")),
        ("/only/a/path", (None, None, None, None, "/only/a/path")),
    ],
)
def test_parts_of_an_address(url, parts):
    names = ("scheme", "host", "domain", "tld", "path")
    for name, part in zip(names, parts, strict=True):
        assert annotate(f"url|{name}", [url]) == [part], name


@given(st.text())
def test_scheme_host_and_path_are_the_whole_address(url):
    assert "".join(split_url(url)) == url


def test_the_bundled_list_is_used_without_a_network(monkeypatch):
    import socket

    from metajax.data import annotators

    def refuse(*args):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    annotators._suffixes.cache_clear()
    annotators._site.cache_clear()
    assert annotate("url|domain", [ADDRESS]) == ["example.co.uk"]


def test_filters_are_chained_and_keep_missing_values():
    column = ["https://b.org/1", None, "https://a.org/2", "https://b.org/3"]
    assert annotate("url", column) == column
    assert annotate("url|host|top1", column) == ["b.org", None, "unknown", "b.org"]
    assert annotate("url|host|or_unknown", column) == ["b.org", "unknown", "a.org", "b.org"]
    first, nothing, second, third = annotate("url|host|hash", column)
    assert first == third != second and nothing is None and "org" not in first
    assert annotate("url|hash", column)[0] != annotate("url|hash", column)[3]


def test_ties_of_frequent_values_are_broken_alphabetically():
    assert annotate("x|top2", ["c", "b", "a", "c"]) == ["c", "unknown", "a", "c"]
    assert annotate("x|top9", ["c", "b"]) == ["c", "b"]


def test_numbers():
    scores = ["2.7", "3.27", "4.999", "5.6", "-0.05", "0.7", "1e1", "none", "nan", None]
    assert annotate("x|tenths", scores) == ["27", "32", "49", "56", "-1", "07", "100", None, None, None]
    assert annotate("x|floor", scores)[:5] == ["2", "3", "4", "5", "-1"]
    assert annotate("x|cap5|round", scores)[:4] == ["3", "3", "5", "5"], "int_score of FineWeb-Edu"
    assert annotate("x|floor|cap2", ["0.000", "1.584", "2.000", "13.999"]) == ["0", "1", "2", "2"]


@pytest.mark.fault(15)
@pytest.mark.parametrize(
    ("value", "whole", "rounded", "tenths", "capped"),
    [
        ("-0.3", "-1", "0", "-3", "-0.3"),
        ("1e3", "1000", "1000", "10000", "5"),
        ("1e400", "1" + "0" * 400, "1" + "0" * 400, "1" + "0" * 401, "5"),
        ("1e5000", "1" + "0" * 5000, "1" + "0" * 5000, "1" + "0" * 5001, "5"),
        ("5e-324", "0", "0", "00", "0." + "0" * 323 + "5"),
        ("-0.0", "0", "0", "00", "0"),
        ("3.50", "3", "4", "35", "3.5"),
        (" +2.5 ", "2", "2", "25", "2.5"),
        ("9" * 40 + ".99", "9" * 40, "1" + "0" * 40, "9" * 41, "5"),
        ("0." + "9" * 40, "0", "1", "09", "0." + "9" * 40),
        *(
            (text, None, None, None, None)
            for text in ("nan", "inf", "1e999999999", "1e99999999999", "1,234", "1_000", "٣", "true", "")
        ),
    ],
)
def test_numbers_are_written_with_their_digits(value, whole, rounded, tenths, capped):
    assert [annotate(f"x|{name}", [value])[0] for name in ("floor", "round", "tenths", "cap5")] == [
        whole,
        rounded,
        tenths,
        capped,
    ]


@pytest.mark.fault(29)
@pytest.mark.parametrize(
    "column", ["og:title", "a{b}", "0", "", "a|b", "a.b", 'a"b', '"', "a!b", " ", "meta.url", "WARC-Target-URI", "日付"]
)
def test_any_column_has_a_name_in_a_template(column):
    assert parse_field(field_of(column)) == (column, [])
    assert parse_field(f"{field_of(column)}|host|top9") == (column, ["host", "top9"])
    assert render(f"{{{field_of(column)}|floor}}!", {column: ["2.5", None]}) == ["2!", None]


@given(st.text(max_size=8))
def test_every_name_can_be_quoted(column):
    assert render(f"{{{{{{{field_of(column)}}}}}}}", {column: ["x"]}) == ["{x}"]


@given(st.integers(0, 99))
def test_tenths_are_exact_on_tenths(n):
    assert annotate("x|tenths", [str(n / 10)]) == [f"{n:02d}"]


@given(st.floats(0, 5))
def test_rounding_is_that_of_the_published_scores(score):
    assert annotate("x|cap5|round", [repr(score)]) == [str(round(max(0, min(score, 5))))]
    assert annotate("x|floor", [repr(score)]) == [str(math.floor(score))]


def test_dates():
    dates = ["2024-05-11T08:00:00Z", "2019-12-31", "in May"]
    assert annotate("date|year", dates) == ["2024", "2019", None]
    assert annotate("date|month", dates) == ["2024-05", "2019-12", None]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("url|hots", "did you mean 'host'"),
        ("url|top", "known: scheme"),
        ("url|top0", "at least top1"),
        ("a:b|host", "double quotes"),
        ("url|", "''"),
    ],
)
def test_unknown_filters(name, message):
    with pytest.raises(UserError, match=message):
        annotate(name, ["x"])


def test_the_side_table_depends_on_the_suffix_list():
    assert annotators_version(["url", "topic"]) == []
    assert annotators_version(["url|host"]) == [2]
    assert annotators_version(['"a|tld"']) == []
    assert annotators_version(["url|host", "url|tld"])[1].count(".") == 2
