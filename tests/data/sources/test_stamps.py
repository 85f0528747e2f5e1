"""Different content with the same name, size and time is a different corpus."""

import os

import pytest

from metajax.core.errors import UserError
from metajax.data.pipeline import Paths, open_corpora
from metajax.data.sources import open_source
from metajax.data.sources.files import file_stamp, file_stamps
from metajax.data.tokenising import build_token_cache
from metajax.data.tokenizers import Bytes
from tests.data.sources.test_joined import texts
from tests.data.sources.test_sources import WRITERS

pytestmark = pytest.mark.fault(16)


def write(kind, path, rows):
    """Write the rows to a file, with the size and time of the file that it replaces."""
    before = path.stat() if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    WRITERS[kind](path, rows)
    if before is not None:
        assert path.stat().st_size == before.st_size
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change(path, at):
    """Flip one bit of the file and keep its time."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("size", [3, 1000, 3 << 20])
def test_a_change_anywhere_in_a_file_is_noticed(tmp_path, size):
    path = tmp_path / "x"
    path.write_bytes(os.urandom(size))
    stamps = {file_stamp(str(path))}
    for n, at in enumerate((0, size // 3, size - 1), 2):
        change(path, at)
        stamps.add(file_stamp(str(path)))
        assert len(stamps) == n


def test_blocks_across_a_whole_large_file_are_hashed(tmp_path):
    path, share = tmp_path / "x", 1 << 17
    path.write_bytes(bytes(1 << 20))
    before = file_stamp(str(path), share)
    for at in (0, (1 << 16) - 1, (1 << 20) - (1 << 16), (1 << 20) - 1):
        change(path, at)
        assert file_stamp(str(path), share) != before
        change(path, at)
        assert file_stamp(str(path), share) == before
    change(path, 1 << 19)
    assert file_stamp(str(path), share) == before, "a change that the sampled hash cannot see"
    assert file_stamp(str(path)) != before


def test_the_bytes_hashed_of_many_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("metajax.data.sources.files._HASHED_OF_ALL", 10 << 16)
    paths = [str(tmp_path / f"{n}") for n in range(10)]
    for path in paths:
        with open(path, "wb") as file:
            file.write(bytes(1 << 18))
    assert file_stamps(paths) == [file_stamp(path, 1 << 16) for path in paths] != [file_stamp(path) for path in paths]


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_other_text_of_the_same_size_and_time_is_another_corpus(kind, tmp_path):
    prints, read = set(), set()
    for letter in "ab":
        write(kind, tmp_path / "x.data", [{"text": f"some words of {letter} {i}"} for i in range(9)])
        source = open_source(f"{kind}:x.data", cache_dir=tmp_path / "cache", data_dir=tmp_path)
        prints.add(source.fingerprint())
        read.add(source[0].text)
    assert len(prints) == len(read) == 2


def test_other_text_is_tokenised_again(tiny_config, tmp_path):
    path, keys = tmp_path / "a.jsonl", set()
    config = tiny_config(**{"data.sources": (f"jsonl:{path}",)})
    for letter in "ab":
        write("jsonl", path, [{"text": f"words of {letter} {i}"} for i in range(40)])
        corpora = open_corpora(config, Paths(cache=tmp_path / "cache"))
        keys.add(corpora.key)
        assert bytes(corpora.caches[0][0].astype("uint8")) == f"words of {letter} 0".encode()
    assert len(keys) == 2


def test_other_labels_are_another_corpus(tmp_path):
    write("jsonl", tmp_path / "web/0.jsonl", texts("d0", "d1"))
    prints = set()
    for topic in ("Games", "Gamez"):
        write("parquet", tmp_path / "wo/0.parquet", [{"id": "d0", "topic": topic}])
        prints.add(open_source("jsonl:web/0.jsonl?join=wo", cache_dir=tmp_path, data_dir=tmp_path).fingerprint())
    assert len(prints) == 2


def test_a_file_changed_during_tokenising_is_reported(tmp_path):
    path = tmp_path / "a.jsonl"
    write("jsonl", path, [{"text": f"words of {i}"} for i in range(9)])
    source = open_source(f"jsonl:{path}", cache_dir=tmp_path, data_dir=None)

    def make(job, parts):
        for number in parts:
            yield job.make(number)
            change(path, 12)

    with pytest.raises(UserError, match=r"a\.jsonl was changed while it was tokenised; give the same command again"):
        build_token_cache(source, Bytes(), cache_dir=tmp_path, on_bad_record="stop", make=make, part=4)
    assert not list((tmp_path / "tokens").glob("jsonl-????????????"))
