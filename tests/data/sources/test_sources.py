import bz2
import gzip
import json
import lzma
import os
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st

from metajax.core import json_lines
from metajax.core.array_records import ArrayRecords
from metajax.core.errors import UserError
from metajax.core.json_lines import line_marks
from metajax.data.documents import BadRecord, Document, is_validation
from metajax.data.sources import jsonl, open_source
from metajax.data.sources.files import Columns, to_document

ROWS = [
    {
        "text": f"text {i} é",
        "url": f"https://site{i % 4}.org/page{i}",
        "score": i / 4,
        "draft": i == 1,
        "none": None,
        "tags": ["x"],
    }
    for i in range(11)
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3, **options)


def write_arrayrecord(path, rows, options="group_size:1"):
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for row in rows:
        writer.write(row if isinstance(row, bytes) else json.dumps(row).encode())
    writer.close()


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet, "arrayrecord": write_arrayrecord}


@pytest.fixture(params=WRITERS)
def kind(request):
    return request.param


def test_every_row_becomes_its_document(kind, opened, tmp_path):
    WRITERS[kind](tmp_path / "a.data", ROWS)
    source = opened(f"{kind}:a.data")
    assert len(source) == len(ROWS)
    for i in (10, 0, 5, 1, 9):
        url = f"https://site{i % 4}.org/page{i}"
        metadata = {"url": url, "score": str(i / 4), "draft": "true" if i == 1 else "false"}
        assert source[i] == Document(f"text {i} é", metadata, f"site{i % 4}.org")
    for i in (-1, 11):
        with pytest.raises(IndexError):
            source[i]


def test_a_glob_is_read_in_sorted_order(kind, opened, tmp_path):
    for name in ("b", "a", "c"):
        WRITERS[kind](tmp_path / f"{name}.part", [{"text": f"{name}{i}"} for i in range(4)])
    source = opened(f"{kind}:*.part")
    assert [source[i].text for i in range(12)] == [f"{name}{i}" for name in "abc" for i in range(4)]


def test_a_reader_survives_pickling(kind, opened, tmp_path):
    WRITERS[kind](tmp_path / "a.data", ROWS)
    source = opened(f"{kind}:a.data")
    before = [source[i] for i in range(len(source))]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(len(copy))] == before
    assert copy.fingerprint() == source.fingerprint()


def test_the_fingerprint_follows_size_time_columns_and_name_but_not_the_place(kind, opened, tmp_path):
    path = tmp_path / "a.data"
    WRITERS[kind](path, ROWS)
    prints = [opened(f"{kind}:a.data").fingerprint()]
    assert opened(f"{kind}:a.data").fingerprint() == prints[0]
    prints.append(opened(f"{kind}:a.data?origin=url").fingerprint())
    os.utime(path, ns=(1, 1))
    prints.append(opened(f"{kind}:a.data").fingerprint())
    path.rename(tmp_path / "b.data")
    prints.append(opened(f"{kind}:b.data").fingerprint())
    assert len(set(prints)) == 4
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "b.data").rename(tmp_path / "elsewhere" / "b.data")
    moved = open_source(f"{kind}:b.data", cache_dir=tmp_path, data_dir=tmp_path / "elsewhere")
    assert moved.fingerprint() == prints[3]


def test_the_manifest_names_files_bytes_and_sha256(kind, opened, tmp_path):
    path = tmp_path / "a.data"
    WRITERS[kind](path, ROWS)
    manifest = json.loads(json.dumps(opened(f"{kind}:a.data").manifest()))
    assert manifest["kind"] == kind
    assert manifest["records"] == 11
    digest = subprocess.run(["sha256sum", str(path)], check=True, capture_output=True, text=True).stdout.split()[0]
    assert manifest["files"] == [{"path": str(path), "bytes": path.stat().st_size, "sha256": digest}]


def test_text_and_origin_columns_are_chosen_by_the_query(kind, opened, tmp_path):
    WRITERS[kind](tmp_path / "a.data", [{"body": "b", "site": "s", "origin": "o", "n": 2.5}] * 2)
    assert opened(f"{kind}:a.data?text=body&origin=site")[0] == Document("b", {"site": "s", "n": "2.5"}, "s")
    assert opened(f"{kind}:a.data?text=body")[1] == Document("b", {"site": "s", "n": "2.5"}, "o")


