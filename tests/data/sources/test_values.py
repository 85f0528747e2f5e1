"""Rows as columns of text: nested fields by dotted names, numbers with unchanged digits, missing values left out."""

import datetime
import decimal
import json
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metajax.core.errors import UserError
from metajax.data.documents import BadRecord, Document
from metajax.data.sources import open_source
from metajax.data.sources.files import NO_ORIGIN, NO_TEXT, Columns, to_document
from metajax.data.sources.values import as_string, flatten


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    "value",
    [None, math.nan, math.inf, np.float32("nan"), np.datetime64("NaT"), decimal.Decimal("NaN"), "", b"", [1], np.zeros(2)],
)
def test_missing_values_are_empty_text(value):
    assert as_string(value) == ""


@pytest.mark.parametrize("text", ["nan", "None", "null", "NA", " "])
def test_words_are_text(text):
    assert as_string(text) == as_string(text.encode()) == text


NUMBERS = [(3.3, "3.3"), (np.float32(3.3), "3.3"), (np.float16(3.3), "3.3"), (1.0, "1.0"), (-0.0, "0.0")]
NUMBERS += [(np.float32(-0.0), "0.0"), (1e22, "1" + "0" * 22 + ".0"), (1e-7, "0.0000001"), (5e-324, "0." + "0" * 323 + "5")]
NUMBERS += [(2**70, str(2**70)), (np.int64(3), "3"), (True, "true"), (np.bool_(False), "false")]
NUMBERS += [(decimal.Decimal(digits), text) for digits, text in (("1E+3", "1000"), ("-0.0", "0.0"), ("3.30", "3.30"))]
NUMBERS += [(decimal.Decimal("1e999999999"), "1E+999999999")]


@pytest.mark.fault(15)
@pytest.mark.parametrize(("value", "text"), NUMBERS)
def test_numbers_are_their_digits(value, text):
    assert as_string(value) == text


@pytest.mark.fault(13)
def test_missing_values_are_missing_in_every_format(opened, tmp_path):
    """Every column has a value in one of two rows, however the format marks the missing one."""
    columns = {"text": ["a", "b"], "f": pa.array([1.5, math.nan]), "h": pa.array([1.5, math.nan], pa.float32()), "i": [1, None]}
    columns |= {"s": ["x", ""], "n": ["nan", None], "d": pa.array([datetime.date(2024, 5, 1), None]), "z": pa.array([None, None])}
    columns |= {"in": [{"f": 1.5}, {"f": math.nan}], "out": [{"f": 1.5}, None]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a", "f": 1.5, "s": "x", "n": "nan", "in": {"f": 1.5}}\n'
        '{"text": "b", "f": NaN, "s": "", "n": null, "in": {"f": NaN}, "i": Infinity, "j": -Infinity}\n'
    )
    for spec, names in (("parquet:a.parquet", "f h i s n d in.f out.f"), ("jsonl:a.jsonl", "f s n in.f")):
        first, second = opened(spec)[0], opened(spec)[1]
        assert first.metadata.keys() == set(names.split()) and second.metadata == {}, spec


@pytest.mark.fault(14)
def test_nested_columns_have_dotted_names(opened, tmp_path):
    """JSON and Parquet alike; a column that has the dotted name itself comes first, lists are left out."""
    rows = [
        {
            "text": f"t{i}",
            "meta": {"url": f"https://www.s{i % 7}.org/p{i}", "more": {"score": i / 2}, "tags": ["x"]},
            "meta.more": "own",
        }
        for i in range(40)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for spec in ("jsonl:a.jsonl", "parquet:a.parquet"):
        source = opened(spec)
        assert source[3] == Document(
            "t3", {"meta.url": "https://www.s3.org/p3", "meta.more.score": "1.5", "meta.more": "own"}, "www.s3.org"
        )
        assert len({source[i].origin for i in range(40)}) == 7 and not source.tally[NO_ORIGIN]
        assert opened(f"{spec}?text=meta.url&origin=meta.more.score")[3] == Document(
            "https://www.s3.org/p3", {"text": "t3", "meta.more.score": "1.5", "meta.more": "own"}, "1.5"
        )
    with pytest.raises(UserError, match=r"no column 'meta\.uri' \(origin\); did you mean 'meta\.url'"):
        len(opened("parquet:a.parquet?origin=meta.uri"))
    assert flatten({"a": {"b": 1}, "a.b": None}) == {"a.b": None}
    deep: dict = {}
    for _ in range(5000):
        deep = {"a": deep, "b": 1}
    assert len(flatten(deep)) == 5000


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("row", "origin"),
    [
        ({"url": "https://User:pw@WWW.a.org:80/x"}, "www.a.org"),
        ({"metadata": {"WARC-Target-URI": "http://b.org/x"}, "other": {"url": "no address"}}, "b.org"),
        ({"meta": {"url": "http://c.org"}, "url": "a.org/web/http://d.org/"}, "a.org"),
        ({"meta": {"url": "http://c.org"}, "url": None}, "c.org"),
        ({"URL": "http://e.org/1"}, "e.org"),
        ({"origin": "https://f.org/page", "url": "http://g.org"}, "f.org"),
        ({"origin": "s3://bucket/file", "url": "http://g.org"}, "s3://bucket/file"),
        ({"origin": "package", "url": "http://g.org"}, "package"),
    ],
)
def test_the_origin_is_the_site_of_the_address(row, origin):
    tally = Counter()
    assert to_document({"text": "a", **row}, Columns(), "f", tally).origin == origin
    assert not tally[NO_ORIGIN]


