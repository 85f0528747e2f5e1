"""Runs on a bucket: killed and taken up on another machine, with the bucket away for a while; stages, checkpoints, preflight, data."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from metajax import buckets
from metajax.config import Config, UserError
from metajax.data.sources import open_source
from metajax.fields import Stopped
from metajax.pods import preflight
from metajax.reporting.records import RunDirectory, find_run
from metajax.training.checkpoints import Checkpoints, steps_of
from metajax.training.state import State
from tests.bucket import serving
from tests.faults import CONTEXT, Suite
from tests.faults import command as tiny_command

STEPS, SAVED = 30, 10
TINY = (f"training.steps={STEPS}", f"runtime.save_every={SAVED}", "data.sources=parquet:corpus.parquet?origin=module")


@pytest.fixture(scope="module")
def bucket():
    with serving() as bucket:
        yield bucket


def until(true, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_is_killed_taken_up_elsewhere_while_the_bucket_is_away_and_ends_as_an_undisturbed_one(bucket, tmp_path):
    """Both starts have a machine of their own, as far as a folder for runs goes; the local run has all of it in a folder."""
    CONTEXT.set_forkserver_preload(["metajax.experiment", "metajax.verbs", "metajax.cli", "gcsfs"])
    suite, there = Suite(tmp_path, seed=0), epath.Path("gs://bucket/run")
    rows = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    buckets.storage(there)[0].put_file(str(tmp_path / "corpus.parquet"), "bucket/data/corpus.parquet")

    def start(workdir, data, machine):
        return suite.start(workdir, *TINY, words=("--data-dir", data, "--runs-dir", str(tmp_path / machine)))

    whole = start(tmp_path / "whole", str(tmp_path), "here")
    first = start(there, "gs://bucket/data", "first")
    until(lambda: f"run/hashes/{SAVED}-p0.json" in bucket.objects() or not first.is_alive())
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second = start(there, "gs://bucket/data", "second")
    until(lambda: f"run/hashes/{2 * SAVED}-p0.json" in bucket.objects() or not second.is_alive())
    bucket.down.set()
    until(lambda: bucket.refused >= 3, 20)
    bucket.down.clear()
    for process in (whole, second):
        process.join()
    said = (tmp_path / "run.log").read_text()
    assert (whole.exitcode, second.exitcode) == (0, 0), said[-3000:]
    assert f"resuming at step {SAVED}" in said or f"resuming at step {2 * SAVED}" in said
    third = find_run("gs://bucket/run", tmp_path / "third")
    assert suite.outcome(third) == suite.outcome(tmp_path / "whole")
    assert (
        not (third / "checkpoints").exists()
        and (third / "report.html").read_text() == (tmp_path / "second" / "gs" / "bucket" / "run" / "report.html").read_text()
    )
