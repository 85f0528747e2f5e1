"""Fault injection: python -m tests.faults [--kills 50]. Every fault must cost steps at most, never a number.

Each run is the command line in a process of its own, forked from one that has imported everything, so that a kill costs a second or two.
A run that was disturbed must end with the parameters, the curve and the evaluation of the one that was not.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metajax.training.metrics import read_lines

STEPS = 60
CONTEXT = multiprocessing.get_context("forkserver")


def write_corpus(path: Path) -> None:
    """A corpus of 40 documents of numbers in words, from 20 modules."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    rows = [
        {
            "text": " ".join(words[(i * k + k // 3) % 10] for k in range(1, 4 + i % 30)),
            "module": f"m{i % 20}",
            "topic": f"t{i % 5}",
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(home: Path, workdir: Path, *more: str) -> list[str]:
    """The words of a command line that trains a tiny model."""
    changes = (
        f"data.sources=jsonl:{home}/corpus.jsonl?origin=module", "data.tokenizer=byte", "data.row_length=32", "data.batch_rows=4",
        "data.held_out=0.2", "model.layers=2", "model.width=16", "model.heads=2", "model.mlp_width=32", f"training.steps={STEPS}",
        "optimizer.warmup_steps=2", "evaluation.documents=4", "evaluation.sample_tokens=4", "evaluation.conditions=none",
        "runtime.save_every=5", "runtime.log_every=5", *more,
    )  # fmt: skip
    words = [word for change in changes if "=" in change for word in ("--set", change)]
    return ["quickstart/meta_tokens", *words, "--workdir", str(workdir), "--cache-dir", str(home / "cache")]


def child(words: Sequence[str], log: Path, first: Callable[[], None] | None) -> None:
    """What a forked process does: `first`, then one command line, with what it prints in `log`."""
    os.setpgrp()
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if first is not None:
        first()
    from metajax.cli import main

    code = main(words)
    sys.stdout.flush()
    sys.exit(code)


class Suite:
    """Counts what was injected and what was survived."""

    def __init__(self, home: Path, seed: int):
        self.home, self.random = home, random.Random(seed)
        self.injected = self.survived = self._runs = 0
        write_corpus(home / "corpus.jsonl")

    def new(self) -> Path:
        """A folder for another run."""
        self._runs += 1
        return self.home / f"run{self._runs}"

    def start(self, workdir: Path, *more: str, words: Sequence[str] = (), first: Callable[[], None] | None = None) -> Any:
        """A command on its way, in a process that begins with `first`."""
        arguments = ([*command(self.home, workdir, *more), *words], self.home / f"{workdir.name}.log", first)
        process = CONTEXT.Process(target=child, args=arguments)
        process.start()
        return process

    def finish(self, workdir: Path, *more: str, first: Callable[[], None] | None = None) -> None:
        """The same command to its end."""
        process = self.start(workdir, *more, first=first)
        process.join()
        assert process.exitcode == 0, (self.home / f"{workdir.name}.log").read_text()[-3000:]

    def outcome(self, workdir: Path) -> tuple[Any, ...]:
        """What must not depend on faults: the last checkpoint's parameters, the curve, the evaluation and the counts."""
        report = json.loads((workdir / "report.json").read_text())
        lines = read_lines(workdir / "metrics.jsonl")
        with CONTEXT.Pool(1) as pool:
            return pool.apply(parameters, (str(workdir),)), lines, report["eval"], report["counts"]

    def cut(self, workdir: Path, step: int, *more: str, first: Callable[[], None] | None = None) -> None:
        """The command, killed once it has logged `step`."""
        process = self.start(workdir, *more, first=first)
        self.wait_for(workdir, step, process)
        process.kill()
        process.join()

    def refused(self, workdir: Path, first: Callable[[], None] | None = None) -> tuple[int, list[str]]:
        """(exit code, errors it told) of the command where it cannot go on."""
        process = self.start(workdir, first=first)
        process.join()
        lines = (self.home / f"{workdir.name}.log").read_text().splitlines()
        return process.exitcode, [line for line in lines if line.startswith("error: ")]

    def wait_for(self, workdir: Path, step: int, process: Any) -> None:
        """Until a run has logged `step`, or is over."""
        while process.is_alive() and len(read_lines(workdir / "metrics.jsonl")) < step:
            time.sleep(0.005)

    def check(self, fault: str, good: bool) -> None:
        """One fault, and whether it was survived."""
        self.injected += 1
        self.survived += good
        print(f"{'survived' if good else 'NOT SURVIVED'}: {fault}", flush=True)


def parameters(workdir: str) -> str:
    """A hash of the parameters in a run's newest checkpoint."""
    import jax

    from metajax.experiment import open_run
    from metajax.training.state import to_arrays

    digest = hashlib.sha256()
    for path, value in sorted(to_arrays(open_run(Path(workdir)).model).items()):
        digest.update(path.encode() + jax.device_get(value).tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ faults


def kills(suite: Suite, count: int, whole: tuple[Any, ...], seconds: float) -> None:
    """SIGKILL at `count` random moments: starting, compiling, stepping, saving, evaluating, writing the report."""
    workdir, pending = suite.new(), []
    for number in range(1, count + 1):
        process, wait = suite.start(workdir), suite.random.uniform(0.1, 1.0) * seconds
        process.join(wait)
        pending.append(
            f"SIGKILL {number} of {count}, {wait:.1f} s after the start, {len(read_lines(workdir / 'metrics.jsonl'))} steps logged"
        )
        process.kill()
        process.join()
        if number == count or (workdir / "report.json").exists():
            suite.finish(workdir)
            same = suite.outcome(workdir) == whole
            for fault in pending:
                suite.check(fault, same)
            workdir, pending = suite.new(), []


def preemption(suite: Suite, whole: tuple[Any, ...]) -> None:
    """SIGTERM in the middle: saved, ended with 75, taken up."""
    workdir = suite.new()
    process = suite.start(workdir)
    suite.wait_for(workdir, 8, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    suite.finish(workdir)
    restarted = json.loads((workdir / "report.json").read_text())["restarted_from"]
    suite.check(f"SIGTERM: ended with {process.exitcode}, taken up at step {restarted}", process.exitcode == 75 and restarted >= 8 and suite.outcome(workdir) == whole)  # fmt: skip


def _largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _flip(folder: Path) -> None:
    path = _largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(folder: Path) -> None:
    os.truncate(_largest(folder), _largest(folder).stat().st_size // 2)


def _tear(folder: Path) -> None:
    _largest(folder).unlink()


def damaged_checkpoints(suite: Suite, whole: tuple[Any, ...]) -> None:
    """The newest checkpoint flipped, cut short, torn: the one before is used, and the report says so."""
    workdir = suite.new()
    for number, damage in enumerate((_flip, _truncate, _tear), 1):
        suite.cut(workdir, 17 * number, "runtime.keep=4")
        newest = max(int(path.name.partition("-")[0]) for path in (workdir / "hashes").glob("*.json"))
        damage(workdir / "checkpoints" / str(newest))
    suite.finish(workdir)
    warnings = sum("is damaged" in text for text in json.loads((workdir / "report.json").read_text())["warnings"])
    good = suite.outcome(workdir) == whole and warnings == 3
    for damage in ("a flipped bit", "cut short", "a file gone"):
        suite.check(f"the newest checkpoint with {damage}: the one before was used", good)


def _small_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))


def full_disk(suite: Suite, whole: tuple[Any, ...]) -> None:
    """No file may grow beyond 32 kB, a limit that the system keeps as it does that of a full disk: one line, exit code 2, nothing damaged."""
    workdir = suite.new()
    suite.cut(workdir, 12)
    code, said = suite.refused(workdir, _small_disk)
    suite.finish(workdir)
    suite.check(
        f"full disk: exit code {code}, {said}",
        code == 2 and len(said) == 1 and "make room" in said[0] and suite.outcome(workdir) == whole,
    )


def _no_privileges() -> None:
    """Root obeys the permissions of files from here on, as everyone else does."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # capget(2), version 3; 0: this thread
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    sets[0] &= ~0b110  # effective: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def unwritable(suite: Suite, whole: tuple[Any, ...]) -> None:
    """The permission to write in the workdir is gone at a restart: one line that names a path; it comes back, and the run goes on."""
    workdir = suite.new()
    suite.cut(workdir, 12)
    folders = [workdir, *(path for path in workdir.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    code, said = suite.refused(workdir, _no_privileges)
    for folder in folders:
        folder.chmod(0o755)
    suite.finish(workdir)
    named = len(said) == 1 and str(workdir) in said[0]
    suite.check(f"unwritable directory: exit code {code}, {said}", code == 2 and named and suite.outcome(workdir) == whole)


def _slow_storage(seconds: float) -> None:
    """Every call that makes, names or lists files takes this much longer."""
    for name in ("mkdir", "rename", "replace", "scandir", "listdir"):
        setattr(os, name, functools.partial(_slowly, getattr(os, name), seconds))


def _slowly(act: Callable[..., Any], seconds: float, *arguments: Any, **named: Any) -> Any:
    time.sleep(seconds)
    return act(*arguments, **named)


def slow_storage(suite: Suite, whole: tuple[Any, ...]) -> None:
    """A save takes longer than the steps to the next one; killed in the middle, then to its end: it costs time alone."""
    workdir, slow = suite.new(), functools.partial(_slow_storage, 0.03)
    suite.cut(workdir, 17, first=slow)
    suite.finish(workdir, first=slow)
    spent = json.loads((workdir / "report.json").read_text())["goodput"]
    waited = spent["seconds"] * spent["checkpoint"]
    suite.check(f"slow storage: {waited:.1f} s of waiting for saves", waited > 1 and suite.outcome(workdir) == whole)


def vanished_data(suite: Suite, whole: tuple[Any, ...]) -> None:
    """The corpus is gone at a restart: one line that names it; it comes back, and the run goes on."""
    workdir, corpus = suite.new(), suite.home / "corpus.jsonl"
    suite.cut(workdir, 12)
    os.replace(corpus, suite.home / "gone.jsonl")
    code, said = suite.refused(workdir)
    os.replace(suite.home / "gone.jsonl", corpus)
    suite.finish(workdir)
    named = len(said) == 1 and f"{corpus}: no such file" in said[0]
    suite.check(f"vanished data file: exit code {code}", code == 2 and named and suite.outcome(workdir) == whole)


def lost_host(suite: Suite, whole: tuple[Any, ...], signal_number: int, name: str) -> None:
    """One of two processes dies or stands still: the other ends by itself with a code to restart on, and the run goes on."""
    workdir = suite.new()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = ("--coordinator", f"localhost:{port}", "--processes", "2", "--process-id")
    pair = [suite.start(workdir, "runtime.hang_seconds=60", words=(*place, str(i))) for i in range(2)]
    suite.wait_for(workdir, 12, pair[0])
    assert pair[0].is_alive(), (suite.home / f"{workdir.name}.log").read_text()[-3000:]
    os.kill(pair[1].pid, signal_number)
    pair[0].join()
    pair[1].kill()
    pair[1].join()
    suite.finish(workdir)
    ours, theirs = suite.outcome(workdir)[1], whole[1]
    far = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True))
    code = pair[0].exitcode
    suite.check(f"one of two hosts {name}: the other ended with {code}; loss within {far:.0e} of one process", (code == 75 or code < 0) and far < 1e-5)  # fmt: skip


def lost_hosts(suite: Suite, whole: tuple[Any, ...]) -> None:
    """One of two processes dies, or stands still."""
    lost_host(suite, whole, signal.SIGKILL, "is killed")
    lost_host(suite, whole, signal.SIGSTOP, "stands still")


FAULTS: dict[str, Callable[..., None]] = {
    "kills": kills,
    "preemption": preemption,
    "damage": damaged_checkpoints,
    "full_disk": full_disk,
    "unwritable": unwritable,
    "slow_storage": slow_storage,
    "vanished_data": vanished_data,
    "lost_hosts": lost_hosts,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="inject faults into tiny runs and count those survived")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="random SIGKILLs (50)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="of the moments (another each time)")
    parser.add_argument("--only", default=",".join(FAULTS), metavar="LIST", help=f"some of {','.join(FAULTS)} (all)")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.pop("XLA_FLAGS", None)
    CONTEXT.set_forkserver_preload(["metajax.experiment", "metajax.verbs", "metajax.cli", "metajax.reporting.terminal"])
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder), options.seed)
        first = suite.new()
        suite.finish(first)
        whole, undisturbed, began = suite.outcome(first), suite.new(), time.monotonic()
        suite.finish(undisturbed)
        seconds = time.monotonic() - began
        assert suite.outcome(undisturbed) == whole, "two undisturbed runs differ"
        for name in options.only.split(","):
            if name == "kills":
                kills(suite, options.kills, whole, seconds)
            else:
                FAULTS[name](suite, whole)
    print(f"faults injected {suite.injected}, survived {suite.survived}")
    return 0 if suite.injected == suite.survived else 1


if __name__ == "__main__":
    sys.exit(main())
