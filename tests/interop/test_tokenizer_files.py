"""Exported tokenizers in other programs: the same ids for every text, BOS at the start, and reserved ids in their places."""

import json

import pytest
import sentencepiece
import tokenizers as library

from metajax.data.encoding import RESERVED
from metajax.data.tokenizers import Bytes, Gpt2, open_tokenizer, train_bpe
from metajax.interop.tokenizer_files import byte_characters, merges_of, write_tokenizer

TEXTS = ["The old fox runs to the mètre; it's 12 o'clock.\n", "日本 🙂 ẞ  two  spaces\n\n<|meta|> and <|endoftext|> as text"]


def trained():
    return train_bpe("bpe:320", TEXTS * 20)


def gpt2():
    """A vocabulary in GPT-2's form whose merges are those of a trained tokenizer."""
    characters = {character: byte for byte, character in enumerate(byte_characters())}
    text, _, _ = json.loads(trained().content())
    vocab = sorted(json.loads(text)["model"]["vocab"].items(), key=lambda item: item[1])
    whole = [bytes(characters[c] for c in token) for token, _ in vocab]
    tokens = sorted(whole, key=len)[:256] + [token for token in whole if len(token) > 1]
    return Gpt2("gpt2:made", {token: rank for rank, token in enumerate(tokens)})


MADE = {"byte": Bytes, "bpe": trained, "gpt2": gpt2}


@pytest.mark.parametrize("kind", MADE)
def test_a_tokenizer_made_here_is_the_same_elsewhere(tmp_path, kind):
    tokenizer = MADE[kind]()
    words = tokenizer.vocabulary
    write_tokenizer(tokenizer, tmp_path, rows=words.size, length=64)
    other = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [other.token_to_id(name) for name in RESERVED] == list(range(words.base, words.base + 16))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert [other.token_to_id(config[f"{end}_token"]) for end in ("bos", "eos")] == [words.bos, words.eos]
    plain = TEXTS[0]
    assert other.encode(plain).ids == [words.bos, *tokenizer.encode(plain)], "as other programs encode"
    assert other.decode(tokenizer.encode(plain)) == plain
    again = open_tokenizer("hf:tokenizer.json", cache_dir=tmp_path, data_dir=tmp_path, corpus_fingerprint="", texts=list)
    assert again.vocabulary == words, "imported again nothing is reserved twice"
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) and again.decode(tokenizer.encode(text)) == text


def test_an_imported_tokenizer_stays_as_it_came(tmp_path):
    """Without rows for the reserved ids, the file has none of them and keeps its own post-processor."""
    own = library.Tokenizer.from_str(json.loads(trained().content())[0])
    own.add_special_tokens([library.AddedToken("</s>")])
    own.post_processor = library.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", own.token_to_id("</s>"))])
    own.save(str(tmp_path / "own.json"))
    tokenizer = open_tokenizer("hf:own.json", cache_dir=tmp_path, data_dir=tmp_path, corpus_fingerprint="", texts=list)
    write_tokenizer(tokenizer, tmp_path, rows=tokenizer.vocabulary.base, length=64)
    other = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.get_vocab() == own.get_vocab() and other.encode("fox").ids == own.encode("fox").ids
    assert "bos_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_a_sentencepiece_model_stays_as_it_is(tmp_path):
    options = {"model_prefix": str(tmp_path / "tiny"), "vocab_size": 300, "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 20), **options)
    spec = "sentencepiece:tiny.model"
    tokenizer = open_tokenizer(spec, cache_dir=tmp_path, data_dir=tmp_path, corpus_fingerprint="", texts=list)
    write_tokenizer(tokenizer, tmp_path, rows=tokenizer.vocabulary.size, length=64)
    assert (tmp_path / "tokenizer.model").read_bytes() == (tmp_path / "tiny.model").read_bytes()


def test_bytes_and_merges():
    assert set(byte_characters()) == set(library.pre_tokenizers.ByteLevel.alphabet()) and len(set(byte_characters())) == 256
    shown = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é \n")[0][0]
    assert "".join(byte_characters()[byte] for byte in "é \n".encode()) == shown
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    assert merges_of(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc")]
