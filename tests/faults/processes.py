"""Processes that end at any moment, or are started twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metajax.runs.files import read_lines
from tests.faults.suite import HYBRID, Ended, Suite, command

TABLE = ("--rows", "plain,meta_tokens")  # of the quickstart


def kills(suite: Suite) -> None:
    """SIGKILL at random moments: during the start, compilation, steps, saves, evaluation or the report."""
    workdir, pending, count = suite.new(), [], suite.kills
    for number in range(1, count + 1):
        process, wait = suite.start(workdir), suite.random.uniform(0.1, 1.0) * suite.seconds
        process.join(wait)
        steps = len(read_lines(workdir / "metrics.jsonl"))
        pending.append(f"SIGKILL {number} of {count}, {wait:.1f} s after the start, {steps} steps logged")
        process.kill()
        process.join()
        if number == count or (workdir / "report.json").exists():
            suite.finish(workdir)
            same = suite.same(workdir)
            for fault in pending:
                suite.check(fault, same)
            workdir, pending = suite.new(), []


def kills_of_hymba(suite: Suite) -> None:
    """SIGKILL in the middle of a hybrid model's steps."""
    options, whole, workdir = {"name": "quickstart/plain"}, suite.new(), suite.new()
    suite.finish(whole, *HYBRID, **options)
    for step in (7, 18, 31, 44, 58):
        suite.cut(workdir, step, *HYBRID, **options)
    suite.finish(workdir, *HYBRID, **options)
    same = suite.outcome(workdir) == suite.outcome(whole)
    for step in (7, 18, 31, 44, 58):
        suite.check(f"SIGKILL of Hymba after step {step}", same)


def preemption(suite: Suite) -> None:
    """SIGTERM or Ctrl-C during the steps: the run saves, ends with the exit code for it, and resumes."""
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        workdir = suite.new()
        process = suite.start(workdir)
        suite.wait_for(workdir, 8, process)
        os.kill(process.pid, number)
        process.join()
        said = suite.log(workdir).read_text()
        suite.finish(workdir)
        restarted = json.loads((workdir / "report.json").read_text())["restarted_from"]
        good = process.exitcode == code and restarted >= 8 and "Traceback" not in said and suite.same(workdir)
        suite.check(f"{number.name}: ended with {process.exitcode}, taken up at step {restarted}", good)


def second_interrupt(suite: Suite) -> None:
    """Ctrl-C twice: the process ends within seconds without a traceback, and the run resumes from an older save."""
    workdir = suite.new()
    process = suite.start(workdir)
    suite.wait_for(workdir, 12, process)
    began = time.monotonic()
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.01)
    process.join(20)
    seconds, code = time.monotonic() - began, process.exitcode
    process.kill()
    process.join()
    said = suite.log(workdir).read_text()
    suite.finish(workdir)
    good = code == 130 and "Traceback" not in said and suite.same(workdir)
    suite.check(f"Ctrl-C twice: ended with {code} after {seconds:.1f} s", good)


def lost_host(suite: Suite, signal_number: int, name: str) -> None:
    """One of two processes dies or hangs: the other ends with the restart code, and the run resumes."""
    workdir = suite.new()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = ("--coordinator", f"localhost:{port}", "--processes", "2", "--process-id")
    pair = [suite.start(workdir, "runtime.hang_seconds=60", words=(*place, str(i))) for i in range(2)]
    suite.wait_for(workdir, 12, pair[0])
    assert pair[0].is_alive(), suite.log(workdir).read_text()[-3000:]
    os.kill(pair[1].pid, signal_number)
    pair[0].join()
    pair[1].kill()
    pair[1].join()
    suite.finish(workdir)
    ours, theirs = suite.outcome(workdir)[1], suite.whole[1]
    far = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True))
    code = pair[0].exitcode
    suite.check(
        f"one of two hosts {name}: the other ended with {code}; loss within {far:.0e} of one process",
        (code == 75 or code < 0) and far < 1e-5,
    )


