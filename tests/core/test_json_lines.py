"""The reader of JSON lines: line ends, values, and compressed files."""

import bz2
import gzip
from decimal import Decimal

import pyarrow as pa
import pytest

from metajax.core.errors import UserError
from metajax.core.json_lines import lines, parse, records


def zstd(data):
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(data)
    return stream.getvalue().to_pybytes()


# Made once with `printf '{"n": 1}\n' | zstd --long=31`: a window of 2 GiB, and 9 bytes of content.
LONG_WINDOW = bytes.fromhex("28b52ffd04a84900007b226e223a20317d0ad821b831")


@pytest.fixture
def written(tmp_path):
    def write(data, name="a.jsonl"):
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


@pytest.mark.fault(30)
def test_lines_end_at_line_feeds_alone(written):
    data = (
        "\ufeff\n" + '{"t": "a\u2028b\u2029c\x85d\x0b"}\r\n'.replace("\x0b", "\\u000b") + " \t\r\n\n" + '\ufeff{"t": 2}' + "\n\n"
    )
    assert list(records(written(data.encode()))) == [(2, {"t": "a\u2028b\u2029c\x85d\x0b"}), (5, {"t": 2})]
    assert list(lines(written(b""))) == []
    assert [n for n, _ in lines(written(b"\0\0\n1"))] == [1, 2], "zero bytes are not blank"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\0\0", "not JSON"),
        (b'{"a": ', "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b"[" * 100_000, "nested too deeply"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 at byte 0"),
    ],
)
def test_an_unreadable_line_is_named_by_file_and_line(line, reason, written):
    path = written(b'{"a": 1}\n\n' + line)
    with pytest.raises(UserError, match=rf"a\.jsonl, line 3: .*{reason}") as caught:
        list(records(path))
    assert "\n" not in str(caught.value)


@pytest.mark.fault(15)
def test_numbers_beyond_a_float_keep_their_digits():
    assert parse(b'{"a": 1e400, "b": 0.1, "c": -1E+999}') == {"a": Decimal("1e400"), "b": 0.1, "c": Decimal("-1e999")}
    assert parse(b"9" * 5000) == Decimal("9" * 5000)


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("members.gz", gzip.compress(b"1\n", mtime=0) + gzip.compress(b"2\n", mtime=0)),
        ("padded.gz", gzip.compress(b"1\n2\n", mtime=0) + b"\0" * 512),
        ("padded_members.gz", gzip.compress(b"1\n", mtime=0) + b"\0" * 512 + gzip.compress(b"2", mtime=0) + b"\0"),
        ("streams.bz2", bz2.compress(b"1\n") + bz2.compress(b"2\n")),
        ("frames.zst", zstd(b"1\n") + zstd(b"2\n")),
        ("skipped.zst", b"\x50\x2a\x4d\x18\x02\0\0\0hi" + zstd(b"1\n") + b"\x5f\x2a\x4d\x18\x01\0\0\0!" + zstd(b"2\n")),
        ("UPPER.GZ", gzip.compress(b"1\n2\n", mtime=0)),
    ],
)
def test_good_compressed_files_are_read(name, data, written):
    assert list(records(written(data, name))) == [(1, 1), (2, 2)]
    assert list(records(written(gzip.compress(b"", mtime=0), "empty.gz"))) == []


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("name", "data", "remedy"),
    [
        ("a.jsonl.zst", LONG_WINDOW, "rewrite it: zstd --long=31 -dc"),
        ("a.jsonl.gz", b'{"a": 1}\n', r"rename it after its content \(.jsonl for plain lines\)"),
        ("a.jsonl.gz", zstd(b"1\n"), r"rename it after its content \(.zst\)"),
        ("a.jsonl.zst", gzip.compress(b"1\n", mtime=0), r"rename it after its content \(.gz\)"),
        ("a.jsonl.gz", b"", "fetch or write it again"),
        ("a.jsonl.gz", gzip.compress(b"1\n" * 99, mtime=0)[:-9], "fetch or write it again"),
        ("a.jsonl.bz2", bz2.compress(b"1\n" * 99)[:-9], "fetch or write it again"),
        ("a.jsonl.zst", zstd(b"1\n" * 99)[:-3], "fetch or write it again"),
        ("a.jsonl.gz", gzip.compress(b"1\n", mtime=0) + b"rubbish", "fetch or write it again"),
    ],
)
def test_the_remedy_fits_the_damage(name, data, remedy, written):
    with pytest.raises(UserError, match=rf"{name}: .*{remedy}") as caught:
        list(lines(written(data, name)))
    assert "\n" not in str(caught.value)
