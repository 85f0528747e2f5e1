"""Labels joined to the documents of a corpus by id, shard by shard."""

import gzip
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metajax.config import UserError
from metajax.data.documents import BadRecord
from metajax.data.sources import open_source
from metajax.data.tokenising import build_token_cache
from metajax.data.tokenizers import Bytes

LABELS = [
    {"id": "d1", "topic": "Health", "format": None},
    {"id": "d0", "topic": "Games", "format": "Q&A Forum"},
    {"id": "x", "topic": "none"},
]


@pytest.fixture
def files(tmp_path):
    """files(name -> rows): what it says, written below the data folder."""

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


@pytest.fixture
def opened(tmp_path):
    return lambda spec: open_source(spec, cache_dir=tmp_path / "cache", data_dir=tmp_path)


def texts(*ids):
    return [{"text": f"text of {i}", "id": i, "url": f"https://{i}.org/"} for i in ids]


def test_documents_have_the_labels_of_their_own_shard(files, opened, tmp_path):
    """Two shards of one name in two folders; rows in another order, one without labels, and the same id in both shards."""
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


@pytest.mark.parametrize(
    ("labels", "row", "error", "message"),
    [
        (None, {}, UserError, r"wo/0\.parquet: no such file; .* looks for the labels of .*web/0\.jsonl there"),
        ([{"ids": "d0"}], {}, UserError, r"no column 'id' to join by; did you mean 'ids'\?"),
        ([*LABELS, LABELS[0]], {}, UserError, "an id stands twice in column 'id'"),
        (LABELS, {"id": None}, BadRecord, r"web/0\.jsonl, record 0: no value in column 'id'"),
        (LABELS, {"topic": "mine"}, BadRecord, "column 'topic' is in the labels, too"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(labels, row, error, message, files, opened):
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