def test_an_empty_corpus_is_refused(kind, opened, tmp_path):
    if kind == "parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.data")
    elif kind == "jsonl":
        (tmp_path / "a.data").write_text("\n  \n")
    else:
        write_arrayrecord(tmp_path / "a.data", [])
    with pytest.raises(UserError, match=r"a\.data.*(no records|not a readable)"):
        len(opened(f"{kind}:a.data"))


def test_a_missing_file_is_named(kind, opened, tmp_path):
    for name in ("gone.x", "gone*.x"):
        with pytest.raises(UserError) as caught:
            opened(f"{kind}:{name}")
        assert str(tmp_path / name) in str(caught.value)


def test_a_relative_path_without_data_dir_is_below_the_working_directory(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert len(open_source("jsonl:a.jsonl", cache_dir=tmp_path, data_dir=None)) == 11


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("jsnol:a", "did you mean 'jsonl'"),
        ("jsonl:a?txt=body", "did you mean 'text'"),
        ("jsonl:a?text=", "is empty"),
        ("jsonl", "jsonl:PATH"),
        ("tfds", "tfds:NAME"),
        ("pydocs?text=a", "columns of its own"),
        ("debindex:x", "takes no path"),
    ],
)
def test_a_bad_spec_is_one_plain_line(spec, part):
    with pytest.raises(UserError) as caught:
        open_source(spec, cache_dir=Path(), data_dir=None)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- JSON lines


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON"),
        (b"[1]", "list, not an object"),
        (b'{"txet": "a"}', "did you mean 'txet'"),
        (b'{"text": 3}', "int, not text"),
        (b'{"text": null}', "NoneType, not text"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_corrupt_line_is_named_by_file_line_and_reason(line, reason, opened, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n   \n' + line + b"\n" + b'{"text": "last"}')
    source = opened("jsonl:a.jsonl")
    assert [source[0].text, source[2].text] == ["fine", "last"]
    with pytest.raises(BadRecord) as caught:
        source[1]
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}, line 4: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def zstd(data):
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(data)
    return stream.getvalue().to_pybytes()


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".zst", zstd)])
def test_compressed_lines_are_read_in_any_order(suffix, pack, opened, tmp_path):
    for name, rows in (("a", ROWS[:4]), ("b", ROWS[4:])):
        text = "\n".join(json.dumps(row) + "\n" * (i % 2) for i, row in enumerate(rows))  # blank lines are no records
        (tmp_path / f"{name}.jsonl{suffix}").write_bytes(pack(text.encode()))
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    packed, plain = opened(f"jsonl:*.jsonl{suffix}"), opened("jsonl:*.jsonl")
    order = [*range(11), 9, 2, 3, 0, 10]
    assert len(packed) == 11 and [packed[i] for i in order] == [plain[i] for i in order]
    assert pickle.loads(pickle.dumps(packed))[7] == plain[7]
    mixed = opened("jsonl:a.jsonl*")
    assert len(mixed) == 8 and list(mixed.read(range(1, 8, 2))) == [plain[i] for i in (1, 3, 1, 3)]


def test_compressed_lines_that_cannot_be_read(opened, tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n')[:-9])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be decompressed .*; fetch or write it again"):
        len(opened("jsonl:a.jsonl.gz"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{\n'))
    with pytest.raises(BadRecord, match=r"b\.jsonl\.gz, line 2: not JSON"):
        opened("jsonl:b.jsonl.gz")[1]
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a"}\n'))
    with pytest.raises(UserError, match="xz is not read; decompress it"):
        opened("jsonl:c.jsonl.xz")


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([b"", b" ", b"\t \r", b"1", b'{"a":1}', b"9" * 9, b"{} \r"]), max_size=12),
    st.booleans(),
    st.integers(1, 5),
)
def test_marks_equal_the_line_offsets_of_a_split(tmp_path_factory, lines, closed, every):
    data = b"\n".join(lines) + (b"\n" if closed else b"")
    path = tmp_path_factory.mktemp("marks") / "f"
    path.write_bytes(data)
    filled = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    count, marks = line_marks(str(path), every)
    assert count == len(filled) and [number for _, number in marks] == [number for number, _ in filled[::every]]
    for n, mark in enumerate(marks):
        found = [(number, line.rstrip(b"\n")) for number, line in json_lines.lines(str(path), *mark)]
        assert found == filled[n * every :]


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9), st.integers(1, 6))
def test_any_range_is_read_from_its_marks(tmp_path_factory, start, stop, step, every):
    home = tmp_path_factory.mktemp("range")
    for name in "ab":
        write_jsonl(home / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(20)])
    source = open_source("jsonl:*.jsonl", cache_dir=home, data_dir=home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "EVERY", every)
        texts = [f"{name}{n}" for name in "ab" for n in range(20)]
        assert [document.text for document in source.read(range(start, stop, step))] == texts[start:stop:step]


