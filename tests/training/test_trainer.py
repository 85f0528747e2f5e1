"""A run from start to finish: resume, kill -9, errors that stop it, and its logs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from metajax.config import Metadata, MetaTokens
from metajax.core import atomic
from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.data import encoding
from metajax.experiment import open_task, run_experiment
from metajax.reporting import page
from metajax.runs import files
from metajax.runs.directory import RunDirectory
from metajax.runs.files import read_lines
from metajax.runs.metrics import MetricsFile
from metajax.runs.pace import Pace
from metajax.training import trainer
from metajax.training.checkpoints import Checkpoints
from metajax.training.optimizers import schedule
from metajax.training.trainer import NonFinite

ROOT = Path(__file__).parents[2]


def curve(workdir):
    return read_lines(workdir / "metrics.jsonl")


def last_arrays(workdir):
    """{path: array} of the newest checkpoint."""
    checkpoints = Checkpoints(workdir, 2)
    step = checkpoints.steps()[-1]
    checkpoints.close()
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore((workdir / "checkpoints" / str(step) / "state").absolute())


class Cut(Exception):
    pass


def run_and_cut(config, workdir, paths, after, monkeypatch):
    """Run until `after` steps have been logged, then stop by an exception."""
    original = trainer.Trainer._log

    def log(self, step, *rest):
        original(self, step, *rest)
        if step == after:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_log", log)
        with pytest.raises(Cut):
            run_experiment(config, workdir, paths)


@pytest.mark.parametrize("after", [1, 5])
def test_every_family_resumes_exactly(family, paths, tmp_path, monkeypatch, after):
    config = family.config(**{"runtime.save_every": 2})
    whole = run_experiment(config, tmp_path / "whole", paths)
    run_and_cut(config, tmp_path / "cut", paths, after, monkeypatch)
    resumed = run_experiment(config, tmp_path / "cut", paths)
    assert resumed["restarted_from"] == (4 if after == 5 else 0)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole") and len(curve(tmp_path / "cut")) == 6
    assert resumed["eval"] == whole["eval"] and resumed["counts"] == whole["counts"]
    for (name, a), (other, b) in zip(*(sorted(last_arrays(tmp_path / run).items()) for run in ("whole", "cut")), strict=True):
        assert name == other and np.array_equal(a, b), f"{name}: the last checkpoints hold the same bits"


@pytest.mark.parametrize("changes", [{}, {"meta_tokens": MetaTokens(embedding="frozen")}, {"evaluation.every": 2}])
@pytest.mark.parametrize("after", [1, 5])
def test_a_resumed_run_equals_the_undisturbed_run(tiny_config, paths, tmp_path, monkeypatch, changes, after):
    config = tiny_config(**{"runtime.save_every": 2, **changes})
    whole = run_experiment(config, tmp_path / "whole", paths)
    run_and_cut(config, tmp_path / "cut", paths, after, monkeypatch)
    resumed = run_experiment(config, tmp_path / "cut", paths)
    assert resumed["restarted_from"] == (4 if after == 5 else 0)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole"), "the loss curve is identical, number for number"
    for name in ("eval", "counts", "sample", "parameters"):
        assert resumed[name] == whole[name], name


def test_resume_across_a_switch_of_the_data(tiny_config, tiny_corpus, paths, tmp_path, monkeypatch):
    """To other weights and to documents without metadata that were not read before, while the schedule goes on."""
    config = override(
        tiny_config(metadata=Metadata(template="{topic}")),
        {
            "data.sources": (f"jsonl:{tiny_corpus}?origin=module", f"jsonl:{tiny_corpus}?text=text&origin=module"),
            "data.sequence_length": 48,
            "data.weights": (0.75, 0.25),
            "data.switch": {"step": 3, "weights": (0.25, 0.75), "metadata": "none", "unseen": 0.3},
            "runtime.save_every": 2,
            "evaluation.sample_tokens": 0,
        },
    )
    whole = run_experiment(config, tmp_path / "whole", paths)
    run_and_cut(config, tmp_path / "cut", paths, 5, monkeypatch)
    assert run_experiment(config, tmp_path / "cut", paths)["eval"] == whole["eval"]
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    rates = schedule(config.optimizer, config.training.steps)
    assert [line["learning_rate"] for line in curve(tmp_path / "whole")] == pytest.approx([float(rates(n)) for n in range(6)])


def test_nan_stops_with_a_bundle_that_reproduces_the_step(family, paths, tmp_path):
    config = family.config(**family.explodes)
    with pytest.raises(NonFinite, match="replay-step-"):
        run_experiment(config, tmp_path, paths)
    [bundle] = tmp_path.glob("replay-step-*")
    assert not family.replay(bundle, config, paths)["finite"]
    steps = [line["step"] for line in curve(tmp_path)]
    assert bundle.name == f"replay-step-{(steps or [0])[-1] + 1}", "the step that broke is the first one not logged"
    assert all(np.isfinite(line["loss"]) for line in curve(tmp_path))
    assert not (tmp_path / "report.json").exists()


def test_accumulation_changes_no_number(family, paths, tmp_path):
    """Random draws are made for the whole batch. Micro-batches of a CLIP would have another loss, and are refused."""
    pieces = 2 if family.name == "text" else 5
    config = family.config(**{"training.accumulation_steps": pieces})
    if family.name == "contrastive":
        with pytest.raises(UserError, match=r"training\.accumulation_steps"):
            run_experiment(config, tmp_path, paths)
        return
    run_experiment(config, tmp_path / "pieces", paths)
    run_experiment(family.config(), tmp_path / "whole", paths)
    for name in ("loss", "grad_norm"):
        found, expected = ([line[name] for line in curve(tmp_path / run)] for run in ("pieces", "whole"))
        np.testing.assert_allclose(found, expected, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("cut", ["config.json", "environment.json", "data.json", "tokenizer.json", "report.json", "report.html"])
def test_a_kill_between_any_two_files_is_survived(tiny_config, paths, tmp_path, monkeypatch, cut):
    """After a kill following the write of any file, the same command finishes the run with the same numbers."""
    whole = run_experiment(tiny_config(), tmp_path / "whole", paths)
    original, done = atomic.write_text, []

    def write_text(path, text):
        if not done and path.name == cut:
            done.append(path)
            raise Cut
        original(path, text)

    with monkeypatch.context() as patch:
        for module in (files, page, encoding):
            patch.setattr(module, "write_text", write_text)
        with pytest.raises(Cut):
            run_experiment(tiny_config(), tmp_path / "cut", paths)
    assert run_experiment(tiny_config(), tmp_path / "cut", paths)["eval"] == whole["eval"]
    assert (tmp_path / "cut" / "report.html").exists()


def test_other_library_versions_are_warned_of(tiny_config, paths, tmp_path, monkeypatch):
    run_and_cut(tiny_config(), tmp_path, paths, 2, monkeypatch)
    saved = json.loads((tmp_path / "environment.json").read_text())
    saved["libraries"]["jax"] = "0.0.1"
    files.write_json(tmp_path / "environment.json", saved)
    [warning] = run_experiment(tiny_config(), tmp_path, paths)["warnings"]
    assert "jax 0.0.1 -> " in warning


def test_two_processes_cannot_share_a_workdir(tiny_config, tmp_path):
    first = RunDirectory.open(tmp_path, tiny_config())
    with pytest.raises(UserError, match="another process is running"):
        RunDirectory.open(tmp_path, tiny_config())
    first.close()
    RunDirectory.open(tmp_path, tiny_config()).close()


def test_metrics_after_the_restored_step_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    file = MetricsFile(path, 2)
    file.write({"step": 3, "again": True})
    file.close()
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_tensorboard_and_offline_wandb(tiny_config, paths, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = tiny_config(**{"runtime.loggers": ("tensorboard", "wandb"), "runtime.log_every": 2})
    run_experiment(config, tmp_path, paths)
    [events] = (tmp_path / "tensorboard").glob("events*")
    tags = events.read_bytes()
    for tag in (b"loss", b"bpb", b"grad_norm", b"learning_rate", b"tokens_per_second"):
        assert tag in tags
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_start_up_and_input_wait_are_in_the_report(family, paths, tmp_path):
    report = run_experiment(family.config(), tmp_path, paths, started=time.monotonic() - 2.0, imports_seconds=1.5)
    startup = report["startup"]
    assert startup["imports"] == 1.5 and all(startup[name] > 0 for name in ("data", "init", "compile", "first_step", "other"))
    assert startup["total"] == pytest.approx(sum(v for k, v in startup.items() if k != "total"))
    assert 0 <= report["time"]["data_wait_share"] < 1 and report["goodput"]["starts"] == 1
    assert 0 < report["goodput"]["productive"] < 1 and report["left_out"]["count"] == 0


def test_pace_and_the_line_of_a_log(tiny_config, paths):
    pace = Pace("tokens", "positions", since=time.monotonic() - 10.0)
    pace.add({"positions": 1000, "flops": 2e12})
    pace.add({"positions": 1000, "flops": 2e12})
    speed, seconds = pace.read(peak=1e12)
    assert speed["tokens_per_second"] == pytest.approx(200, rel=0.01) and seconds == pytest.approx(5, rel=0.01)
    assert speed["mfu"] == pytest.approx(0.4, rel=0.01)
    assert pace.steps == 0 and not pace.read_here
    assert trainer.speed_parts({"tokens_per_second": 200.0, "mfu": 0.4}) == ["200 tokens/s", "MFU 40.0%"]
    assert trainer.speed_parts({"tokens_per_second": 1.0}) == ["1 tokens/s"]
    record = {"loss": 2.5, "bpb": 1.25, "learning_rate": 1e-3, "grad_norm": 0.5}
    line = open_task(tiny_config(), paths).line(record)
    assert line == ["loss 2.5000", "bits/byte 1.2500", "lr 1.00e-03", "grad 0.500"]


SMALL = (
    "data.sources=pydocs:email+json+logging data.tokenizer=bpe:320 data.sequence_length=64 data.batch_size=4 "
    "data.validation_share=0.2 model.layers=2 model.width=32 model.heads=2 model.mlp_width=64 training.steps=20 "
    "optimizer.warmup_steps=2 evaluation.documents=8 evaluation.sample_tokens=8 runtime.save_every=5"
)
QUICKSTART = ["quickstart", *(word for change in SMALL.split() for word in ("--set", change))]


def quickstart(root, cache):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "run.py", *QUICKSTART, "--runs-dir", str(root), "--cache-dir", str(cache)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(root):
    [table] = (root / "quickstart").glob("cpu-*/table.json")
    result = json.loads(table.read_text())
    curves = [curve(root / run["folder"]) for row in result["rows"] for run in row["runs"]]
    return [row["cells"] for row in result["rows"]], [row["cost"] for row in result["rows"]], curves


def test_kill_9_during_the_quickstart_changes_no_number(tmp_path):
    whole = quickstart(tmp_path / "whole", tmp_path / "cache")
    out, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, out
    kill_at = random.Random(time.time_ns()).randrange(1, 60)  # steps logged over all three arms
    broken = quickstart(tmp_path / "killed", tmp_path / "cache")
    while broken.poll() is None:
        # ROOT/NAME/SCALE/RUN and no deeper: a checkpoint that is being saved is a folder which vanishes
        if sum(len(curve(p.parent)) for p in (tmp_path / "killed").glob("quickstart/*/cpu/*/metrics.jsonl")) >= kill_at:
            broken.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    out, _ = broken.communicate()
    assert broken.returncode == -signal.SIGKILL, f"to be killed at {kill_at}: {out}"
    again = quickstart(tmp_path / "killed", tmp_path / "cache")
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, f"killed at {kill_at}: {out}"
    assert results(tmp_path / "killed") == results(tmp_path / "whole"), f"killed at {kill_at}"
