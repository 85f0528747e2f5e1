import json
import os
import pickle
from pathlib import Path

import pytest
import sentencepiece
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from metajax.core.errors import UserError
from metajax.data.encoding import RESERVED
from metajax.data.tokenizers import Bytes, Gpt2, load, open_tokenizer, train_bpe, vocabulary_of

TEXTS = [
    f"The {a} {b} runs to the {b}; it's {i} o'clock.\n"
    for i in range(20)
    for a in ("red", "old")
    for b in ("fox", "dog", "mètre")
]
SPELLED = "a <|meta|> b <|endoftext|> <s> </s> <|context_begin|>"
GOLDENS = Path(__file__).parent.parent / "goldens"


def tiny_gpt2():
    """A vocabulary in GPT-2's form: all bytes, then a few merges."""
    ranks = {bytes([i]): i for i in range(256)}
    for token in (b"th", b"the", b" t", b"ox", b"fox"):
        ranks[token] = len(ranks)
    return Gpt2("gpt2:tiny", ranks)


def tiny_sentencepiece(folder, **options):
    prefix = str(folder / "tiny")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=prefix, vocab_size=296, byte_fallback=True, minloglevel=2, **options
    )
    return Path(f"{prefix}.model")


def tiny_hf(folder, **config):
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|meta|>"]
    trainer = library.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    model.train_from_iterator(TEXTS, trainer)
    model.post_processor = library.processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    model.enable_truncation(4)
    model.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def opened(spec, data_dir, **changes):
    arguments = {"cache_dir": data_dir / "cache", "data_dir": data_dir, "corpus_fingerprint": "f" * 64, "texts": lambda: TEXTS}
    return open_tokenizer(spec, **{**arguments, **changes})