# ------------------------------------------------------------------------------------------ Parquet, ArrayRecord


def test_parquet_without_the_column_lists_the_columns(opened, tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"content": "x", "url": "u"}])
    with pytest.raises(UserError, match=r"a\.parquet: no column 'contents' .*did you mean 'content'\?; columns: content, url"):
        len(opened("parquet:a.parquet?text=contents"))


def test_a_file_that_is_not_parquet_is_named(opened, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"garbage" * 100)
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        len(opened("parquet:a.parquet"))


def test_a_damaged_row_group_is_a_bad_record(opened, tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, ROWS, write_page_checksum=True, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[data.index(b"text 4")] ^= 0xFF
    path.write_bytes(data)
    source = opened("parquet:a.parquet")
    assert source[0].text == "text 0 é"
    with pytest.raises(BadRecord, match=r"a\.parquet, row group 1: cannot be decoded"):
        source[4]


def test_a_null_or_invalid_text_in_parquet_is_a_bad_record(opened, tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"text": b"ok"}, {"text": None}, {"text": b"\xff"}])
    source = opened("parquet:a.parquet")
    assert source[0].text == "ok"
    with pytest.raises(BadRecord, match=r"record 1: .*NoneType"):
        source[1]
    with pytest.raises(BadRecord, match=r"record 2: .*not UTF-8 at byte 0"):
        source[2]


def test_parquet_dates_become_text(opened, tmp_path):
    days, times = pa.array([19_000], pa.date32()), pa.array([1_600_000_000_123_456_789], pa.timestamp("ns"))
    pq.write_table(pa.table({"text": ["a"], "day": days, "time": times}), tmp_path / "a.parquet")
    assert opened("parquet:a.parquet")[0].metadata == {"day": "2022-01-08", "time": "2020-09-13 12:26:40.123456789"}


def test_reading_in_threads_equals_reading_alone(kind, opened, tmp_path):
    WRITERS[kind](tmp_path / "a.data", ROWS * 20)
    source = opened(f"{kind}:a.data")
    order = [i * 37 % 220 for i in range(220)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(source.__getitem__, order))
    assert [d.text for d in together] == [f"text {i % 11} é" for i in order]


def test_corrupt_arrayrecords_are_named(opened, tmp_path):
    path = tmp_path / "a.ar"
    write_arrayrecord(path, [{"text": "a"}, b"{oops"])
    source = opened("arrayrecord:a.ar")
    assert source[0].text == "a"
    with pytest.raises(BadRecord, match=r"a\.ar, record 1: not JSON"):
        source[1]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.ar: not a readable ArrayRecord"):
        opened("arrayrecord:a.ar")


def test_a_flipped_byte_in_an_arrayrecord_is_a_bad_record(opened, tmp_path):
    path = tmp_path / "a.ar"
    write_arrayrecord(path, [{"text": "a" * 100}, {"text": "b"}], "group_size:1,uncompressed")
    data = bytearray(path.read_bytes())
    data[data.index(b"aaaa")] ^= 0xFF
    path.write_bytes(data)
    source = opened("arrayrecord:a.ar")
    with pytest.raises(BadRecord, match=r"a\.ar, record 0: cannot be read"):
        source[0]


# --------------------------------------------------------------------------------------------------------- rules


def test_the_origin_falls_back_to_a_digest_of_the_text():
    one, same, other = (to_document({"text": t, "url": u}, Columns(), "f") for t, u in [("a", ""), ("a", None), ("b", "")])
    assert one.origin == same.origin != other.origin
    assert len(one.origin) == 40
    assert to_document({"text": "a", "url": "www.site.org/x"}, Columns(), "f").origin == "www.site.org"
    assert len(to_document({"text": "a", "url": "http://[broken"}, Columns(), "f").origin) == 40


def test_scalars_become_strings_and_nested_values_are_left_out():
    row = {"text": b"t", "f": 0.1, "i": np.int64(3), "y": b"b", "d": {}, "l": [1], "a": np.zeros(2), "n": None, "e": ""}
    assert to_document(row, Columns(), "f").metadata == {"f": "0.1", "i": "3", "y": "b"}


