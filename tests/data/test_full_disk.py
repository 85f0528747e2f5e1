"""A disk that is full while a corpus is tokenised: one line names the folder, no partial files, the same command continues."""

import contextlib
import errno
import json
import resource
from pathlib import Path

import pytest

from metajax.cli.main import main
from metajax.core.fields import override
from metajax.core.sealed import HASHES, Sealed
from metajax.data.pipeline import Paths, open_corpora, phase_rows
from metajax.data.sources import open_source
from metajax.data.sources.built import open_or_build
from metajax.data.tokenising import build_token_cache
from metajax.data.tokenizers import Bytes

pytestmark = pytest.mark.fault(35)
ROWS = [
    {"text": f"{i} " * (200 + i % 50), "topic": " ".join(str(i * k % 997) for k in range(400)), "origin": f"o{i}"}
    for i in range(64)
]


@pytest.fixture
def small_disk(capsys):
    """small_disk(bytes): writing beyond that size fails as on a full disk; printed text stays in memory."""

    @contextlib.contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "corpus.jsonl"


def whole_folders(cache):
    """Every file below the cache is in an intact sealed folder, and no other file exists."""
    folders = {path.parent for path in cache.rglob("*") if path.is_file()}
    assert not list(cache.rglob(".making-*"))
    for folder in folders:
        for name in Sealed(folder).files:
            Sealed(folder).path(name)
    return len(folders)


def more_and_more(small_disk, cache, act):
    """Call `act` on larger and larger disks until it succeeds; return the number of failures and the intact folders after each."""
    found = []
    for step in range(60):
        try:
            with small_disk(int(100 * 1.35**step)):
                act()
            return found
        except OSError as error:
            assert error.errno == errno.EFBIG and Path(error.filename).is_relative_to(cache), error
            found.append(whole_folders(cache))
    raise AssertionError("never succeeded")


def test_any_file_of_a_cache_may_meet_the_full_disk(small_disk, corpus, tiny_config, tmp_path):
    changes = {"data.sources": (f"jsonl:{corpus}",), "data.tokenizer": "bpe:320", "metadata": {"template": "{topic}"}}
    config = override(tiny_config(), {**changes, "data.sequence_length": 4096})

    def rows(cache):
        found = phase_rows(open_corpora(config, Paths(cache=cache)), 0)
        return [found[n]["tokens"].tolist() for n in range(len(found))]

    failures = more_and_more(small_disk, tmp_path / "cache", lambda: rows(tmp_path / "cache"))
    assert set(failures) >= {0, 1, 2}, "before the tokenizer, before the tokens, before the table or the rows"
    assert rows(tmp_path / "cache") == rows(tmp_path / "another")


def test_finished_parts_are_reused_on_a_larger_disk(small_disk, corpus, tmp_path):
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    rows[40]["topic"] = "".join(chr(0x4E00 + (7 * i) % 9973) for i in range(60_000))
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(f"jsonl:{corpus}", cache_dir=tmp_path, data_dir=None)

    def build(cache):
        return build_token_cache(source, Bytes(), cache_dir=cache, on_bad_record="stop", part=16)

    failures = more_and_more(small_disk, tmp_path / "cache", lambda: build(tmp_path / "cache"))
    assert {0, 2} <= set(failures), "the third of four parts is the one that does not fit"
    made, other = build(tmp_path / "cache"), build(tmp_path / "another")
    assert [made[i].tolist() for i in range(64)] == [other[i].tolist() for i in range(64)] and made.manifest == other.manifest


def test_a_built_corpus_on_a_full_disk(small_disk, tmp_path):
    source = open_source("generated:40", cache_dir=tmp_path, data_dir=None)
    documents = [source[i] for i in range(40)]
    failures = more_and_more(small_disk, tmp_path, lambda: open_or_build("kind", "kind", "1", tmp_path, lambda: (documents, {})))
    assert failures and open_or_build("kind", "kind", "1", tmp_path, list)[3].text == documents[3].text


@pytest.mark.parametrize("limit", [2_000, 40_000])
def test_a_full_disk_is_one_line_of_the_command(small_disk, corpus, tmp_path, capsys, limit):
    settings = (f"data.sources=jsonl:{corpus}", "data.tokenizer=bpe:320")
    command = ["cache", "quickstart/plain", *(word for setting in settings for word in ("--set", setting))]
    command += ["--cache-dir", str(tmp_path / "cache")]
    with small_disk(limit):
        assert main(command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("tokenising", "training"))]
    kind = "tokenizers" if limit < 3_000 else "tokens"
    assert len(errors) == 1 and errors[0].startswith(f"error: {tmp_path}/cache/{kind}/") and "make room" in errors[0]
    assert main(command) == 0
    assert (next((tmp_path / "cache/tokens").iterdir()) / HASHES).exists()
