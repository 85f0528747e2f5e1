"""The tokenised corpus: its contents, its key, bad records, damage, and several builders at once."""

import errno
import json
import os
import pickle
import resource
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from metajax.core import reading
from metajax.core.atomic import whole_folder
from metajax.core.errors import UserError
from metajax.data import cache as tokens
from metajax.data.cache import build_metadata_table, digest, read_documents
from metajax.data.documents import BUCKETS, BadRecord, is_validation, origin_bucket
from metajax.data.sources import open_source
from metajax.data.tokenising import build_token_cache, in_processes
from metajax.data.tokenizers import Bytes, train_bpe

TEXTS = ["", "a", "héllo wörld", "<|meta|> is text", "x" * 700, "line\nline"]


@pytest.fixture
def corpus(tmp_path):
    """corpus(rows) -> Source over a JSON lines file; a row is a dict or a raw line."""

    def open_(rows, name="corpus.jsonl", options=""):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return open_source(f"jsonl:{name}{options}", cache_dir=tmp_path / "cache", data_dir=tmp_path)

    return open_


def rows(texts=TEXTS):
    return [{"text": text, "origin": f"o{i}", "topic": "ab"[i % 2] * i} for i, text in enumerate(texts)]


def build(source, tmp_path, tokenizer=None, on_bad_record="stop"):
    return build_token_cache(source, tokenizer or Bytes(), cache_dir=tmp_path / "cache", on_bad_record=on_bad_record)


def test_round_trip(corpus, tmp_path):
    cache = build(corpus(rows()), tmp_path)
    for _ in range(2):
        assert len(cache) == len(TEXTS)
        for i, text in enumerate(TEXTS):
            assert cache[i].dtype == np.uint16 and cache[i].tolist() == list(text.encode())
        assert cache.lengths.tolist() == cache.bytes.tolist() == [len(text.encode()) for text in TEXTS]
        assert list(cache.metadata()) == [{"topic": "ab"[i % 2] * i} if i else {} for i in range(len(TEXTS))]
        cache = pickle.loads(pickle.dumps(cache))
    manifest = cache.manifest
    assert (manifest["documents"], manifest["bad_records_skipped"]) == (len(TEXTS), 0)
    assert manifest["tokens"] == manifest["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert manifest["metadata_fields"] == ["topic"] and manifest["source"]["records"] == len(TEXTS)


def test_lengths_are_tokens_and_bytes_are_bytes(corpus, tmp_path):
    bpe = train_bpe("bpe:320", ["x" * 700])
    cache = build(corpus(rows()), tmp_path, bpe)
    for i, text in enumerate(TEXTS):
        assert cache[i].tolist() == bpe.encode(text) and cache.lengths[i] == len(bpe.encode(text))
        assert cache.bytes[i] == len(text.encode())
    assert cache.lengths[4] < cache.bytes[4]


def test_ids_beyond_16_bits(corpus, tmp_path):
    class Wide(Bytes):
        def _encode(self, texts, reading):
            return [[i + 70_000 for i in text.encode()] for text in texts]

        def fingerprint(self):
            return "wide"

    wide = Wide()
    wide.vocabulary = type(wide.vocabulary).above(70_256)
    cache = build(corpus(rows()), tmp_path, wide)
    assert cache[1].tolist() == [70_000 + ord("a")] and cache.manifest["dtype"] == "<u4"


def test_the_first_build_is_opened_again(corpus, tmp_path):
    source = corpus(rows())
    first = build(source, tmp_path)
    stamp = (first.folder / "manifest.json").stat().st_mtime_ns
    assert build(source, tmp_path).folder == first.folder
    assert (first.folder / "manifest.json").stat().st_mtime_ns == stamp
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name], "no working folder is left"


def test_another_tokenizer_or_source_is_another_cache(corpus, tmp_path):
    source = corpus(rows())
    caches = [
        build(source, tmp_path),
        build(source, tmp_path, train_bpe("bpe:320", ["x" * 700])),
        build(corpus(rows([*TEXTS[:-1], "line line"])), tmp_path),
        build(corpus(rows()[:-1]), tmp_path),
        build(corpus([{**row, "topic": "c"} for row in rows()]), tmp_path),
    ]
    assert len({cache.folder for cache in caches}) == len({cache.key for cache in caches}) == len(caches)
    same = build(corpus(rows(), "moved.jsonl"), tmp_path)
    assert same.key == caches[0].key, "the key depends on the content, not on the folder"


