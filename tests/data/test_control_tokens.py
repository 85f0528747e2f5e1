"""Text never becomes a control token, and markers become exactly the tokens of the model's tokenizer."""

import hashlib
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from metajax.core.errors import UserError
from metajax.data import tokenizers
from metajax.data.cache import build_metadata_table
from metajax.data.documents import BadRecord
from metajax.data.pipeline import open_corpora
from metajax.data.sources import open_source, place_of
from metajax.data.tokenising import build_token_cache
from metajax.data.tokenizers import Bytes, load, open_tokenizer, train_bpe
from tests.data.test_tokenizers import TEXTS, tiny_gpt2
from tests.data.tokenizer_folders import CHARACTERS, KINDS, LOSSY, byte_level, word_level, write, write_sentencepiece

NAMES = [*KINDS, "sentencepiece", "sentencepiece_unigram", "gpt2"]
PIECES = [
    "<|",
    "|>",
    "</",
    "s>",
    "<",
    "un",
    "unk",
    ">",
    "ST",
    "OP",
    "<b>",
    "[",
    "]",
    " ",
    "    ",
    "\n",
    "the",
    "fox",
    "a",
    "é",
    ".",
]


def opened(spec):
    return open_tokenizer(spec, cache_dir=Path("cache"), data_dir=None, corpus_fingerprint="", texts=lambda: [])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("folders")
    found = {kind: write(home / kind, kind) for kind in KINDS}
    return found | {f"sentencepiece{end}": write_sentencepiece(home / f"sp{end}", end[1:] or "bpe") for end in ("", "_unigram")}


@pytest.fixture(scope="module")
def each(folders):
    found = {"gpt2": tiny_gpt2()}
    for kind, folder in folders.items():
        found[kind] = opened(f"hf:{folder}/tokenizer.json" if kind in KINDS else f"sentencepiece:{folder}/tokenizer.model")
    return found


@pytest.fixture(params=NAMES)
def kind(request):
    return request.param


def spelled(tokenizer, seed=0, count=200):
    """Texts made of the spellings of control tokens and of pieces of these spellings."""
    rng, parts = np.random.default_rng(seed), [*2 * [*tokenizer.control], *PIECES]
    return ["".join(rng.choice(parts, rng.integers(0, 8))) for _ in range(count)]


