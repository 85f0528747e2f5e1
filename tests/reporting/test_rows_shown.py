"""Rows for people: the description of spans of positions, and their looks."""

import numpy as np
import pytest

from metajax.config import Metadata, MetaTokens
from metajax.data.meta_tokens import inject
from metajax.data.metadata import MetadataIds, Placement, delimiters
from metajax.data.packing import pack
from metajax.data.positions import Spot, before
from metajax.data.rows import RowSource, finish
from metajax.data.tokenizers import Bytes
from metajax.reporting.rows import for_page, spans, summary

TOKENIZER = Bytes()


def source(texts, strings, capacity=40):
    encoded = [np.array(list(text.encode()), np.int32) for text in (*texts, *strings)]
    bodies, ids = encoded[: len(texts)], encoded[len(texts) :]
    offsets = np.cumsum([0, *map(len, ids)])
    side = MetadataIds(np.concatenate(ids), offsets, np.arange(len(texts)), *delimiters(Metadata(), TOKENIZER))
    sides, documents = Placement(((Spot("", before, 0.0), side),)), np.arange(len(texts))
    index = pack(documents, np.array([len(b) + 1 for b in bodies]), sides.overhead(documents), capacity, "concat")
    return RowSource(index, bodies.__getitem__, sides, TOKENIZER.vocabulary, capacity)


def test_letters_stay_whole_and_show_their_loss():
    row = finish(source(["Éé à."], ["ü"])[0], attend_across_documents=False)
    found = spans(row, TOKENIZER)
    assert [str(run) for run in found] == [
        "1 text     | metadata x 0 | <|eot|>",
        "1 metadata | metadata x 0 | <|context_begin|>ü",
        "1 metadata | body         | <|context_end|>",
        "1 text     | body         | Éé à",
        "1 text     | end          | .",
    ]
    looks = [{str(span.style).strip() for span in run.text.spans} for run in found]
    assert looks == [{"dim"}, {"blue dim"}, {"blue"}, set(), set()]


@pytest.mark.parametrize("loss", ["skip_meta_targets", "real_only"])
def test_spans_with_meta_tokens_count_their_targets(loss):
    row = source(["abcdefgh"], ["xy"])[0]
    row = inject(
        row, np.random.default_rng(0), meta=MetaTokens(inject="periodic", loss=loss), count=20, meta_id=TOKENIZER.vocabulary.meta
    )
    found = spans(finish(row, attend_across_documents=False), TOKENIZER)
    assert [run.holds for run in found] == ["text", "metadata", "text"]
    text = found[2].text
    assert text.plain.replace("<|meta|>", "") == "abcdefgh" and "<|meta|>" in text.plain
    assert {str(span.style).split()[0] for span in text.spans} >= {"magenta"}
    asked = dict(part.split(" ", 1)[::-1] for part in found[2].asked.split(", "))
    assert int(asked["body"]) == 7 and int(asked["end"]) == 1, "the metadata predicts the first letter"


def test_a_page_shows_a_limited_number_of_letters(monkeypatch):
    rows = [finish(row, attend_across_documents=False) for row in source(["abcdefgh", "ijkl"], ["xy", "z"])]
    (documents,) = for_page(rows, TOKENIZER, 1)
    assert [document["document"] for document in documents] == [1, 2]
    for document, words, kind in zip(documents, ("abcdefgh", "ijkl"), ("xy", "z"), strict=True):
        assert words in "".join(text for text, kind, _ in document["pieces"] if not kind)
        assert kind in "".join(text for text, kind, silent in document["pieces"] if kind == "metadata" and silent)
    monkeypatch.setattr("metajax.reporting.rows.PAGE_LETTERS", 40)
    cut = "".join(text for text, *_ in for_page(rows, TOKENIZER, 1)[0][0]["pieces"])
    assert cut.endswith(" ...") and len(cut) == 40 + 4


def test_a_summary_counts_beginnings_and_metadata():
    words = summary(source(["a" * 60, "b" * 5], ["xyz", "x"]))
    assert (
        words
        == "2 rows, 50.0% begin inside a document; metadata tokens a document with delimiters: median 3, 95 % within 5, at most 5"
    )