def test_a_digest_depends_on_every_part_and_its_place():
    assert len({digest("ab", "c"), digest("a", "bc"), digest("c", "ab"), digest("abc"), digest(["ab", "c"])}) == 5
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) and len(digest()) == 12


# --------------------------------------------------------------------------------------------------- bad records

BAD = [*map(json.dumps, rows()[:2]), "{", json.dumps({"body": "no text"}), json.dumps(rows()[3])]


def test_a_bad_record_stops_with_file_line_and_remedy(corpus, tmp_path):
    with pytest.raises(BadRecord, match=r"corpus\.jsonl, line 3: not JSON.*; --set data\.on_bad_record=skip"):
        build(corpus(BAD), tmp_path)
    assert not list((tmp_path / "cache/tokens").iterdir()), "no partial folder is left"


@pytest.mark.parametrize("last", [[], ["["]])
def test_bad_records_are_skipped_and_counted(corpus, tmp_path, last):
    source = corpus(BAD + last)
    cache = build(source, tmp_path, on_bad_record="skip")
    assert cache.manifest["bad_records_skipped"] == 2 + len(last)
    assert [bytes(cache[i].tolist()).decode() for i in range(len(cache))] == [TEXTS[0], TEXTS[1], TEXTS[3]]
    assert [i for i, document in read_documents(source, "skip") if document is None] == [2, 3, 5][: 2 + len(last)]


def test_no_usable_record(corpus, tmp_path):
    with pytest.raises(UserError, match=r"no usable document.*2 bad records"):
        build(corpus(BAD[2:4]), tmp_path, on_bad_record="skip")


def test_more_documents_than_one_chunk(corpus, tmp_path):
    lines = [json.dumps({"text": f"text {i}"}) if i % 100 else "{" for i in range(1100)]
    cache = build(corpus(lines), tmp_path, on_bad_record="skip")
    assert (len(cache), cache.manifest["bad_records_skipped"]) == (1089, 11)
    assert bytes(cache[1088].tolist()) == b"text 1099"


# ------------------------------------------------------------------------------------------------- several parts


def _parts(source, home, workers=1, part=2):
    make = partial(in_processes, workers=workers)
    return build_token_cache(source, Bytes(), cache_dir=home, on_bad_record="skip", make=make, part=part)


def _files(cache):
    return {path.name: path.read_bytes() for path in cache.folder.iterdir()}


def test_parts_make_one_cache_whatever_the_number_of_processes(corpus, tmp_path):
    source = corpus([*rows()[:3], "{", *rows()[3:]])
    whole, one, two = (_parts(source, tmp_path / f"{n}-{part}", n, part) for n, part in ((1, 100), (1, 2), (2, 2)))
    files = _files(one)
    assert {name for name in files if name.startswith("tokens")} == {f"tokens-{n:05d}.array_record" for n in range(4)}
    assert files == _files(two)
    assert [one[i].tolist() for i in range(6)] == [whole[i].tolist() for i in range(6)] and list(one.metadata()) == list(
        whole.metadata()
    )
    assert one.origins.tolist() == whole.origins.tolist() and one.manifest["bad_records_skipped"] == 1
    assert {k: v for k, v in one.manifest.items() if k != "sha256"} == {k: v for k, v in whole.manifest.items() if k != "sha256"}


def test_finished_parts_are_reused(corpus, tmp_path):
    source = corpus(rows())
    made = _parts(source, tmp_path)
    before, [parts] = _files(made), (tmp_path / "tokens").glob("*.parts-2")
    shutil.rmtree(made.folder)
    shutil.rmtree(parts / "00001")
    times = {n: (parts / n / "part.json").stat().st_mtime_ns for n in ("00000", "00002")}
    assert _files(_parts(source, tmp_path)) == before
    assert times == {n: (parts / n / "part.json").stat().st_mtime_ns for n in times}, "only what was missing has been made"


@pytest.mark.fault(23)
@pytest.mark.skipif(sys.platform != "linux", reason="counts open files")
def test_the_files_of_tokens_that_are_open_at_once_are_bounded(corpus, tmp_path, monkeypatch):
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > reading.OPEN * 4
    monkeypatch.setattr(reading, "_kept", lru_cache(4)(reading._kept.__wrapped__))
    texts = [f"text {i}" for i in range(24)]
    cache = _parts(corpus(rows(texts)), tmp_path, part=1)
    for _ in range(2):
        assert [bytes(cache[i].tolist()).decode() for i in range(len(texts))] == texts
    opened = [path.resolve().name for path in Path("/proc/self/fd").iterdir()]
    assert 0 < sum(name.startswith("tokens-") for name in opened) <= 8


