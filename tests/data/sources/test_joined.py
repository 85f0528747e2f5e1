"""Labels joined to the documents of a corpus by id, shard by shard."""

import decimal
import gzip
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metajax.config import Config, Data, Model
from metajax.core.errors import UserError
from metajax.data.documents import BadRecord
from metajax.data.pipeline import Paths, notes, open_corpora
from metajax.data.sources import open_source
from metajax.data.sources.files import JOINED
from metajax.data.tokenising import build_token_cache
from metajax.data.tokenizers import Bytes
from metajax.reporting.information import survey

LABELS = [
    {"id": "d1", "topic": "Health", "format": None},
    {"id": "d0", "topic": "Games", "format": "Q&A Forum"},
    {"id": "x", "topic": "none"},
]


@pytest.fixture
def files(tmp_path):
    """files(name -> rows): write the rows as files below the data folder."""

    def write(**of_file):
        for name, rows in of_file.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".parquet"):
                pq.write_table(pa.Table.from_pylist(rows), path)
            else:
                opener = gzip.open if name.endswith(".gz") else open
                with opener(path, "wt") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)

    return write


def config(data):
    return Config(name="test", scale="cpu", model=Model(), data=data)


def texts(*ids):
    return [{"text": f"text of {i}", "id": i, "url": f"https://{i}.org/"} for i in ids]


def test_documents_have_the_labels_of_their_own_shard(files, opened, tmp_path):
    """Two shards of one name in two folders: rows in another order, one row without labels, and the same id in both shards."""
    files(**{"web/a/0.parquet": texts("d0", "d1", "d2"), "web/b/0.parquet": texts("d0")})
    files(**{"wo/a/0.parquet": LABELS, "wo/b/0.parquet": [{"id": "d0", "topic": "Food"}]})
    source = opened("parquet:web/*/0.parquet?join=wo")
    labels = [{k: v for k, v in d.metadata.items() if k in ("topic", "format")} for d in map(source.__getitem__, range(4))]
    assert labels == [{"topic": "Games", "format": "Q&A Forum"}, {"topic": "Health"}, {}, {"topic": "Food"}]
    assert [d.origin for d in map(source.__getitem__, range(4))] == ["d0.org", "d1.org", "d2.org", "d0.org"]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    cache = build_token_cache(source, Bytes(), cache_dir=tmp_path / "cache", on_bad_record="stop")
    assert cache.manifest["metadata_fields"] == ["format", "id", "topic", "url"]
    assert [entry["path"] for entry in cache.manifest["source"]["joined"]["files"]] == [
        str(tmp_path / f"wo/{x}/0.parquet") for x in "ab"
    ]
    plain, before = opened("parquet:web/*/0.parquet"), source.fingerprint()
    files(**{"wo/b/0.parquet": [{"id": "d0", "topic": "Travel"}]})
    assert len({before, opened("parquet:web/*/0.parquet?join=wo").fingerprint(), plain.fingerprint()}) == 3


def test_compressed_shards_and_another_column_of_ids(files, opened):
    files(
        **{
            "c4-train.00000-of-00001.json.gz": texts("d0", "d1"),
            "wo/c4-train.00000-of-00001.parquet": [{"url": "https://d1.org/", "topic": "Food"}],
        }
    )
    source = opened("jsonl:c4-train.*.json.gz?join=wo&on=url")
    assert [source[i].metadata.get("topic") for i in (0, 1)] == [None, "Food"]


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    ("ids", "labels"),
    [
        ([3, 4, 2**60], pa.array([3.0, 4.0, float(2**60)])),
        ([3, 4, 2**24], pa.array([3.0, 4.0, float(2**24)], pa.float32())),
        ([3.0, 4.0, float(2**60)], pa.array([3, 4, 2**60])),
        ([3.0, 4.0, 1.5], pa.array(["3", "4", "1.50"])),
        (["3.0", "4", "5"], pa.array([3, 4, 5], pa.uint8())),
        ([3, 4, 5], pa.array([decimal.Decimal("3.00"), decimal.Decimal("4.00"), decimal.Decimal("5.00")])),
        (["a b", "1.0", "1"], pa.array(["a b", "1.0", "1"])),
        (["x", "y", "z"], pa.array(["z", "y", "x"]).dictionary_encode().take(pa.array([2, 1, 0]))),
    ],
)
def test_ids_are_joined_by_their_value(ids, labels, files, opened, tmp_path):
    files(**{"web/0.jsonl": [{"text": "t", "id": i} for i in ids]})
    (tmp_path / "wo").mkdir()
    pq.write_table(pa.table({"id": labels, "topic": ["a", "b", "c"]}), tmp_path / "wo/0.parquet")
    source = opened("jsonl:web/0.jsonl?join=wo")
    assert [source[i].metadata.get("topic") for i in range(3)] == ["a", "b", "c"]
    assert source.tally[JOINED] == 3


