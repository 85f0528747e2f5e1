"""Runs on a bucket: resumed on another machine after a kill, with an unreachable bucket; staging folders, preflight, data."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from metajax.cli import preflight
from metajax.cli.main import main
from metajax.core import storage as buckets
from metajax.core.errors import Stopped, UserError
from metajax.data.sources import open_source
from metajax.data.sources.files import file_stamp
from metajax.experiment import run_experiment
from metajax.runs.directory import RunDirectory, find_run
from metajax.runs.files import read_lines
from metajax.training import checkpoints as checkpoint_module
from metajax.training.checkpoints import Checkpoints
from metajax.training.opened import open_run
from metajax.training.state import State, to_arrays
from tests.bucket import serving
from tests.conftest import corpus_rows
from tests.faults.suite import command


@pytest.fixture(scope="module")
def bucket():
    with serving() as bucket:
        buckets.storage("gs://bucket")  # as every command does first
        yield bucket


@pytest.fixture(scope="module")
def data(bucket, tmp_path_factory):
    """A folder with a corpus in Parquet and ArrayRecord files; gs://bucket/data has the same files."""
    folder, rows = tmp_path_factory.mktemp("data"), corpus_rows()
    pq.write_table(pa.Table.from_pylist(rows), folder / "corpus.parquet", row_group_size=50)
    writer = ArrayRecordWriter(str(folder / "corpus.arrayrecord"), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()
    for file in folder.iterdir():
        (epath.Path("gs://bucket/data") / file.name).write_bytes(file.read_bytes())
    return folder


def outcome(workdir):
    """The results of a run that must not depend on its place or on disturbances."""
    report = json.loads((workdir / "report.json").read_text())
    parameters = {path: jax.device_get(value).tobytes() for path, value in to_arrays(open_run(workdir).model).items()}
    return parameters, read_lines(workdir / "metrics.jsonl"), report["eval"], report["counts"]


def test_a_run_resumes_from_a_bucket_after_a_kill(bucket, data, tiny_config, paths, tmp_path):
    """Killed with its second save committed and not hashed, so that it never counted. Workdir and data are on the bucket, which is away
    while the second save and the last are made; each start has an empty stage."""
    config = tiny_config(**{"data.sources": ("parquet:corpus.parquet?origin=module",), "runtime.save_every": 2})
    run_experiment(config, tmp_path / "whole", replace(paths, data=data))
    there = replace(paths, data=epath.Path("gs://bucket/data"))
    bucket.kept = {(moment := "run/checkpoints/4/commit_success.txt"): None}
    bucket.away = {"run/hashes/2-p0.json": 1.0, "run/checkpoints/6/_CHECKPOINT_METADATA": 1.0}
    run_experiment(config, buckets.stage("gs://bucket/run", tmp_path), there)
    assert bucket.refused >= 2
    bucket.storage = bucket.kept[moment]
    stage = buckets.stage("gs://bucket/run", tmp_path / "another machine")
    assert run_experiment(config, stage, there)["restarted_from"] == 2
    assert outcome(stage) == outcome(tmp_path / "whole") and not (stage / "checkpoints").exists()
    elsewhere = find_run("gs://bucket/run", tmp_path / "elsewhere")
    assert (elsewhere / "report.html").read_bytes() == (stage / "report.html").read_bytes()
    assert main(["checkpoints", "gs://bucket/run", "--verify", "--prune", "1", "--runs-dir", str(tmp_path)]) == 0
    assert [path.name for path in epath.Path("gs://bucket/run/checkpoints").iterdir()] == ["6"]


@pytest.mark.slow
def test_a_killed_run_resumes_from_an_empty_stage(bucket, data, tmp_path):
    """SIGKILL during the second save; the bucket is unreachable for three seconds of the second start."""

    def start(workdir, data, machine):
        changes = ("training.steps=30", "runtime.save_every=10", "data.sources=parquet:corpus.parquet?origin=module")
        words = [*command(tmp_path, workdir, *changes), "--data-dir", data, "--runs-dir", str(tmp_path / machine)]
        return subprocess.Popen([sys.executable, "run.py", *words], cwd=Path(__file__).parents[2])

    assert start(tmp_path / "whole", str(data), "here").wait() == 0
    first = start("gs://bucket/killed", "gs://bucket/data", "first")
    while "killed/hashes/10-p0.json" not in bucket.objects() and first.poll() is None:
        time.sleep(0.01)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    bucket.refused, bucket.away = 0, {"killed/hashes/20-p0.json": 3.0}
    assert start("gs://bucket/killed", "gs://bucket/data", "second").wait() == 0 and bucket.refused > 0
    stage = find_run("gs://bucket/killed", tmp_path / "third")
    assert json.loads((stage / "report.json").read_text())["restarted_from"] >= 10
    assert outcome(stage) == outcome(tmp_path / "whole")


def make_state(step):
    return State({"w": jnp.full((64, 8), step)}, {"mu": jnp.full(5, step)}, jnp.int32(step), jnp.zeros((), bool))


def test_a_damaged_checkpoint_on_a_bucket_is_set_aside_there(bucket, tmp_path, monkeypatch):
    stage, said = buckets.stage("gs://bucket/damaged", tmp_path), []
    saving = Checkpoints(stage, keep=3, on_warning=said.append)
    for step in (1, 2):
        saving.save(make_state(step), {"step": step})
    saving.close()
    there = buckets.home(stage)
    name = max(buckets.files(there / "checkpoints" / "2").items(), key=lambda item: item[1]["size"])[0]
    content = (there / "checkpoints" / "2" / name).read_bytes()
    (there / "checkpoints" / "2" / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0))
    reopened = Checkpoints(stage, keep=3, on_warning=said.append)
    assert reopened.restore(abstract)[1] == {"step": 1} and "step 2 is damaged" in said[0] and reopened.steps() == [1]
    assert len(list((there / "damaged").iterdir())) == 2, "the checkpoint and its hashes"

    def fail(workdir):
        raise OSError("no metrics there")

    monkeypatch.setattr(checkpoint_module, "publish", fail)  # a save whose metrics are not on the bucket does not count
    reopened.save(make_state(3), {"step": 3})
    with pytest.raises(OSError, match="no metrics there"):
        reopened.finish()
    assert not list((there / "hashes").glob("3-*"))
    reopened.close()


