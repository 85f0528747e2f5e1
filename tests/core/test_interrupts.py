"""Ctrl-C: the first ends the run cleanly, the second at once; the processes of a pool end with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metajax import experiment
from metajax.core.interrupts import Interrupted
from metajax.experiment import run_experiment
from metajax.runs.files import read_lines
from metajax.training import trainer
from metajax.training.program import Program

ROOT = Path(__file__).parents[2]
BEGINS = "import contextlib, ctypes, os, signal, sys, time\nfrom metajax.core.interrupts import interruptible, leave\n"
IN_PYTHON = """
try:
    with interruptible():
        print("ready", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    leave(130)
"""
IN_C = """
lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
libc.pthread_mutex_lock(lock)
with interruptible():
    print("ready", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # where it is quicker than the next line
        libc.pthread_mutex_lock(lock)  # for ever, as a compilation, a collective or a wait for storage may be
    libc.pthread_mutex_lock(lock)
"""
AFTER_ORBAX = """
import threading
try:
    with interruptible():
        threading.Thread(target=time.sleep, args=(60,)).start()  # what Python waits for at its end, as for a save
        print("ready", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    leave(130)
"""


def start(script, *under):
    """A started script that has printed `ready`, run by another program or directly."""
    command = [*under, sys.executable, "-c", BEGINS + script]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.fault(31)
@pytest.mark.parametrize(("script", "said"), [(IN_PYTHON, "interrupted\n"), (AFTER_ORBAX, "")])
def test_the_first_interrupt_is_an_exception_and_waits_for_nothing(script, said):
    process, began = start(script), time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == said and process.returncode == 130
    assert time.monotonic() - began < 20


@pytest.mark.fault(31)
def test_the_second_interrupt_ends_the_process_even_in_native_code():
    process = start(IN_C)
    time.sleep(0.5)  # until it is in C
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in said and len(said.splitlines()) <= 2


@pytest.mark.fault(31)
def test_a_background_process_ignores_interrupts():
    process = start(IN_PYTHON.replace("60", "0.5"), "sh", "-c", 'trap "" INT; exec "$@"', "sh")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == "" and process.returncode == 0


POOL = """
from pathlib import Path
from metajax.core.workers import process_pool

def saves_when_asked(path):
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    path.write_text("begun")
    while not asked:
        time.sleep(0.01)
    time.sleep(0.3)
    path.write_text("saved")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        with interruptible(), process_pool(2) as pool:
            for i in range(2): pool.submit(saves_when_asked, folder / str(i))
            while len(list(folder.iterdir())) < 2: time.sleep(0.01)
            print("ready", flush=True)
            time.sleep(60)
    except KeyboardInterrupt:
        leave(130)
"""


def start_pool(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BEGINS + POOL)
    (tmp_path / "marks").mkdir()
    command = [sys.executable, str(script), str(tmp_path / "marks")]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
    assert process.stdout.readline() == "ready\n"
    return process


def gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.fault(31)
@pytest.mark.parametrize("to", ["terminal", "command"])
def test_an_interrupted_table_saves_its_runs(tmp_path, to):
    process = start_pool(tmp_path)
    os.killpg(process.pid, signal.SIGINT) if to == "terminal" else process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and said == ""
    assert [path.read_text() for path in (tmp_path / "marks").iterdir()] == ["saved", "saved"]


@pytest.mark.fault(31)
def test_a_killed_table_saves_and_ends_its_runs(tmp_path):
    process = start_pool(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while not gone(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(process.pid) and {path.read_text() for path in (tmp_path / "marks").iterdir()} == {"saved"}


@pytest.mark.fault(31)
def test_an_interrupted_run_saves_and_resumes(tiny_config, paths, tmp_path, monkeypatch):
    whole, original = run_experiment(tiny_config(), tmp_path / "whole", paths), trainer.Trainer._log

    def log(self, step, *rest):
        original(self, step, *rest)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_log", log)
        with pytest.raises(Interrupted, match="step 4 of 6"):
            run_experiment(tiny_config(), tmp_path / "cut", paths)
    report = run_experiment(tiny_config(), tmp_path / "cut", paths)
    assert Interrupted.EXIT_CODE == 130 and report["restarted_from"] == 4 and report["eval"] == whole["eval"]
    assert read_lines(tmp_path / "cut" / "metrics.jsonl") == read_lines(tmp_path / "whole" / "metrics.jsonl")


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.fault(31)
@pytest.mark.parametrize(("place", "step"), [("evaluate", 6), ("write_report", 6), ("Trainer", 0)])
def test_an_interrupt_outside_the_steps_names_the_step_to_resume_from(tiny_config, paths, tmp_path, monkeypatch, place, step):
    with monkeypatch.context() as patch:
        patch.setattr(experiment, place, interrupt)
        with pytest.raises(Interrupted, match=f"continues from step {step}"):
            run_experiment(tiny_config(), tmp_path, paths)
    run_experiment(tiny_config(), tmp_path, paths)


@pytest.mark.fault(31)
def test_an_interrupt_before_the_first_step_saves_nothing(tiny_config, paths, tmp_path, monkeypatch):
    original = Program.compile_step

    def compile_step(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(Program, "compile_step", compile_step)
    with pytest.raises(Interrupted, match="after step 0 of 6"):
        run_experiment(tiny_config(), tmp_path, paths)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