def lost_hosts(suite: Suite) -> None:
    """Let one of two processes die or hang."""
    lost_host(suite, signal.SIGKILL, "is killed")
    lost_host(suite, signal.SIGSTOP, "stands still")


# ------------------------------------------------------------------------------------------------------ tables


def table_words(suite: Suite, folder: Path, *more: str) -> list[str]:
    """A table of two tiny runs."""
    return [*command(suite.home, folder, name="quickstart", place="--runs-dir"), *TABLE, *more]


def table_outcomes(suite: Suite, folder: Path) -> dict[str, Any]:
    """The outcome of every run of a table, by its name."""
    runs = sorted(path.parent for path in folder.rglob("report.json") if (path.parent / "config.json").exists())
    return {run.relative_to(folder).as_posix(): suite.outcome(run) for run in runs}


def kill_under_jobs(suite: Suite) -> None:
    """A child of `--jobs 2` is killed during its steps: the table ends with one line, and the same command continues."""
    whole, folder = suite.new(), suite.new()
    assert suite.run_words(table_words(suite, whole, "--jobs", "2"), suite.log(whole)).code == 0
    process = suite.start_words(table_words(suite, folder, "--jobs", "2"), suite.log(folder))
    victim = _wait_for(lambda: next(iter(_running(folder)), None), process)
    if victim is not None:
        os.kill(victim, signal.SIGKILL)
    process.join()
    said = suite.log(folder).read_text()
    again = suite.run_words(table_words(suite, folder, "--jobs", "2"), suite.log(folder))
    same = again.code == 0 and table_outcomes(suite, folder) == table_outcomes(suite, whole)
    good = victim is not None and process.exitcode in (1, 2) and "Traceback" not in said and same
    suite.check(f"a child of --jobs is killed: the table ended with {process.exitcode}, then with {again.code}", good)


def table_twice(suite: Suite) -> None:
    """A table is started twice at once: no run is made by two processes, and both commands give the same numbers."""
    whole, folder = suite.new(), suite.new()
    assert suite.run_words(table_words(suite, whole), suite.log(whole)).code == 0
    logs = [suite.home / f"{folder.name}-{n}.log" for n in range(2)]
    pair = [suite.start_words(table_words(suite, folder), log) for log in logs]
    for process in pair:
        process.join()
    again = suite.run_words(table_words(suite, folder), suite.log(folder))
    codes, said = [process.exitcode for process in pair], "".join(log.read_text() for log in logs)
    same = again.code == 0 and table_outcomes(suite, folder) == table_outcomes(suite, whole)
    suite.check(
        f"a table started twice: ended with {codes}, then with {again.code}",
        "Traceback" not in said and min(codes) >= 0 and max(codes) <= 2 and same,
    )


def run_twice(suite: Suite) -> None:
    """A run is started while it runs: the second start is refused in one line, and the first is undisturbed."""
    workdir = suite.new()
    process = suite.start(workdir)
    suite.wait_for(workdir, 8, process)
    second: Ended = suite.run_words(command(suite.home, workdir), suite.home / f"{workdir.name}-second.log")
    process.join()
    suite.check(
        f"a run started twice: the second ended with {second.code}",
        second.refused and process.exitcode == 0 and suite.same(workdir),
    )


def _running(folder: Path) -> list[int]:
    """Processes that hold a run.log of `folder` open, once their run has logged a few steps."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            target = Path(os.readlink(entry / "fd" / "1"))
        except OSError:  # the process has ended, or is another user's
            continue
        if target.name == "run.log" and folder in target.parents and len(read_lines(target.parent / "metrics.jsonl")) >= 5:
            found.append(int(entry.name))
    return found


def _wait_for(found: Callable[[], Any], process: Any) -> Any:
    while process.is_alive():
        if (what := found()) is not None:
            return what
        time.sleep(0.01)
    return None