def test_a_missing_requested_origin_is_a_bad_record():
    with pytest.raises(BadRecord, match="file, line 3: no value in column 'site'"):
        to_document({"text": "a", "site": None}, Columns(origin="site"), "file, line 3")


def test_an_origin_is_in_one_split(opened, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}", "url": f"http://s{i % 60}.org/{i}"} for i in range(600)])
    source = opened("jsonl:a.jsonl")
    held = [source[i].origin for i in range(600) if is_validation(source[i].origin, 0.2)]
    kept = [source[i].origin for i in range(600) if not is_validation(source[i].origin, 0.2)]
    assert not set(held) & set(kept)
    assert 60 <= len(held) <= 240


# ---------------------------------------------------------------------------------------------------------- TFDS

BUILD = """
import pathlib, sys
import numpy as np
import tensorflow_datasets as tfds

class TinyPages(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES = {"1.2.0": "first"}
    pkg_dir_path = pathlib.Path(sys.argv[1])  # a builder outside a package cannot find its folder by itself

    def _info(self):
        features = {"text": tfds.features.Text(), "url": tfds.features.Text(), "words": np.int64}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(0, 20), "validation": self._generate_examples(20, 23)}

    def _generate_examples(self, first, last):
        for i in range(first, last):
            yield i, {"text": f"page {i} é", "url": f"https://site{i % 3}.org/{i}", "words": i}

TinyPages(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A real TFDS set in ArrayRecord, built in another process so that its builder is not registered in this one."""
    folder = tmp_path_factory.mktemp("tfds")
    (folder / "build.py").write_text(textwrap.dedent(BUILD))
    subprocess.run([sys.executable, str(folder / "build.py"), str(folder)], check=True, capture_output=True)
    return folder


def test_a_tfds_set_is_read_without_tensorflow(tfds_dir, tmp_path):
    source = open_source("tfds:tiny_pages", cache_dir=tmp_path, data_dir=tfds_dir)
    documents = sorted((source[i] for i in range(len(source))), key=lambda d: int(d.metadata["words"]))
    assert documents == [
        Document(f"page {i} é", {"url": f"https://site{i % 3}.org/{i}", "words": str(i)}, f"site{i % 3}.org") for i in range(20)
    ]
    assert pickle.loads(pickle.dumps(source))[3] == source[3]
    manifest = json.loads(json.dumps(source.manifest()))
    assert manifest["versions"] == {"tfds": "tiny_pages/1.2.0"}
    assert any("tiny_pages-train.array_record-00000-of-00001" in f["path"] for f in manifest["files"])
    assert "tensorflow" not in sys.modules


def test_tfds_versions_splits_and_slices(tfds_dir, tmp_path):
    def length(spec):
        return len(open_source(spec, cache_dir=tmp_path, data_dir=tfds_dir))

    assert length("tfds:tiny_pages:1.2.0@validation") == 3
    assert length("tfds:tiny_pages@train[:50%]") == 10
    assert open_source("tfds:tiny_pages?text=url&origin=words", cache_dir=tmp_path, data_dir=tfds_dir)[0].text.startswith(
        "https://"
    )


@pytest.mark.fault(23)
def test_a_tfds_set_keeps_few_shards_open(tfds_dir, tmp_path):
    source = open_source("tfds:tiny_pages@train[5:15]", cache_dir=tmp_path, data_dir=tfds_dir)
    assert isinstance(source._records.data_source, ArrayRecords)
    whole = open_source("tfds:tiny_pages", cache_dir=tmp_path, data_dir=tfds_dir)
    assert [source[i] for i in range(10)] == [whole[i] for i in range(5, 15)]


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("tfds:no_such_set", ["no_such_set", "array_record"]),
        ("tfds:tiny_pages:9.9.9", ["9.9.9", "array_record"]),
        ("tfds:ag_news_subset", ["ag_news_subset", "array_record"]),  # known to TFDS, not prepared here
        ("tfds:tiny_pages@trian", ["did you mean 'train'"]),
        ("tfds:tiny_pages?text=txt", ["did you mean 'text'", "features: "]),
    ],
)
def test_a_tfds_set_that_cannot_be_read_says_how_to_prepare_it(spec, parts, tfds_dir, tmp_path):
    with pytest.raises(UserError) as caught:
        open_source(spec, cache_dir=tmp_path, data_dir=tfds_dir)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