@pytest.fixture(scope="module")
def each(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny_sentencepiece(folder)
    tiny_hf(folder)
    made = [Bytes(), train_bpe("bpe:320", TEXTS), tiny_gpt2()]
    return {t.kind: t for t in [*made, opened("sentencepiece:tiny.model", folder), opened("hf:tokenizer.json", folder)]}


@pytest.fixture(params=("byte", "bpe", "gpt2", "sentencepiece", "hf"))
def tokenizer(request, each):
    return each[request.param]


def test_the_vocabulary_table_is_in_order_and_padded(tokenizer):
    v = tokenizer.vocabulary
    assert v.size % 64 == 0
    assert v.base + 16 <= v.size < v.base + 16 + 64
    assert (v.pad, v.meta, v.context_begin, v.context_end) == tuple(v.base + i for i in (1, 2, 3, 4))
    assert v.spare == tuple(range(v.base + 5, v.base + 16))
    assert RESERVED[:10] == tuple(
        f"<|{n}|>" for n in ["eot", "pad", "meta", "context_begin", "context_end", "s1", "s2", "s3", "s4", "s5"]
    )
    assert len(set(RESERVED)) == 16


def test_text_comes_back_and_reserved_names_in_text_stay_text(tokenizer):
    for text in ("The fox", TEXTS[3].strip(), SPELLED, "日本 🙂 ẞ"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocabulary.base
        assert not {tokenizer.vocabulary.bos, tokenizer.vocabulary.eos} & set(ids)


def test_reserved_ids_are_shown_by_name(tokenizer):
    v = tokenizer.vocabulary
    ids = [v.meta, *tokenizer.encode("the fox"), v.context_end, v.pad]
    assert tokenizer.decode(ids) == "<|meta|>the fox<|context_end|><|pad|>"
    for outside in (-1, v.size):
        with pytest.raises(UserError, match="outside its table"):
            tokenizer.decode([outside])


def test_every_id_of_the_table_can_be_shown(tokenizer):
    assert isinstance(tokenizer.decode(range(tokenizer.vocabulary.size)), str)


def test_a_batch_is_each_text_alone(tokenizer):
    texts = [*TEXTS[:5], "", SPELLED]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]
    assert tokenizer.encode("") == []


def test_saved_and_pickled_copies_are_the_same(tokenizer, tmp_path):
    assert tokenizer.save(tmp_path) == tmp_path / "tokenizer.json"
    for copy in (load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert type(copy) is type(tokenizer)
        assert copy.spec == tokenizer.spec
        assert copy.vocabulary == tokenizer.vocabulary
        assert copy.fingerprint() == tokenizer.fingerprint()
        assert copy.encode(SPELLED) == tokenizer.encode(SPELLED)
    assert opened(f"run:{tmp_path}", tmp_path).fingerprint() == tokenizer.fingerprint(), "of the run that saved it"


def test_a_changed_or_missing_copy_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        load(tmp_path)
    path = train_bpe("bpe:320", TEXTS).save(tmp_path)
    path.write_text(path.read_text().replace("fox", "fix"))
    with pytest.raises(UserError, match=r"tokenizer\.json: (changed|not a saved)"):
        opened(f"run:{tmp_path}", tmp_path)
    path.write_text("{}")
    with pytest.raises(UserError, match="not a saved tokenizer"):
        load(tmp_path)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_bpe_and_gpt2_are_lossless(each, text):
    for kind in ("byte", "bpe", "gpt2"):
        assert each[kind].decode(each[kind].encode(text)) == text


def test_vocabularies_known_without_files():
    gpt2 = vocabulary_of("gpt2:somewhere")
    assert (gpt2.base, gpt2.size, gpt2.bos, gpt2.eos) == (50257, 50304, 50256, 50256)
    assert 50257 < gpt2.meta < 50304
    assert vocabulary_of("bpe:2048").size == 2048
    assert vocabulary_of("bpe:2048").base == 2032
    byte = vocabulary_of("byte")
    assert (byte.base, byte.size, byte.bos, byte.eos) == (256, 320, 256, 256)
    assert vocabulary_of("hf:x") is None
    assert vocabulary_of("sentencepiece:x") is None


@pytest.mark.parametrize("spec", ["bpe", "bpe:", "bpe:100", "bpe:256", "bpe:1000", "bpe:-64", "bpe:x", "gtp2:x", "byte:3"])
def test_a_bad_spec_is_one_plain_line(spec, tmp_path):
    for act in (lambda: vocabulary_of(spec), lambda: opened(spec, tmp_path)):
        with pytest.raises(UserError) as caught:
            act()
        assert spec in str(caught.value)
        assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- BPE


def test_training_twice_gives_the_same_tokenizer():
    prints = {train_bpe("bpe:384", TEXTS).fingerprint() for _ in range(3)}
    assert len(prints) == 1
    assert train_bpe("bpe:320", TEXTS).fingerprint() not in prints


def test_bpe_fills_its_table_and_shortens_text():
    bpe = train_bpe("bpe:320", TEXTS)
    assert bpe.vocabulary == vocabulary_of("bpe:320")
    assert max(max(bpe.encode(t)) for t in TEXTS) > 255
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2


def test_a_corpus_too_small_for_the_merges_keeps_the_table():
    assert train_bpe("bpe:2048", ["tiny"]).vocabulary == vocabulary_of("bpe:2048")


def test_bpe_is_trained_once_for_a_corpus(tmp_path):
    first = opened("bpe:320", tmp_path)

    def fail():
        raise AssertionError("trained again")

    assert opened("bpe:320", tmp_path, texts=fail).fingerprint() == first.fingerprint()
    assert [p.name for p in (tmp_path / "cache" / "tokenizers").iterdir()] == ["bpe-320-ffffffffffff"]
    with pytest.raises(AssertionError, match="trained again"):
        opened("bpe:320", tmp_path, texts=fail, corpus_fingerprint="0" * 64)
    (tmp_path / "cache" / "tokenizers" / "bpe-320-ffffffffffff" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"bpe-320-ffffffffffff/tokenizer\.json: .*delete"):
        opened("bpe:320", tmp_path)


# --------------------------------------------------------------------------------------------- files from outside


@pytest.mark.parametrize("spec", ["gpt2:none", "sentencepiece:none.model", "hf:none.json", "run:none"])
def test_a_missing_file_is_named_with_the_remedy(spec, tmp_path):
    with pytest.raises(UserError, match=r"none.*no such file; \w+"):
        opened(spec, tmp_path)
    with pytest.raises(UserError, match="is missing, write"):
        opened(spec.partition(":")[0], tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    for name in ("vocab.bpe", "encoder.json", "x"):
        (tmp_path / name).write_text("junk")
    with pytest.raises(UserError, match=r"vocab\.bpe: sha256 .* is not GPT-2's 1ce1664773c5"):
        opened("gpt2:.", tmp_path)
    with pytest.raises(UserError, match="x: not a SentencePiece model"):
        opened("sentencepiece:x", tmp_path)
    with pytest.raises(UserError, match="x: not a tokenizer"):
        opened("hf:x", tmp_path)


def test_sentencepiece_keeps_its_own_ends(tmp_path):
    with_ends = opened(f"sentencepiece:{tiny_sentencepiece(tmp_path)}", tmp_path).vocabulary
    assert (with_ends.base, with_ends.bos, with_ends.eos) == (296, 1, 2)
    without = opened(f"sentencepiece:{tiny_sentencepiece(tmp_path, bos_id=-1, eos_id=-1)}", tmp_path).vocabulary
    assert (without.bos, without.eos) == (296, 296)


def test_hf_ends_come_from_the_file_or_from_the_config_beside_it(tmp_path):
    plain = opened(f"hf:{tiny_hf(tmp_path)}", tmp_path)
    assert (plain.vocabulary.bos, plain.vocabulary.eos) == (0, 1)
    assert len(plain.encode(TEXTS[0])) > 4  # the file's truncation and its <s> ... </s> are not applied
    config = {"bos_token": "</s>", "eos_token": {"content": "<|meta|>"}}
    told = opened(f"hf:{tiny_hf(tmp_path, **config)}", tmp_path)
    assert (told.vocabulary.bos, told.vocabulary.eos) == (1, 2)
    assert told.decode([0, *told.encode("fox"), 1]) == "<s>fox</s>"
    told.save(tmp_path / "run")
    assert load(tmp_path / "run").vocabulary == told.vocabulary


def test_gpt2_equals_the_golden_ids(tmp_path):
    folder = os.environ.get("METAJAX_GPT2_DIR")
    if not folder:
        pytest.skip("METAJAX_GPT2_DIR does not name a folder with vocab.bpe and encoder.json of GPT-2")
    gpt2 = opened(f"gpt2:{folder}", tmp_path)
    assert gpt2.vocabulary == vocabulary_of("gpt2")
    items = json.loads((GOLDENS / "gpt2_tokens_a.json").read_text())["items"]
    assert len(items) == 41
    for item in items:
        assert gpt2.encode(item["text"]) == item["ids"]
        assert gpt2.decode(item["ids"]) == item["text"]
        assert gpt2.decode(item["ids_special_allowed"]) == item["text"]
    gpt2.save(tmp_path)
    assert load(tmp_path).fingerprint() == gpt2.fingerprint()
