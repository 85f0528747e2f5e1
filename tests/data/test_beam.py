"""Parts of a tokenised corpus by Apache Beam: on two runners, the cache equals that of local processes byte for byte."""

import json
from functools import partial
from importlib.util import find_spec

import pytest

from metajax.cli.main import main
from metajax.core.errors import UserError
from metajax.data.beam import on_beam
from metajax.data.sources import open_source
from metajax.data.tokenising import build_token_cache, in_processes
from metajax.data.tokenizers import train_bpe

# The two that DirectRunner chooses between, by name: by itself it first fetches a third one from the network.
HERE = "--runner=BundleBasedDirectRunner"
TWO = ["--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner", "--direct_num_workers=2", "--direct_running_mode"]
ROWS = [{"text": f"text {i} " * 9, "origin": f"o{i % 3}", "topic": "ab"[i % 2] * i} for i in range(7)]


@pytest.fixture
def build(tmp_path):
    """build(folder, make, on_bad_record) -> the cache of ROWS with a bad record as the fourth, in parts of two records."""
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "corpus.jsonl").write_text("\n".join([*lines[:3], "{", *lines[3:]]))
    source, bpe = open_source("jsonl:corpus.jsonl", cache_dir=tmp_path, data_dir=tmp_path), train_bpe("bpe:320", ["text " * 99])
    return lambda folder, make, on_bad_record="skip": build_token_cache(
        source, bpe, cache_dir=tmp_path / folder, on_bad_record=on_bad_record, make=make, part=2
    )


def files(cache):
    return {path.name: path.read_bytes() for path in cache.folder.iterdir()}


@pytest.mark.beam
@pytest.mark.skipif(find_spec("apache_beam") is None, reason="needs Apache Beam")
def test_the_cache_is_the_same_whatever_the_runner_and_the_number_of_workers(build, tmp_path):
    away = f"--temp_location={tmp_path / 'away'}"
    local = build("local", in_processes)
    assert len(local) == 7 and len(list(local.folder.glob("tokens-*"))) == 4
    assert files(build("processes", partial(on_beam, options=[*TWO, "multi_processing", away]))) == files(local)
    facts = {path: path.stat().st_mtime_ns for path in (tmp_path / "away").glob("*/*/part.json")}
    assert len(facts) == 4, "the parts are where the option says"
    assert files(build("again", partial(on_beam, options=[HERE, away]))) == files(local)
    assert facts == {path: path.stat().st_mtime_ns for path in facts}, "parts on the shared folder are reused"
    assert files(build("shared", partial(on_beam, options=[HERE]))) == files(local)
    remedy = r"corpus\.jsonl, line 4: not JSON.*; --set data\.on_bad_record=skip leaves such records out and counts them$"
    for options in ([HERE], [*TWO, "multi_threading"]):  # one raises what a worker raised, the other one tells of it
        with pytest.raises(UserError, match=remedy):
            build("stopped", partial(on_beam, options=options), "stop")


def test_without_beam(build, monkeypatch):
    monkeypatch.setattr("metajax.data.beam.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'metajax\[beam\]'"):
        build("none", partial(on_beam, options=[]))


def test_options_after_beam_go_to_its_runner(tiny_corpus, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("metajax.data.beam.on_beam", lambda job, parts, options: seen.extend(options) or in_processes(job, parts))
    monkeypatch.setattr("metajax.data.pipeline.build_token_cache", partial(build_token_cache, part=50))
    corpus = ["--set", f"data.sources=jsonl:{tiny_corpus}", "--set", "data.tokenizer=byte", "--cache-dir", str(tmp_path)]
    assert main(["cache", "quickstart/plain", *corpus, "--beam", "--runner=R", "--project", "P"]) == 0
    assert seen == ["--runner=R", "--project", "P"] and "120 documents" in capsys.readouterr().out
    assert main(["cache", "quickstart/plain", "--workers", "999", "--beam"]) == 2
    assert "--beam: not allowed with argument --workers" in capsys.readouterr().err