@pytest.mark.fault(23)
def test_a_refusal_of_the_system_is_no_damage(corpus, tmp_path, monkeypatch):
    def refused(path):
        raise RuntimeError(f"open() failed: {os.strerror(errno.EMFILE)}; reading {path}")

    cache = build(corpus(rows()), tmp_path)
    monkeypatch.setattr(tokens, "open_reader", refused)
    with pytest.raises(UserError, match=r"tokens\.array_record: Too many open files; this process may have \d+ files open"):
        cache[0]


# ------------------------------------------------------------------------------------------ split by whole origin


def test_split_by_whole_origins(corpus, tmp_path):
    table = [{"text": f"{i}", "origin": f"site{i % 40}"} for i in range(200)]
    cache = build(corpus(table), tmp_path)
    before = set()
    on_the_border = sorted(origin_bucket(f"site{i}") for i in range(40))[20] / BUCKETS
    for share in (0.1, 0.3, on_the_border, 0.8):
        train, validation = (cache.documents(split, share).tolist() for split in ("train", "validation"))
        assert sorted(train + validation) == list(range(200)) and validation
        assert not {i % 40 for i in train} & {i % 40 for i in validation}, "no origin on both sides"
        assert validation == [i for i in range(200) if is_validation(f"site{i % 40}", share)], (
            "as the tokenizer's training saw it"
        )
        assert before <= set(validation), "a larger share only adds origins"
        before = set(validation)


# ------------------------------------------------------------------------------------------------ metadata tables


def test_metadata_table(corpus, tmp_path):
    source = corpus([{"text": "t", "topic": "é"}, {"text": "t", "url": "u"}, {"text": "t", "topic": "bc", "url": "u"}])
    cache = build(source, tmp_path)
    for _ in range(2):
        table = build_metadata_table(cache, Bytes(), "<{topic}>")
        assert table.present.tolist() == [True, False, True]
        strings = [bytes(table.ids[a:b].tolist()).decode() for a, b in zip(table.offsets, table.offsets[1:], strict=False)]
        assert strings == ["<é>", "", "<bc>"]
        assert table.ids.dtype == np.int32 and table.offsets.dtype == np.int64
    both = build_metadata_table(cache, Bytes(), "{topic}{url}")
    assert both.present.tolist() == [False, False, True], "another template is another table"
    bpe = train_bpe("bpe:320", ["<bc>" * 100])
    assert build_metadata_table(cache, bpe, "<{topic}>").ids.tolist() == bpe.encode("<é>") + bpe.encode("<bc>")
    assert not list((cache.folder / "metadata").glob(".making-*"))


# ------------------------------------------------------------------------------------------------ builders at once


def _build(arguments):
    path, home = arguments
    source = open_source(f"jsonl:{path}", cache_dir=home, data_dir=None)
    return build_token_cache(source, Bytes(), cache_dir=home, on_bad_record="stop").key


def test_threads_that_build_the_same_cache(corpus, tmp_path):
    source = corpus(rows() * 50)
    with ThreadPoolExecutor(4) as pool:
        caches = list(pool.map(lambda _: build(source, tmp_path), range(4)))
        tables = list(pool.map(lambda cache: build_metadata_table(cache, Bytes(), "{topic}"), caches))
    assert len({cache.key for cache in caches}) == 1 and all(len(cache) == 300 for cache in caches)
    assert all(table.offsets.tolist() == tables[0].offsets.tolist() for table in tables)
    assert not list((tmp_path / "cache/tokens").glob(".making-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_processes_that_build_the_same_cache(corpus, tmp_path):
    corpus(rows() * 50)
    with get_context("forkserver").Pool(3) as pool:
        keys = pool.map(_build, [(tmp_path / "corpus.jsonl", tmp_path / "cache")] * 3)
    assert len(set(keys)) == 1
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 1


def test_a_folder_is_complete_or_absent(tmp_path):
    target = tmp_path / "deep/target"
    with pytest.raises(RuntimeError), whole_folder(target) as work:
        (work / "half").touch()
        raise RuntimeError
    assert list((tmp_path / "deep").iterdir()) == []
    with whole_folder(target) as slow:
        (slow / "slow").touch()
        with whole_folder(target) as quick:
            (quick / "quick").touch()
    assert [path.name for path in target.iterdir()] == ["quick"], "the folder of the first process stays"
    assert list((tmp_path / "deep").iterdir()) == [target]


def test_a_failed_rename_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(UserError, match="cannot write"), whole_folder(tmp_path / "target"):
        pass
    assert not list(tmp_path.iterdir())