def test_a_stage_is_synced_from_its_bucket(bucket, tiny_config, tmp_path):
    stage, there = buckets.stage("gs://bucket/stage/", tmp_path), epath.Path("gs://bucket/stage")
    run = RunDirectory.open(stage, tiny_config())
    run.begin("key", "tokenizer")
    (stage / "analysis").mkdir()
    (stage / "analysis" / "one.json").write_text("1")
    with pytest.raises(UserError, match="another process is running in"):
        RunDirectory.open(stage, tiny_config())
    assert find_run("gs://bucket/stage", tmp_path) == stage and (stage / "analysis" / "one.json").exists(), "a running run"
    run.close()
    assert (there / "analysis" / "one.json").read_text() == "1"
    (stage / "stale.json").write_text("of a life before")
    (stage / "data.json").write_text("old")
    RunDirectory.open(stage, tiny_config()).close()
    assert not (stage / "stale.json").exists() and (stage / "data.json").read_text() == (there / "data.json").read_text()
    there.rmtree()
    RunDirectory.open(stage, tiny_config()).close()
    assert sorted(path.name for path in stage.iterdir() if path.is_file()) == [".bucket", ".lock"], (
        "the run on the bucket is deleted"
    )


def test_mistakes_are_one_line_each(bucket, data, tiny_config, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"gs://bucket/data is not empty and is not a run \(it holds corpus.*choose another"):
        RunDirectory.open(buckets.stage("gs://bucket/data", tmp_path), tiny_config())
    with pytest.raises(UserError, match="there is no bucket gs://nowhere; gcloud storage buckets create gs://nowhere"):
        RunDirectory.open(buckets.stage("gs://nowhere/run", tmp_path), tiny_config())
    with pytest.raises(UserError, match="gs://bucket/none is not a run"):
        find_run("gs://bucket/none", tmp_path)
    with pytest.raises(UserError, match="a run needs a path in the bucket"):
        buckets.stage("gs://bucket", tmp_path)
    monkeypatch.setattr(buckets, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gcsfs"):
        buckets.storage("gs://bucket/run")


def test_a_lasting_bucket_outage_ends_a_run_with_the_restart_code(bucket):
    from gcsfs.retry import HttpError
    from google.api_core.exceptions import ServiceUnavailable

    for error in (HttpError({"code": 503, "message": "high load"}), ServiceUnavailable("away")):
        with pytest.raises(Stopped, match="the same command continues"), buckets.outages():
            raise error
    for error in (HttpError({"code": 401, "message": "who"}), OSError("Forbidden: gs://bucket\nno")):
        with pytest.raises(UserError, match="gcloud auth application-default login"), buckets.outages():
            raise error
    with pytest.raises(OSError, match="of a disk"), buckets.outages():
        raise OSError("of a disk")


def test_preflight_writes_to_a_bucket_and_reads_as_checkpoints_are_read(bucket):
    assert "written, read back and deleted" in preflight._storage({"workdir": "gs://bucket/probed/run"})["text"]
    assert not epath.Path("gs://bucket/probed").exists()
    with pytest.raises(UserError, match="there is no bucket gs://nowhere"):
        preflight._storage({"workdir": "gs://nowhere/run"})


@pytest.mark.parametrize("kind", ["parquet", "arrayrecord"])
def test_data_on_a_bucket_equals_that_of_a_folder_despite_an_outage(bucket, data, kind, tmp_path):
    local = open_source(f"{kind}:corpus.{kind}", cache_dir=tmp_path, data_dir=data)
    bucket.refused, bucket.away = 0, {"data/now": 1.0}
    epath.Path("gs://bucket/data/now").write_text("")
    there = open_source(f"{kind}:corpus.{kind}", cache_dir=tmp_path, data_dir=epath.Path("gs://bucket/data"))
    assert bucket.refused > 0 and [there[i] for i in range(len(there))] == [local[i] for i in range(len(local))]
    assert there.manifest()["files"][0]["sha256"] == local.manifest()["files"][0]["sha256"]


@pytest.mark.fault(16)
def test_an_object_replaced_within_a_second_has_another_fingerprint(bucket):
    stamps = []
    for content in (b"first", b"other", b"first"):
        epath.Path("gs://bucket/stamped").write_bytes(content)
        stamps.append(file_stamp("gs://bucket/stamped").split()[-1])
    assert stamps[0] == stamps[2] != stamps[1]
