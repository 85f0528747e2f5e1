"""Several real processes as one run, connected over a port of this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.distributed import hosts
from metajax.distributed.hosts import Place, find_place
from metajax.experiment import run_experiment
from metajax.registry import find_experiment, load
from metajax.runs.files import read_lines
from metajax.training import trainer

ROOT = Path(__file__).parents[2]
STEPS = 120


@pytest.fixture
def changes(tiny_corpus):
    groups = {
        "data": {"tokenizer": "byte", "sequence_length": "32", "batch_size": "4", "validation_share": "0.2"},
        "model": {"layers": "2", "width": "16", "heads": "2", "mlp_width": "32"},
        "evaluation": {"documents": "5", "sample_tokens": "4", "conditions": "none"},
        "runtime": {"save_every": "50", "log_every": "50"},
    }
    few = {f"{group}.{name}": value for group, fields in groups.items() for name, value in fields.items()}
    steps = {"training.steps": str(STEPS), "optimizer.warmup_steps": "1"}
    return {"data.sources": f"jsonl:{tiny_corpus}?origin=module", **few, **steps}


def start(count, changes, workdir, paths):
    """Start the same command `count` times, like a launcher on that many hosts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    folders = ["--workdir", str(workdir), "--cache-dir", str(paths.cache)]
    command = [sys.executable, "run.py", "quickstart/meta_tokens", *words, *folders]
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(i)}, **options) for i in range(count)]


def cut(config, workdir, paths, after, monkeypatch):
    """Run one process and kill it after `after` logged steps."""
    original = trainer.Trainer._log

    def log(self, step, *rest):
        original(self, step, *rest)
        if step == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_log", log)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(config, workdir, paths)


@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (2, "context=2"),
        pytest.param(2, "fsdp=2", marks=pytest.mark.slow),
        pytest.param(4, "fsdp=2,context=2", marks=pytest.mark.slow),
    ],
)
def test_one_process_then_several_then_one_make_one_run(changes, paths, tmp_path, monkeypatch, count, mesh):
    """Start in one process, continue in several until SIGTERM, end in one: the curve equals that of one process.

    With a context axis, processes share rows: they read the same rows, and each row is counted once.
    """
    load()
    config = override(find_experiment("quickstart/meta_tokens").build("cpu"), changes)
    whole, workdir = run_experiment(config, tmp_path / "whole", paths), tmp_path / "moved"
    cut(override(config, {"runtime.save_every": 4}), workdir, paths, 7, monkeypatch)
    pair = start(count, changes | {"runtime.mesh": mesh}, workdir, paths)
    while pair[0].poll() is None and len(read_lines(workdir / "metrics.jsonl")) < 12:
        time.sleep(0.005)
    pair[-1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [75] * count, said
    assert "resuming at step 4" in said[0] and "resuming" not in said[1], "only process 0 prints"
    shares = [
        json.loads(file.read_text()) for file in sorted((workdir / "hashes").glob("*-p*.json")) if not file.name.startswith("4-")
    ]
    assert len(shares) == count and all(share["hosts"] == count for share in shares), "each process hashed its share of the files"
    report = run_experiment(config, workdir, paths)
    assert 12 <= report["restarted_from"] < STEPS
    curves = [[line["loss"] for line in read_lines(folder / "metrics.jsonl")] for folder in (workdir, tmp_path / "whole")]
    np.testing.assert_allclose(*curves, rtol=1e-5)
    assert report["counts"] == whole["counts"], "every row was read once"
    assert report["eval"]["none"]["bpb"] == pytest.approx(whole["eval"]["none"]["bpb"], rel=1e-5)
    assert report["goodput"]["starts"] == 3 and 0 < report["goodput"]["lost"] < report["goodput"]["productive"] < 1


def test_a_process_place_is_complete_or_refused(monkeypatch):
    for name in (*hosts.VARIABLES, *hosts.LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    assert find_place() is None
    with pytest.raises(UserError, match="go together"):
        find_place("localhost:1", 2, None)
    with pytest.raises(UserError, match="expected a whole number from 1"):
        find_place("localhost:1", "two", 0)
    with pytest.raises(UserError, match="numbered from 0 to 1"):
        find_place("localhost:1", 2, 2)
    with pytest.raises(UserError, match="expected HOST:PORT"):
        find_place("localhost", 2, 0)
    for name, value in zip(hosts.VARIABLES, ("host0:8476", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    assert find_place() == Place("host0:8476", 4, 3)


def test_slurm_gives_the_place(monkeypatch):
    for name in hosts.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "tpu[03-06]", "NTASKS": "4", "PROCID": "2", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place = find_place()
    assert place.coordinator.startswith("tpu03:") and (place.processes, place.process) == (4, 2)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find_place() is None, "a single Slurm task is one process"


def test_an_error_of_one_process_ends_all(monkeypatch):
    monkeypatch.setattr(hosts, "gather", lambda text: ["", "no such file"])
    with pytest.raises(UserError, match="process 1: no such file"):
        hosts.together(lambda: 1)
    monkeypatch.setattr(hosts, "gather", lambda text: ["a1", "a1", "b2"])
    with pytest.raises(UserError, match=r"process 2 has another corpus \(b2\) than process 0 \(a1\)"):
        hosts.agree("corpus", "a1")
