"""CLIP's tokenizer compared with OpenAI's."""

import gzip
import html
import json
from pathlib import Path

import numpy as np
import pytest

from metajax.core.errors import UserError
from metajax.vision.data.clip_tokens import ClipTokenizer

GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDEN = json.loads((GOLDENS / "clip_tokens_a.json").read_text())


def test_ids_and_texts_equal_the_goldens(clip_tokenizer):
    assert (clip_tokenizer.size, clip_tokenizer.start, clip_tokenizer.end) == (49_408, GOLDEN["sot"], GOLDEN["eot"])
    assert len(GOLDEN["items"]) == 41
    for item in GOLDEN["items"]:
        assert clip_tokenizer.encode(item["text"]) == item["encode"], item["text"]
        assert clip_tokenizer.decode(item["encode"]) == item["decode"]
    inside = clip_tokenizer.encode('x "<|endoftext|>"')
    assert clip_tokenizer.end not in inside, "after punctuation the spelling is punctuation"


@pytest.mark.fault(5)
def test_a_caption_never_becomes_start_or_end(clip_merges):
    clip_tokenizer = ClipTokenizer.open(clip_merges, markers=False)
    for text in ("<|endoftext|>", "a <|STARTOFTEXT|>cat<|endoftext|> dog", "&lt;|endoftext|&gt;", "<|endoftext|><|endoftext|>"):
        ids = clip_tokenizer.encode(text)
        assert not {clip_tokenizer.start, clip_tokenizer.end} & set(ids), text
        assert clip_tokenizer.decode(ids).replace(" ", "") == html.unescape(text).lower().replace(" ", "")
        row = clip_tokenizer.tokenize([text])[0]
        assert (row == clip_tokenizer.end).sum() == 1
        assert row.argmax() == len(ids) + 1, "the text's vector is at the largest id"


def test_rows_equal_the_goldens(clip_tokenizer):
    refused = 0
    for item in GOLDEN["items"]:
        if item["tokenize77"] is None:
            refused += 1
            with pytest.raises(UserError, match="tokens, but a text has 77; shorten it"):
                clip_tokenizer.tokenize([item["text"]])
            assert clip_tokenizer.tokenize([item["text"]], cut=True)[0].tolist() == item["tokenize77_truncate"]
        else:
            assert clip_tokenizer.tokenize([item["text"]])[0].tolist() == item["tokenize77"]
    assert refused == 2
    for item in GOLDEN["short_context"]:
        rows = clip_tokenizer.tokenize([item["text"]], item["context_length"], cut=True)
        assert (rows.dtype, rows[0].tolist()) == (np.int32, item["ids"])


def test_a_wrong_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"bpe_simple_vocab_16e6.txt.gz: no such file; .* open-clip-torch==3.3.0"):
        ClipTokenizer.open(tmp_path)
    (tmp_path / "merges.txt").write_text("#version\na b\n")
    with pytest.raises(UserError, match="not CLIP's 48894 merges"):
        ClipTokenizer.open(tmp_path)
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(b"junk"))
    with pytest.raises(UserError, match="is not CLIP's 924691ac288e"):
        ClipTokenizer.open(tmp_path)