@pytest.mark.fault(20)
def test_a_value_of_two_labels_joins_only_by_its_text(files, opened):
    files(**{"web/0.jsonl": texts("1.1", "1.10", "1.100"), "wo/0.parquet": [{"id": "1.1", "t": "a"}, {"id": "1.10", "t": "b"}]})
    source = opened("jsonl:web/0.jsonl?join=wo")
    assert [source[i].metadata.get("t") for i in range(3)] == ["a", "b", None]


@pytest.mark.fault(20)
def test_the_joined_share_is_reported(files, tmp_path):
    """By a run, by `cache` and by `show`. A share of zero is an error before training, also with an existing cache."""
    rows = [{"text": f"word {i} word", "id": i, "url": f"https://s{i}.org"} for i in range(40)]
    files(**{"web/0.jsonl": rows, "wo/0.parquet": [{"id": str(i), "topic": "t"} for i in range(30)]})
    paths = Paths(tmp_path / "cache", tmp_path)
    data = Data(sources=("jsonl:web/0.jsonl?join=wo",), tokenizer="byte", validation_share=0.2)
    (line,) = notes(open_corpora(config(data), paths).caches[0])
    assert "30 of 40 documents (75.0%) have labels" in line
    source = open_source(data.sources[0], cache_dir=tmp_path, data_dir=tmp_path)
    assert survey(source).notes == [line]
    files(**{"wo/0.parquet": [{"id": f"doc-{i}", "topic": "t"} for i in range(30)]})
    for _ in range(2):
        with pytest.raises(UserError, match=r"0 of 40 documents .* documents have id = '0', labels 'doc-0'"):
            open_corpora(config(data), paths)


@pytest.mark.fault(13)
def test_labels_without_an_id_or_a_value_are_missing(files, opened, tmp_path):
    files(**{"web/0.jsonl": texts("d0", "d1")})
    (tmp_path / "wo").mkdir()
    columns = {"id": ["d0", None, None, "d1"], "score": [3.3, 1.0, 2.0, float("nan")], "raw": [b"ok", b"", b"", b"\xff"]}
    columns["by"] = pa.array([{"model": "m"}, None, None, {"model": None}])
    pq.write_table(pa.table({**columns, "score": pa.array(columns["score"], pa.float32())}), tmp_path / "wo/0.parquet")
    source = opened("jsonl:web/0.jsonl?join=wo")
    labels = [{k: v for k, v in source[i].metadata.items() if k not in ("id", "url")} for i in range(2)]
    assert labels == [{"score": "3.3", "raw": "ok", "by.model": "m"}, {}]


@pytest.mark.parametrize(
    ("labels", "row", "error", "message"),
    [
        (None, {}, UserError, r"wo/0\.parquet: no such file; .* looks for the labels of .*web/0\.jsonl there"),
        ([{"ids": "d0"}], {}, UserError, r"no column 'id' to join by; did you mean 'ids'\?"),
        ([*LABELS, LABELS[0]], {}, UserError, "an id occurs twice"),
        (LABELS, {"id": None}, BadRecord, r"web/0\.jsonl, record 0: no value in column 'id'"),
        (LABELS, {"topic": "mine"}, BadRecord, "column 'topic' is in the labels, too"),
    ],
)
def test_mismatched_labels_are_refused(labels, row, error, message, files, opened):
    files(**{"web/0.jsonl": [texts("d0")[0] | row]} | ({"wo/0.parquet": labels} if labels else {}))
    with pytest.raises(error, match=message):
        opened("jsonl:web/0.jsonl?join=wo")[0]


def test_a_damaged_file_of_labels(files, opened, tmp_path):
    files(**{"web/0.jsonl": texts("d0"), "wo/0.parquet": LABELS})
    (tmp_path / "wo/0.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"wo/0\.parquet: not a readable Parquet file"):
        opened("jsonl:web/0.jsonl?join=wo")[0]


def test_only_files_are_joined(opened):
    with pytest.raises(UserError, match="join= is for files"):
        opened("tfds:c4/en?join=wo")