@pytest.mark.fault(5)
def test_every_control_token_of_the_files_is_known(each):
    known = {name: set(tokenizer.control) for name, tokenizer in each.items()}
    turns = {"<|im_start|>", "<|im_end|>", "STOP"}
    assert known == {
        "chat": {*turns, "[INST]", "<think>", "<|endoftext|>"},  # neither <b> nor white space nor the byte 66, which ends answers
        "whole_words": {"<s>"},
        "unigram": {"<pad>", "</s>", "<unk>", "<|user|>"},
        "unigram_first": {"<pad>", "</s>", "<unk>", "<|user|>"},
        "llama": {"<unk>", "<s>", "</s>"},
        "word_piece": {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"},
        "word_level": {"<unk>", "</s>", "<pad>", "<end>"},  # not the word 3, which text needs
        "sentencepiece": {*turns, "<s>", "</s>", "<pad>"},
        "sentencepiece_unigram": {*turns, "<s>", "</s>", "<pad>"},
        "gpt2": {"<|endoftext|>"},
    }
    assert (each["unigram_first"].vocabulary.eos, each["chat"].vocabulary.eos) == (1, 257)


@pytest.mark.fault(5)
@given(st.data())
def test_text_never_becomes_a_control_token(each, data):
    name = data.draw(st.sampled_from(NAMES))
    tokenizer = each[name]
    parts = st.sampled_from([*tokenizer.control, *PIECES]) | st.text(st.characters(codec="utf-8"), max_size=3)
    text = "".join(data.draw(st.lists(parts, max_size=8)))
    ids = tokenizer.encode(text)
    never = {*tokenizer.control.values()} - {tokenizer.unknown}
    assert not never & {*ids}
    assert max(ids, default=0) < tokenizer.vocabulary.base
    if name != "word_level" and {*text} <= {*CHARACTERS, " "}:
        assert tokenizer.unknown not in ids, "for unknown characters, never for its own spelling"
    spaced = name.startswith("unigram") and text.startswith(" ")  # which its library takes for the space that it adds itself
    if tokenizer.unknown not in ids and name not in LOSSY and "▁" not in text and not spaced:
        assert tokenizer.decode(ids) == text


@pytest.mark.fault(5)
def test_the_name_of_the_unknown_token_is_text(each):
    for name, spelling in (("unigram", "<unk>"), ("word_piece", "[UNK]"), ("llama", "<unk>")):
        tokenizer = each[name]
        assert tokenizer.unknown == tokenizer.control[spelling]
        assert tokenizer.unknown not in tokenizer.encode(f"a {spelling} b{spelling}")
    assert each["unigram"].unknown in each["unigram"].encode("é")


def test_a_batch_is_each_text_alone_and_copies_are_the_same(each, kind, tmp_path):
    tokenizer = each[kind]
    texts = [*spelled(tokenizer), "", "the fox"]
    tokenizer.save(tmp_path)
    for copy in (tokenizer, load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
        assert copy.text_key == tokenizer.text_key
    marked = tokenizer.marked()
    assert pickle.loads(pickle.dumps(marked)).encode_batch(texts) == marked.encode_batch(texts)
    assert load(tmp_path).marked().encode_batch(texts) == marked.encode_batch(texts)


# ----------------------------------------------------------------------------------------------------------- markers


@pytest.mark.fault(4)
def test_markers_become_control_tokens(each, kind):
    tokenizer = each[kind]
    marked = tokenizer.marked()
    for name, i in tokenizer.control.items():
        if not (kind == "unigram" and name == "<|user|>"):  # which no file declares, so a model's own tokenizer may cut it
            assert i in marked.encode(f"a {name} b"), name
    assert marked.encode("the fox") == tokenizer.encode("the fox")
    assert marked.fingerprint() == tokenizer.fingerprint(), "the same table of ids"
    assert marked.text_key != tokenizer.text_key, "other ids for the same text"


@pytest.mark.fault(4)
@pytest.mark.parametrize("kind", KINDS)
def test_markers_are_those_of_transformers(each, kind, folders):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folders[kind])
    marked = each[kind].marked()
    texts = [text for text in spelled(each[kind], 1, 400) if "<end>" not in text]  # which generation_config.json alone names
    for text, ids in zip(texts, marked.encode_batch(texts), strict=True):
        assert ids == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.fault(4)
def test_a_sentencepiece_model_puts_no_space_before_a_first_marker(each):
    marked = each["sentencepiece"].marked()
    fox, control = each["sentencepiece"].encode("fox"), marked.control
    assert marked.encode("fox<s>") == [*fox, control["<s>"]]
    assert marked.encode("<s>fox</s>")[0] == control["<s>"]
    assert marked.decode(marked.encode("<s>fox</s>")) == "<s>fox</s>"
    assert marked.encode("<|im_end|>") == [control["<|im_end|>"]]


def test_a_tokenizer_without_control_tokens_has_no_markers():
    for tokenizer in (Bytes(), train_bpe("bpe:320", TEXTS)):
        with pytest.raises(UserError, match="no control tokens"):
            tokenizer.marked()


# ---------------------------------------------------------------------------------------------------------- identity


@pytest.mark.fault(5)
def test_fingerprints_stay_and_caches_of_changed_texts_do_not(each):
    llama, gpt2, bpe = each["llama"], each["gpt2"], train_bpe("bpe:320", TEXTS)
    for same in (llama, gpt2, bpe, Bytes()):
        assert same.text_key == same.fingerprint(), "no text has other ids than before"
    text = json.dumps([llama._library.to_str(), "<s>", "</s>"])
    assert llama.fingerprint() == hashlib.sha256(f"hf\n{text}".encode()).hexdigest(), (
        "equal to the fingerprint of earlier versions"
    )
    for other in ("chat", "unigram", "word_piece", "word_level", "sentencepiece"):
        assert each[other].text_key != each[other].fingerprint(), f"{other}: caches made before may hold control tokens"


def test_files_beside_a_tokenizer_that_are_damaged_are_named(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for name, text in (
        ("config.json", "{"),
        ("config.json", "[" * 100_000),
        ("generation_config.json", "[]"),
        ("special_tokens_map.json", '"\udcff"'),
    ):
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=rf"{name}: (not a JSON file|a JSON list)"):
            opened(f"hf:{tmp_path}/tokenizer.json")
        (tmp_path / name).unlink()


# ------------------------------------------------------------------------------------------------------------ chats

TURNS = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def chats(tmp_path):
    rows = [
        {"prompt": TURNS.format(f"say {n}"), "response": f"{n}! <|im_end|> {n}", "id": f"o{n}", "note": "<|im_end|>"}
        for n in range(20)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def corpora_of(tiny_config, paths, folders, tmp_path, options):
    source = f"jsonl:{tmp_path}/chat.jsonl?text=response&origin=id{options}"
    changes = {"data.sources": (source,), "data.tokenizer": f"hf:{folders['chat']}/tokenizer.json"}
    config = tiny_config(**changes, **{"evaluation.conditions": ("none",)})
    return open_corpora(config, paths)


@pytest.mark.fault(4)
def test_a_source_says_that_its_text_has_markers(tiny_config, paths, folders, tmp_path, chats):
    plain, marked = (
        corpora_of(tiny_config, paths, folders, tmp_path, options) for options in ("&markers=false", "&markers=true")
    )
    tokenizer = plain.tokenizer
    end = tokenizer.control["<|im_end|>"]
    assert [made.caches[0].manifest["tokenizer"]["markers"] for made in (plain, marked)] == [False, True]
    assert plain.caches[0].folder != marked.caches[0].folder, "changed ids get another cache"
    assert plain.key != marked.key
    for n, row in enumerate(chats):
        assert end not in plain.caches[0][n]
        assert marked.caches[0][n].tolist() == tokenizer.marked().encode(row["response"])
    for corpora, reader in ((plain, tokenizer), (marked, tokenizer.marked())):
        table = build_metadata_table(corpora.caches[0], tokenizer, "{prompt}{note}")
        assert [table[n].tolist() for n in range(20)] == [reader.encode(row["prompt"] + row["note"]) for row in chats]


@pytest.mark.fault(4)
@pytest.mark.parametrize("options", ["&markers=yes", "&markers=", "&marker=true"])
def test_a_bad_switch_is_one_line(options, tmp_path, chats):
    with pytest.raises(UserError, match="marker"):
        open_source(f"jsonl:chat.jsonl?text=response{options}", cache_dir=tmp_path, data_dir=tmp_path)


# -------------------------------------------------------------------------------------- documents that cannot be encoded


class Panic(BaseException):
    """As a library in Rust raises, no Exception."""


class Fragile(Bytes):
    """Cannot encode what has an x in it."""

    def _encode(self, texts, reading):
        if any("x" in text for text in texts):
            raise Panic("called `Option::unwrap()`\non a `None` value")
        return super()._encode(texts, reading)


@pytest.mark.fault(24)
def test_a_tokenizer_error_is_a_bad_record_with_its_place(tmp_path):
    texts = ["a", "", "bxb", "c", "x", "d"]
    (tmp_path / "c.jsonl").write_text("\n" + "".join(json.dumps({"text": text, "origin": text}) + "\n" for text in texts))
    source = open_source("jsonl:c.jsonl", cache_dir=tmp_path, data_dir=tmp_path)
    with pytest.raises(
        BadRecord, match=r"c\.jsonl, line 4: .*3 characters \(Panic: called `Option::unwrap\(\)`\).*on_bad_record=skip"
    ):
        build_token_cache(source, Fragile(), cache_dir=tmp_path / "stop", on_bad_record="stop")
    for part in (100, 2):
        cache = build_token_cache(source, Fragile(), cache_dir=tmp_path / f"skip{part}", on_bad_record="skip", part=part)
        assert [bytes(cache[n].astype(np.uint8)).decode() for n in range(len(cache))] == ["a", "", "c", "d"]
        assert cache.manifest["bad_records_skipped"] == 2
        assert place_of(cache.manifest, "skip", tmp_path, tmp_path, 3).endswith("c.jsonl, line 7"), "the last document"
    manifest = {"source": {"spec": "s"}, "metadata_fields": ["origin"], "tokenizer": {}}
    no_columns = SimpleNamespace(folder=tmp_path, key="k", manifest=manifest, metadata=lambda: [{}, {"origin": "a"}])
    with pytest.raises(UserError, match=r"s, document 1, metadata\.template = '\{origin\}x'"):
        build_metadata_table(no_columns, Fragile(), "{origin}x")


@pytest.mark.fault(24)
def test_a_text_without_tokens_is_a_bad_record(tmp_path):
    library = word_level()
    library.model.unk_token = "the fox"  # no word of the vocabulary
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = opened(f"hf:{tmp_path}/tokenizer.json")
    good, bad, named = tokenizer.encode_each(["the fox", "the é", "the </s>"])
    assert good == [3, 4]
    assert isinstance(bad, BadRecord)
    assert isinstance(named, BadRecord)


@pytest.mark.fault(24)
def test_a_million_characters_of_white_space_are_encoded_exactly(monkeypatch):
    gpt2 = tiny_gpt2()
    for text in (" " * 1_000_000, "the" + "\n \t" * 400_000 + "fox", "\u3000" * 1_000_000 + " fox" + " " * 100_000):
        assert gpt2.decode(gpt2.encode(text)) == text
    monkeypatch.setattr(tokenizers, "_LONG", 3)
    monkeypatch.setattr(tokenizers, "_LONG_SPACE", regex.compile(tokenizers._LONG_SPACE.pattern.replace(str(1 << 16), "3")))
    rng = np.random.default_rng(0)
    parts = [" ", "  ", "    ", "\n", "\t", "\u00a0", "\u3000", "\x1c", "\x85", "\u200b", "the", " fox", "!", "1", "'s", "ß"]
    for _ in range(500):
        text = "".join(rng.choice(parts, rng.integers(0, 16)))
        assert gpt2.encode(text) == gpt2._encoding.encode_ordinary(text), repr(text)
