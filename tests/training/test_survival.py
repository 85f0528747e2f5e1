"""Events besides kills that a run survives: preemption, a hang, a bad step; and goodput."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from metajax.core.errors import Stopped
from metajax.experiment import run_experiment
from metajax.runs import metrics, pace
from metajax.runs.files import read_lines
from metajax.runs.pace import Goodput
from metajax.training import trainer
from metajax.training.trainer import NonFinite

ROOT = Path(__file__).parents[2]


def curve(workdir):
    return read_lines(workdir / "metrics.jsonl")


@pytest.mark.fault(31)
def test_a_signal_saves_at_once_and_the_run_resumes(family, paths, tmp_path, monkeypatch):
    number, code = (signal.SIGINT, 130) if family.name == "prompts" else (signal.SIGTERM, 75)
    whole = run_experiment(family.config(), tmp_path / "whole", paths)
    original = trainer.Trainer._log

    def log(self, step, *rest):
        original(self, step, *rest)
        if step == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_log", log)
        with pytest.raises(Stopped, match="step 4 of 6") as caught:
            run_experiment(family.config(), tmp_path / "cut", paths)
    report = run_experiment(family.config(), tmp_path / "cut", paths)
    assert (
        code == caught.value.EXIT_CODE and report["restarted_from"] == 4 and curve(tmp_path / "cut") == curve(tmp_path / "whole")
    )
    assert report["eval"] == whole["eval"] and report["goodput"]["lost"] < 0.01


def test_a_step_over_the_limit_stops_or_is_skipped(family, paths, tmp_path):
    """Some steps exceed the gradient norm: `stop` writes a bundle that reproduces the step, `skip` finishes the run without it."""
    norms = [line["grad_norm"] for line in curve_of(family.config(), paths, tmp_path / "free")]
    limit = sorted(norms)[-2] * (1 + 1e-6)  # one step is above
    worst = norms.index(max(norms)) + 1
    limited = {"runtime.max_grad_norm": limit}
    with pytest.raises(NonFinite, match=f"step {worst}: "):
        run_experiment(family.config(**limited), tmp_path / "stop", paths)
    [bundle] = (tmp_path / "stop").glob("replay-step-*")
    values = family.replay(bundle, family.config(**limited), paths)
    assert values["finite"] and not values["kept"] and values["grad_norm"] == pytest.approx(max(norms), rel=1e-5)
    lines = curve_of(family.config(**limited, **{"runtime.on_bad_step": "skip"}), paths, tmp_path / "skip")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[worst - 1] == {"step": worst, "left_out": "spike"}
    assert all(line.get("grad_norm", 0.0) <= limit for line in lines)
    assert lines[: worst - 1] == curve(tmp_path / "free")[: worst - 1]
    warnings = json.loads((tmp_path / "skip" / "report.json").read_text())["warnings"]
    assert any(f"step {worst} was left out" in text for text in warnings)


def curve_of(config, paths, workdir):
    run_experiment(config, workdir, paths)
    return curve(workdir)


HANG = """
import sys, threading
from pathlib import Path
from metajax.distributed.watchdog import Watchdog
dog = Watchdog(0.3, Path(sys.argv[1]))
def stuck_collective(): threading.Event().wait()
for _ in range(5):
    threading.Event().wait(0.1)
    dog.beat()
stuck_collective()
"""


def test_a_hang_ends_with_the_stacks_and_a_code_to_restart_on(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path / "stacks")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 75 and "error: no step, save or evaluation ended for 0.3 s" in done.stderr
    assert "stuck_collective" in (tmp_path / "stacks").read_text(), "beats reset the limit: it ended in the hang, not earlier"


@pytest.mark.fault(32)
def test_the_hang_limit_begins_with_the_first_step_and_spares_evaluations(family, paths, tmp_path, monkeypatch):
    called = []

    class Recorder(trainer.Watchdog):
        def __init__(self, seconds, stacks, startup):
            called.append((seconds, startup))
            super().__init__(0, stacks, 0)

        def begin_steps(self):
            called.append("steps")

        def patient(self):
            called.append("evaluation")
            return super().patient()

        def beat(self):
            called.append("beat")

    monkeypatch.setattr(trainer, "Watchdog", Recorder)
    evaluates = {"evaluation.every": 3} if family.name == "text" else {}
    run_experiment(family.config(**evaluates, **{"runtime.startup_seconds": 9.0}), tmp_path, paths)
    at = called.index("steps")
    assert called[0] == (1800.0, 9.0) and called[at:].count("beat") > 6
    assert [call for call in called if call not in ("beat", called[0])] == ["steps", *["evaluation"] * len(evaluates)]
    after = called[called.index("evaluation") + 1 :] if evaluates else ["beat"] * 5
    assert after.count("beat") > 4, "batches of an evaluation reset the limit"


def test_goodput_counts_lost_steps_and_every_start(tmp_path, monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(pace.time, "monotonic", lambda: now.seconds)

    def start(begins):
        ledger = Goodput(tmp_path / "time.json", age=2.0)
        with ledger.spend("compile"):
            now.seconds += 3
        ledger.begin_steps(begins)
        return ledger

    first = start(0)
    now.seconds += 10  # productive
    with first.spend("checkpoint"):
        now.seconds += 1
    first.saved(50)
    now.seconds += 4  # lost: killed before the next save
    first.write()
    now.seconds += 500  # between two starts
    second = start(50)
    now.seconds += 9
    with second.spend("data_wait"):
        now.seconds += 1
    shares = second.shares()
    assert shares.pop("starts") == 2 and shares.pop("seconds") == 35
    seconds = {kind: round(35 * share, 6) for kind, share in shares.items()}
    in_loop = {"productive": 19, "lost": 4, "data_wait": 1, "checkpoint": 1, "evaluation": 0}
    assert seconds == {**in_loop, "startup": 4, "compile": 6}


def test_device_memory_is_reported_if_the_backend_has_it(monkeypatch):
    def device(peak):
        return SimpleNamespace(memory_stats=lambda: peak and {"peak_bytes_in_use": peak, "bytes_limit": 16 * 2**30})

    monkeypatch.setattr(jax, "local_devices", lambda: [device(4 * 2**30), device(8 * 2**30)])
    assert metrics.memory_use() == {"hbm_gib": 8.0, "hbm_share": 0.5}
    monkeypatch.setattr(jax, "local_devices", lambda: [device(None)])
    assert metrics.memory_use() == {}


def test_a_profile_of_two_steps(family, paths, tmp_path):
    run_experiment(family.config(**{"runtime.profile": (5, 9)}), tmp_path, paths)
    assert list((tmp_path / "profile").rglob("*.xplane.pb")), "the profile ends with the run"