@pytest.mark.fault(14)
def test_pages_of_one_site_have_one_origin_where_the_address_is_named():
    pages = [to_document({"text": str(i), "page": f"https://a.org/{i}"}, Columns(origin="page"), "f") for i in range(3)]
    assert {page.origin for page in pages} == {"a.org"}


@pytest.mark.fault(14)
def test_documents_without_an_origin_are_counted():
    tally = Counter()
    for url in ("http://a.org", None, "", "a word"):
        to_document({"text": "a", "url": url}, Columns(), "f", tally)
    assert tally[NO_ORIGIN] == 3


@pytest.mark.fault(29)
def test_undecodable_values_are_left_out_and_counted(opened, tmp_path):
    """Undecodable bytes make a record bad only in the columns of text and origin."""
    invalid = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))
    columns = {
        "text": ["a"],
        "blob": [b"\xff"],
        "good": [b"yes"],
        "wrong": invalid,
        "fixed": pa.array([b"\xff\x00"], pa.binary(2)),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "blob": "\\ud800", "good": "yes", "big": %s}\n' % ("9" * 5000))
    source = opened("parquet:a.parquet")
    assert source[0].metadata == {"good": "yes"}
    assert {name: n for name, n in source.tally.items() if n} == {NO_TEXT + c: 1 for c in ("blob", "wrong", "fixed")} | {
        NO_ORIGIN: 1
    }
    assert opened("jsonl:a.jsonl")[0].metadata == {"good": "yes", "big": "9" * 5000}
    for spec in ("parquet:a.parquet?text=blob", "parquet:a.parquet?text=wrong", "parquet:a.parquet?origin=blob"):
        with pytest.raises(BadRecord, match="is not UTF-8 at byte 0"):
            opened(spec)[0]
    with pytest.raises(BadRecord, match="column 'blob' holds half of a surrogate pair"):
        opened("jsonl:a.jsonl?origin=blob")[0]


@pytest.mark.fault(29)
def test_any_name_of_a_column(opened, tmp_path):
    names = ["", "0", "og:title", "a{b}", "a|b", "a.b", 'a"b', "[/x]", "text"]
    row = {name: f"value of {name}" for name in names} | {"a": {"b": "nested"}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    for spec in ("parquet:a.parquet", "jsonl:a.jsonl"):
        assert opened(spec)[0].metadata == {name: f"value of {name}" for name in names if name != "text"}


def test_types_of_parquet(opened, tmp_path):
    day = datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC)
    columns = {"text": pa.array(["é"], pa.large_string()), "dictionary": pa.array(["d"]).dictionary_encode(), "bool": [True]}
    columns |= {
        "decimal": pa.array([decimal.Decimal("12.50")], pa.decimal128(9, 2)),
        "binary": pa.array([b"b"], pa.large_binary()),
    }
    columns |= {"map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), "list": [[1.5]], "zone": pa.array([day])}
    struct = pa.struct([("when", pa.date32()), ("half", pa.float32())])
    columns |= {
        "big": pa.array([2**63], pa.uint64()),
        "struct": pa.array([{"when": day.date(), "half": np.float32(3.3)}], struct),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", use_deprecated_int96_timestamps=False)
    found = {"dictionary": "d", "decimal": "12.50", "binary": "b", "zone": "2024-05-01 00:00:00.000000Z", "bool": "true"}
    found |= {"big": str(2**63), "struct.when": "2024-05-01", "struct.half": "3.3"}
    assert opened("parquet:a.parquet")[0].metadata == found
    times = pa.table({"text": ["a"], "time": pa.array([1_600_000_000_123_456_789], pa.timestamp("ns"))})
    pq.write_table(times, tmp_path / "b.parquet", use_deprecated_int96_timestamps=True)
    assert opened("parquet:b.parquet")[0].metadata == {"time": "2020-09-13 12:26:40.123456789"}


@pytest.mark.fault(37)
@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "brotli", "lz4", "zstd"])
def test_compressions_of_parquet(compression, opened, tmp_path):
    pq.write_table(pa.table({"text": ["a" * 99]}), tmp_path / "a.parquet", compression=compression)
    assert opened("parquet:a.parquet")[0].text == "a" * 99


@pytest.mark.fault(21)
def test_only_the_path_of_the_spec_is_a_pattern(tmp_path):
    data = tmp_path / "br[1]ack" / "*"
    (data / "web").mkdir(parents=True)
    for name in ("a", "b", "c[1]"):
        (data / "web" / f"{name}.jsonl").write_text(json.dumps({"text": name, "id": name}))
    pq.write_table(pa.table({"id": ["c[1]"], "topic": ["t"]}), data / "web" / "c[1].parquet")
    for pattern, found in (
        ("web/[ab].jsonl", "ab"),
        ("web/c[1].jsonl", ["c[1]"]),
        ("**/?.jsonl", "ab"),
        (f"{tmp_path}/*/*/web/*.jsonl", ["a", "b", "c[1]"]),
    ):
        source = open_source(f"jsonl:{pattern.replace('?', '[a-z]')}", cache_dir=tmp_path, data_dir=data)
        assert [source[i].text for i in range(len(source))] == list(found)
    (data / "labels").mkdir()
    (data / "web" / "c[1].parquet").rename(data / "labels" / "c[1].parquet")
    joined = open_source("jsonl:web/c[1].jsonl?join=labels", cache_dir=tmp_path, data_dir=data)
    assert joined[0].metadata["topic"] == "t"
