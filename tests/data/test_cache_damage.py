"""Every file of a cache damaged in every way: the reader gives one line that names the folder to delete, or the same numbers."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from metajax.cli.main import main
from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.core.sealed import HASHES, Sealed
from metajax.data.cache import TokenCache, build_metadata_table
from metajax.data.documents import Document
from metajax.data.pipeline import Paths, open_corpora, phase_rows
from metajax.data.sources import open_source
from metajax.data.sources.built import open_or_build
from metajax.data.tokenising import build_token_cache
from metajax.data.tokenizers import Bytes
from metajax.evaluation.validation import validation
from tests.damage import DAMAGES, cases

pytestmark = pytest.mark.fault(8)


def write_corpus(path, letters):
    """Documents in the order of the letters; texts and topics have the same lengths for all letters."""
    rows = [
        {
            "text": " ".join(letters[(i * k) % 7] * 3 for k in range(1, 4 + i % 9)),
            "topic": " ".join(letters[(i + k) % 7] for k in range(i % 4)),
            "origin": f"{i}",
        }
        for i in (range(24) if letters[0] < letters[-1] else reversed(range(24)))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def numbers(config, cache):
    """A digest of everything that a run reads."""
    corpora = open_corpora(config, Paths(cache=cache))
    rows = phase_rows(corpora, 0)
    found = [rows[n] for n in range(len(rows))]
    found += [row for condition in config.evaluation.conditions for row in validation(corpora, condition).batches]
    digest = hashlib.sha256(repr(sorted(corpora.caches[0].manifest.items())).encode())
    for row in found:
        for name, values in sorted(row.items()):
            digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def home(tiny_config, tmp_path_factory):
    """(config, cache, the cache of a corpus of other letters, digest of the first)."""
    made = []
    for letters in ("abcdefg", "nmlkjih"):
        folder = tmp_path_factory.mktemp(letters)
        write_corpus(folder / "corpus.jsonl", letters)
        changes = {"data.sources": (f"jsonl:{folder}/corpus.jsonl",), "data.tokenizer": "bpe:320", "data.sequence_length": 64}
        changes |= {"metadata": {"template": "{topic}"}, "evaluation.conditions": ("right", "shuffled")}
        config = override(tiny_config(), changes)
        made.append((config, folder / "cache", numbers(config, folder / "cache")))
    (config, cache, whole), (_, another, _) = made
    return config, cache, another, whole


def counterpart(cache, path, another):
    """A file of the same name and kind in the other cache, with another content; lengths where there is none."""
    found = [p for p in sorted(another.rglob(path.rpartition("/")[2])) if str(p.relative_to(another))[:4] == path[:4]]
    return next((p for p in found if p.read_bytes() != (cache / path).read_bytes()), next(another.rglob("lengths.npy")))


def test_every_damage_of_every_file_is_reported_or_harmless(home, tmp_path):
    config, cache, another, whole = home
    arrays = {f"{name}.npy" for name in ("lengths", "bytes", "origins", "crc32", "files", "ids", "offsets", "present", "pieces")}
    others = {"tokens.array_record", "metadata.parquet", "manifest.json", "tokenizer.json", "hashes.json"}
    assert {path.rpartition("/")[2] for path, _ in cases(cache)} == arrays | others
    harmless, made_again = set(), set()
    for n, (path, name) in enumerate(cases(cache)):
        copy = tmp_path / str(n)
        shutil.copytree(cache, copy)
        DAMAGES[name](copy / path, counterpart(cache, path, another))
        folder = (copy / path).parent
        try:
            assert numbers(config, copy) == whole, (path, name)
            harmless.add((path.rpartition("/")[2], name))
        except UserError as error:
            assert str(error).startswith(f"{folder}/") and f"delete the folder {folder}, and" in str(error), (path, name, error)
            assert "\n" not in str(error)
            if path.partition("/")[0] not in made_again:
                made_again.add(path.partition("/")[0])
                shutil.rmtree(folder)
                assert numbers(config, copy) == whole, "the same command makes it again"
        shutil.rmtree(copy)
    assert made_again == {"rows", "tokenizers", "tokens"}
    contents = {("metadata.parquet", name) for name in ("flip", "garbage", "others")}  # which nothing here reads again
    assert harmless <= contents | {("tokens.array_record", "flip")}, "a bit that no record uses"


def test_metadata_is_checked_when_a_table_is_made_of_it(home, tmp_path):
    _, cache, another, _ = home
    [made] = (cache / "tokens").iterdir()
    for name in ("flip", "garbage", "others"):
        folder = tmp_path / name / "tokens" / made.name
        shutil.copytree(made, folder)
        DAMAGES[name](folder / "metadata.parquet", counterpart(cache, f"tokens/{made.name}/metadata.parquet", another))
        with pytest.raises(UserError, match=f"metadata.parquet: changed or damaged .* delete the folder {folder}, and"):
            build_metadata_table(TokenCache(folder), Bytes(), "<{topic}>")


def test_no_byte_of_the_tokens_changes_unnoticed(tmp_path):
    """The first kilobytes hold the records and the last ones the index."""
    write_corpus(tmp_path / "corpus.jsonl", "abcdefg")
    made = build(tmp_path)
    path, texts = made.folder / "tokens.array_record", [made[i].tolist() for i in range(len(made))]
    data = path.read_bytes()
    assert b"\0" * (len(data) // 4) in data
    told = 0
    for at in [n for n, byte in enumerate(data) if byte][::5] + list(range(0, len(data), 997)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        try:
            cache = TokenCache(made.folder)
            assert [cache[i].tolist() for i in range(len(cache))] == texts
        except UserError as error:
            told += str(error).startswith(f"{path}: changed or damaged")
    assert told > 100


def build(home, part=100):
    source = open_source("jsonl:corpus.jsonl", cache_dir=home / "cache", data_dir=home)
    return build_token_cache(source, Bytes(), cache_dir=home / "cache", on_bad_record="stop", part=part)


def content(cache):
    return [cache[i].tolist() for i in range(len(cache))], list(cache.metadata()), cache.bytes.tolist(), cache.manifest


def test_parts_are_checked_before_they_are_joined(home, tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", "abcdefg")
    made = build(tmp_path, part=9)
    whole = content(made)
    shutil.rmtree(made.folder)
    [parts] = (tmp_path / "cache/tokens").iterdir()
    for name in ("flip", "cut", "missing", "others"):
        for path in sorted((parts / "00001").iterdir()):
            before = path.read_bytes()
            DAMAGES[name](path, parts / "00002" / path.name)
            with pytest.raises(UserError, match=f"{path}: .* delete the folder {parts}/00001, and"):
                build(tmp_path, part=9)
            path.write_bytes(before)
    assert [p.name for p in parts.parent.iterdir()] == [parts.name], "no partial folder"
    shutil.rmtree(parts / "00001")
    assert content(build(tmp_path, part=9)) == whole, "the same command makes it again"


def test_the_right_one_of_several_files_of_tokens_is_named(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", "abcdefg")
    made = build(tmp_path, part=9)
    data = bytearray((made.folder / "tokens-00001.array_record").read_bytes())
    data[64:96] = bytes(32)
    (made.folder / "tokens-00001.array_record").unlink()
    (made.folder / "tokens-00001.array_record").write_bytes(data)
    with pytest.raises(UserError, match=r"tokens-00001\.array_record: changed or damaged"):
        content(TokenCache(made.folder))


def test_a_swapped_folder_is_noticed(home, tmp_path):
    _, cache, another, _ = home
    for kind in ("tokens", "rows", "tokenizers"):
        ours, theirs = (next((folder / kind).iterdir()) for folder in (cache, another))
        Sealed(ours)
        shutil.copytree(theirs, tmp_path / kind / ours.name)
        with pytest.raises(UserError, match=f"{HASHES}: changed or damaged"):
            Sealed(tmp_path / kind / ours.name)


def test_added_files_are_ignored(home, tmp_path):
    config, cache, _, whole = home
    shutil.copytree(cache, tmp_path / "cache")
    for folder in [path.parent for path in (tmp_path / "cache").rglob(HASHES)]:
        (folder / ".DS_Store").write_bytes(b"\0")
        (folder / "tokens-00009.array_record").write_bytes(b"x")
    assert numbers(config, tmp_path / "cache") == whole


def test_a_built_corpus_is_checked(tmp_path):
    folder, documents = tmp_path / "corpora/kind-1", [Document("some words", {"topic": "a"}, "here")]

    def made():
        return open_or_build("kind", "kind", "1", tmp_path, lambda: (documents, {}))

    first = made()[0]
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for name in set(DAMAGES) - {"others", "folder"}:
            DAMAGES[name](path, path)
            with pytest.raises(UserError, match=f"{path}: .*; delete the folder {folder}, and"):
                made()
            path.write_bytes(data)
    shutil.rmtree(folder)
    assert made()[0] == first and path.read_bytes() == data, "the same command makes it again"


def test_a_damaged_cache_is_one_line_of_the_command(home, tmp_path, capsys):
    config, cache, _, _ = home
    shutil.copytree(cache, tmp_path / "cache")
    settings = [
        f"data.sources={config.data.sources[0]}",
        "data.tokenizer=bpe:320",
        "data.sequence_length=64",
        "data.validation_share=0.2",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    command = ["show", "quickstart/plain", "--rows", "1", *words, "--cache-dir", str(tmp_path / "cache")]
    assert main(command) == 0
    [folder] = (tmp_path / "cache/tokens").iterdir()
    for name in ("bytes.npy", "tokens.array_record"):
        DAMAGES["garbage"](folder / name, folder)
        capsys.readouterr()
        assert main(command) == 2
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if line.startswith("error")] == said and len(said) == 1
        assert f"{folder / name}: changed or damaged" in said[0]
        shutil.rmtree(folder)
        assert main(command) == 0
