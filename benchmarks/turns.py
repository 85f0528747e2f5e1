"""Programs that take turns on one machine, each in a process of its own, and the ratio of their times.

A worker prints "ready" and then, for every line that it reads, the wall and the CPU seconds of one piece of work.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def work(run: Callable[[], Any], repeat: int) -> None:
    """Be a worker whose piece of work is `repeat` calls of `run`, after four calls that warm up."""
    out, sys.stdout = sys.stdout, sys.stderr
    for _ in range(4):
        run()
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        used, began = _cpu_seconds(), time.perf_counter()
        for _ in range(repeat):
            run()
        print(time.perf_counter() - began, _cpu_seconds() - used, file=out, flush=True)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def take_turns(commands: dict[str, Sequence[str]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """{name: {"wall": seconds of every round, "cpu": likewise}}. The order of a round alternates. A worker that cannot start, for
    example without PyTorch, is left out with its last line of stderr."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive"}
    workers: dict[str, subprocess.Popen[str]] = {}
    for name, command in commands.items():
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        worker = subprocess.Popen([sys.executable, *command], text=True, env=environment, **pipes)
        if worker.stdout.readline().strip() == "ready":
            workers[name] = worker
        else:
            print(f"{name} is left out: {worker.communicate()[1].strip().splitlines()[-1]}", file=sys.stderr)
    found = {name: {"wall": [], "cpu": []} for name in workers}
    for number in range(rounds):
        for name, worker in list(workers.items())[:: 1 if number % 2 == 0 else -1]:
            worker.stdin.write("go\n")
            worker.stdin.flush()
            for kind, seconds in zip(found[name].values(), worker.stdout.readline().split(), strict=True):
                kind.append(float(seconds))
    for worker in workers.values():
        worker.communicate()
    return found


def ratios(found: dict[str, dict[str, list[float]]], first: str) -> list[str]:
    """A line for each other worker: its time relative to that of `first`, the median over the rounds, and the extremes."""
    lines = []
    for name in found.keys() - {first}:
        parts = []
        for kind in ("cpu", "wall"):
            both = [b / a for a, b in zip(found[first][kind], found[name][kind], strict=True)]
            parts.append(f"{kind} {statistics.median(both):.3f} ({min(both):.3f} to {max(both):.3f})")
        lines.append(f"{name} / {first}: {', '.join(parts)}")
    return sorted(lines)
