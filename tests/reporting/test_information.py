"""Entropies and mutual information of fields on corpora with known values."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metajax.core.errors import UserError
from metajax.data.documents import Document, Source
from metajax.data.sources import open_source
from metajax.reporting.information import Words, entropy, mutual_information, number_values, survey

COLUMNS = st.lists(st.tuples(*[st.sampled_from(["a", "b", "c", None])] * 2), min_size=1, max_size=40)


def test_values_are_numbered_as_they_come():
    assert number_values(["x", None, "y", "x"]).tolist() == [0, -1, 1, 0]


def test_entropy_by_hand():
    assert entropy(np.array([0, 1, 2, 3])) == 2
    assert entropy(np.array([0, 0, 0, 1, -1, -1])) == pytest.approx(0.75 * np.log2(4 / 3) + 0.25 * 2)
    assert entropy(np.array([-1, -1])) == 0


@given(COLUMNS)
def test_information_is_symmetric_and_no_more_than_either_entropy(rows):
    a, b = (number_values(list(column)) for column in zip(*rows, strict=True))
    both = (a >= 0) & (b >= 0)
    common = mutual_information(a, b)
    assert common == pytest.approx(mutual_information(b, a), abs=1e-9)
    assert -1e-9 <= common <= min(entropy(a[both]), entropy(b[both])) + 1e-9
    assert mutual_information(a, a) == pytest.approx(entropy(a))


def documents(count=2000, words=40, seed=0):
    """Two equally frequent topics with words of their own and common words; a word reveals its topic with probability 1/2."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        topic = rng.integers(2)
        own = rng.random(words) < 0.5
        drawn = np.where(own, 10 + 8 * topic, 0) + rng.integers(8, size=words)
        metadata = {"topic": f"t{topic}", "noise": f"n{rng.integers(2)}", "id": str(i), "url": f"https://s{topic}.org/{i}"}
        found.append(Document(" ".join(f"w{w}" for w in drawn), metadata, f"origin{i // 4}"))
    return found


def test_bits_saved_are_the_information_of_a_field_and_a_word():
    """Half of the words belong to one topic and reveal it: half a bit on average."""
    corpus = documents()
    words = Words(corpus)
    saved = {name: words.bits_saved(number_values([d.metadata[name] for d in corpus])) for name in ("topic", "noise", "id")}
    assert saved["topic"] == pytest.approx(0.5, abs=0.01)
    assert saved["noise"] == pytest.approx(0, abs=0.003)
    assert saved["id"] == pytest.approx(0, abs=1e-9), "values that were not counted"
    assert words.bits_saved(np.full(len(corpus), -1)) is None


class Corpus(Source):
    spec = "corpus"

    def __init__(self, documents):
        self.documents = list(documents)

    def __len__(self):
        return len(self.documents)

    def read(self, records):
        return (self.documents[n] for n in records)

    def fingerprint(self):
        return ""


def test_a_survey():
    found = survey(Corpus(documents(400)), ["{topic}, {noise}", "{topic|or_unknown}"])
    fields = {f.name: f for f in found.fields}
    assert list(fields)[:4] == ["id", "noise", "topic", "url"]
    assert {f"url|{part}" for part in ("scheme", "host", "domain", "tld", "path")} < fields.keys()
    assert fields["url|domain"].distinct == 2 and fields["url|path"].distinct == fields["id"].distinct == 400
    assert fields["{topic}, {noise}"].distinct == 4
    assert fields["topic|or_unknown"].entropy == fields["topic"].entropy > 0.99
    assert (found.every, found.origins, len(found.sizes)) == (1, 100, 400)
    pair = found.pairs[found.paired.index("topic")][found.paired.index("url|host")]
    assert pair == pytest.approx(fields["topic"].entropy) and "id" not in found.paired
    no_groups = survey(Corpus(Document("a b", {"id": str(n)}, str(n)) for n in range(4)))
    assert no_groups.pairs == [] and [f.distinct for f in no_groups.fields] == [4], "no two documents have a value in common"
    with pytest.raises(UserError, match="did you mean 'host'"):
        survey(Corpus(documents(10)), ["{url|hots}"])


@pytest.mark.fault(29)
def test_a_survey_refuses_no_corpus(tmp_path):
    """Names that need quoting, unreadable records and undecodable values are accepted; rare columns are left out."""
    rows = [
        {"text": f"a{i}", "og:title": f"t{i % 2}", "": "e", "a{b}": "x", "meta": {"url": f"https://s{i}.org/x"}} for i in range(6)
    ]
    rows[5]["blob"] = "\ud800"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    found = survey(
        open_source("jsonl:a.jsonl", cache_dir=tmp_path, data_dir=tmp_path),
        ['{"og:title"|top1}, {meta.url|host}', "{absent|or_unknown}"],
    )
    fields = {field.name: field for field in found.fields}
    assert {'"og:title"', '""', '"a{b}"', "meta.url", "meta.url|host", '{"og:title"|top1}, {meta.url|host}'} < fields.keys()
    assert (
        fields["absent|or_unknown"].common == [("unknown", 6)]
        and fields['""'].entropy == 0
        and str(fields['""'].entropy) == "0.0"
    )
    assert (
        [note.partition(" ")[0] for note in found.notes] == ["1", "column"]
        and "line 7" in found.notes[0]
        and "'blob'" in found.notes[1]
    )
    wide = survey(
        Corpus([Document("a b", {f"c{n}": "x" for n in range(300)} | {"all": "y"}, "o"), Document("a", {"all": "y"}, "o")])
    )
    assert len(wide.fields) == 200 and "all" in {field.name for field in wide.fields} and "301 columns" in wide.notes[0]


@pytest.mark.fault(14)
def test_a_survey_reports_documents_without_an_origin(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"a {i}", "page": i}) + "\n" for i in range(5)))
    (note,) = survey(open_source("jsonl:a.jsonl", cache_dir=tmp_path, data_dir=tmp_path)).notes
    assert "5 of 5 documents have no origin" in note and "?origin=" in note
    assert not survey(open_source("jsonl:a.jsonl?origin=page", cache_dir=tmp_path, data_dir=tmp_path)).notes
