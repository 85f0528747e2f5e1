"""Reading the user's files: few are open at a time, and errors of the system are distinguished from damaged files."""

import errno
import gzip
import json
import os
import pickle
import random
import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from metajax.core import reading
from metajax.core.array_records import ArrayRecords
from metajax.core.errors import UserError
from metajax.data.cache import read_documents
from metajax.data.documents import BadRecord
from metajax.data.sources import open_source


def write(path, rows):
    body = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".ar":
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(json.dumps(row).encode())
        writer.close()
    else:
        path.write_bytes(gzip.compress(body.encode()) if path.suffix == ".gz" else body.encode())


@pytest.fixture
def open_files():
    """open_files(count): until the test ends, this process can open only `count` more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def leave(room):
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + room, limits[1]))

    yield leave
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.fault(23)
@pytest.mark.parametrize(("kind", "suffix"), [("jsonl", "jsonl"), ("jsonl", "gz"), ("parquet", "parquet"), ("arrayrecord", "ar")])
def test_many_files_need_few_handles(kind, suffix, tmp_path, open_files):
    for n in range(60):
        write(tmp_path / f"{n:02d}.{suffix}", [{"text": f"{n} {i}", "url": f"https://{n}.org"} for i in range(2)])
    reading._kept.cache_clear()
    open_files(24)
    source = pickle.loads(pickle.dumps(open_source(f"{kind}:*.{suffix}", cache_dir=tmp_path, data_dir=tmp_path)))
    order = list(range(120)) if suffix == "gz" else random.Random(0).sample(range(120), 120)
    assert [source[i].text for i in order] == [f"{i // 2} {i % 2}" for i in order]


@pytest.mark.fault(23)
@pytest.mark.parametrize(("kind", "suffix"), [("jsonl", "jsonl"), ("jsonl", "gz"), ("parquet", "parquet"), ("arrayrecord", "ar")])
def test_a_lack_of_file_handles_is_no_bad_record(kind, suffix, tmp_path, open_files):
    write(tmp_path / f"a.{suffix}", [{"text": "a"}])
    source = open_source(f"{kind}:a.{suffix}", cache_dir=tmp_path, data_dir=tmp_path)
    len(source)
    reading._kept.cache_clear()
    open_files(0)
    held = []
    with pytest.raises(OSError, match="Too many"):  # gaps between the open files, too
        while True:
            held.append(os.open(tmp_path, os.O_RDONLY))
    try:
        with pytest.raises(UserError, match=rf"a\.{suffix}: Too many open files; .*ulimit -n") as caught:
            list(read_documents(source, "skip"))
    finally:
        for descriptor in held:
            os.close(descriptor)
    assert not isinstance(caught.value, BadRecord)


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "x"), "Input/output error; check the disk"),
        (OSError(errno.ESTALE, "x"), "Stale file handle; check the mount"),
        (OSError(errno.ENFILE, "x"), "Too many open files in system; this machine"),
        (RuntimeError("read() failed: Input/output error; reading a"), "Input/output error; check the disk"),
        (RuntimeError("open() failed: Too many open files in system"), "Too many open files in system; this machine"),
        (MemoryError(), "Cannot allocate memory; free some"),
        (pa.ArrowMemoryError("malloc"), "Cannot allocate memory; free some"),
        (OSError(errno.EXDEV, "x"), "Invalid cross-device link; repair that"),
    ],
)
def test_a_refusal_of_the_machine_is_no_damage(error, said):
    with pytest.raises(UserError, match=rf"a\.x: {said}") as caught, reading.reading("a.x", BadRecord):
        raise error
    assert not isinstance(caught.value, BadRecord)


def test_library_errors_are_damage_and_bucket_errors_pass():
    for error in (pa.ArrowInvalid("bad\nmore"), OSError("bad"), RuntimeError("bad"), EOFError("bad"), gzip.BadGzipFile("bad")):
        with pytest.raises(BadRecord, match=r"^bad$"), reading.reading("a.x", BadRecord):
            raise error
    for error in (OSError("Forbidden: no"), ConnectionResetError(errno.ECONNRESET, "x"), TimeoutError("x")):
        with pytest.raises(type(error)) as caught, reading.reading("gs://b/a", BadRecord):
            raise error
        assert caught.value is error


@pytest.mark.fault(23)
def test_a_false_arrayrecord_file_is_refused(tmp_path):
    for name, data in (("garbage", b"rubbish" * 20_000), ("short", b"rubbish"), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: not a readable ArrayRecord file"):
            ArrayRecords([(str(tmp_path / name), 0, None)])
    with pytest.raises(UserError, match="gone: No such file or directory; put it back"):
        ArrayRecords([(str(tmp_path / "gone"), 0, None)])


@pytest.mark.fault(21)
def test_a_file_name_may_look_like_a_range_of_records(tmp_path):
    write(tmp_path / "a[1:2].ar", [{"text": str(n)} for n in range(3)])
    os.rename(tmp_path / "a[1:2].ar", tmp_path / "a[1:2]")
    records = ArrayRecords([(str(tmp_path / "a[1:2]"), 0, None), (str(tmp_path / "a[1:2]"), 1, 2)])
    assert [json.loads(records[i])["text"] for i in range(len(records))] == ["0", "1", "2", "1", "2"]
    with pytest.raises(IndexError):
        records[5]
