"""Tiny runs in separate processes, and the results that must not change when they are disturbed.

Each run is the command line in a process forked from one that has imported everything, so that a kill costs a second or two.
A disturbed run must end with the parameters, the curve and the evaluation of the undisturbed run.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metajax.runs.files import read_lines

STEPS = 60
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["metajax.experiment", "metajax.cli.verbs.run", "metajax.cli.main", "metajax.reporting.terminal"]


HYBRID = ("model.window=8", 'model.hybrid={"prefix_tokens": 2, "full_layers": [0], "state": 4}')


def corpus_rows(documents: int = 40) -> list[dict[str, str]]:
    """Documents of numbers in words, from 20 modules."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    text = lambda i: " ".join(words[(i * k + k // 3) % 10] for k in range(1, 4 + i % 30))  # noqa: E731
    return [{"text": text(i), "module": f"m{i % 20}", "topic": f"t{i % 5}"} for i in range(documents)]


def write_corpus(path: Path, documents: int = 40) -> None:
    """The documents as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in corpus_rows(documents)))


def command(
    home: Path, workdir: Path | str, *more: str, name: str = "quickstart/meta_tokens", place: str = "--workdir", cache: str = ""
) -> list[str]:
    """The words of a command line that trains a tiny model; `more`: further fields, FIELD=VALUE."""
    changes = (
        f"data.sources=jsonl:{home}/corpus.jsonl?origin=module",
        "data.tokenizer=byte",
        "data.sequence_length=32",
        "data.batch_size=4",
        "data.validation_share=0.2",
        "model.layers=2",
        "model.width=16",
        "model.heads=2",
        "model.mlp_width=32",
        f"training.steps={STEPS}",
        "optimizer.warmup_steps=2",
        "evaluation.documents=4",
        "evaluation.sample_tokens=4",
        "evaluation.conditions=none",
        "runtime.save_every=5",
        "runtime.log_every=5",
        *more,
    )
    words = [word for change in changes if "=" in change for word in ("--set", change)]
    return [name, *words, place, str(workdir), "--cache-dir", cache or str(home / "cache")]


def child(words: Sequence[str], log: Path, first: Callable[[], None] | None) -> None:
    """In a forked process: call `first`, then one command line; its output goes to `log`."""
    os.setpgrp()
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if first is not None:
        first()
    from metajax.cli.main import main

    code = main(words)
    sys.stdout.flush()
    sys.exit(code)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, and all that it printed since it began."""

    code: int
    said: str

    @property
    def errors(self) -> list[str]:
        """The lines of the output that begin with `error:`."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]

    @property
    def refused(self) -> bool:
        """Whether it ended with exit code 2 and one line, and without a traceback."""
        return self.code == 2 and len(self.errors) == 1 and "Traceback" not in self.said


@dataclass
class Suite:
    """Starts commands, and counts what was injected and what was survived."""

    home: Path
    seed: int
    kills: int = 50
    injected: int = 0
    survived: int = 0
    _runs: int = 0
    undisturbed: Path = Path()  # the run that is not disturbed
    whole: tuple[Any, ...] = ()  # its outcome
    seconds: float = 0.0  # that it takes
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        write_corpus(self.home / "corpus.jsonl")

    def new(self) -> Path:
        """A folder for another run."""
        self._runs += 1
        return self.home / f"run{self._runs}"

    def command(self, workdir: Path | str, *more: str, **options: str) -> list[str]:
        """The words of the tiny run of a folder."""
        return command(self.home, workdir, *more, **options)

    def log(self, workdir: Path) -> Path:
        """What the commands of a folder print."""
        return self.home / f"{workdir.name}.log"

    def start_words(self, words: Sequence[str], log: Path, first: Callable[[], None] | None = None) -> Any:
        """Start a command line in a process that first calls `first`."""
        process = CONTEXT.Process(target=child, args=(list(words), log, first))
        process.start()
        return process

    def run_words(
        self, words: Sequence[str], log: Path, first: Callable[[], None] | None = None, seconds: float | None = None
    ) -> Ended:
        """Run a command line to its end, or kill it after `seconds`."""
        before = log.stat().st_size if log.exists() else 0
        process = self.start_words(words, log, first)
        process.join(seconds)
        process.kill()
        process.join()
        with open(log, "rb") as file:
            file.seek(before)
            return Ended(process.exitcode, file.read().decode(errors="replace"))

    def start(
        self, workdir: Path, *more: str, words: Sequence[str] = (), first: Callable[[], None] | None = None, **options: str
    ) -> Any:
        """Start the tiny run of a folder."""
        return self.start_words([*command(self.home, workdir, *more, **options), *words], self.log(workdir), first)

    def run(self, workdir: Path, *more: str, first: Callable[[], None] | None = None, **options: str) -> Ended:
        """Run the tiny run of a folder to its end, successful or not."""
        return self.run_words(command(self.home, workdir, *more, **options), self.log(workdir), first)

    def finish(self, workdir: Path, *more: str, first: Callable[[], None] | None = None, **options: str) -> None:
        """The same; it must succeed."""
        ended = self.run(workdir, *more, first=first, **options)
        assert ended.code == 0, ended.said[-3000:]

    def outcome(self, workdir: Path) -> tuple[Any, ...]:
        """The results that must not depend on faults: the last checkpoint's parameters, the curve, the evaluation and the counts."""
        report = json.loads((workdir / "report.json").read_text())
        lines = read_lines(workdir / "metrics.jsonl")
        with CONTEXT.Pool(1) as pool:
            return pool.apply(parameters, (str(workdir),)), lines, report["eval"], report["counts"]

    def same(self, workdir: Path) -> bool:
        """Whether a run has the results of the undisturbed one."""
        return self.outcome(workdir) == self.whole

    def cut(self, workdir: Path, step: int, *more: str, first: Callable[[], None] | None = None, **options: str) -> None:
        """Run the command and kill it after it has logged `step`."""
        process = self.start(workdir, *more, first=first, **options)
        self.wait_for(workdir, step, process)
        process.kill()
        process.join()

    def wait_for(self, workdir: Path, step: int, process: Any) -> None:
        """Wait until a run has logged `step` or has ended."""
        while process.is_alive() and len(read_lines(workdir / "metrics.jsonl")) < step:
            time.sleep(0.005)

    def check(self, fault: str, good: bool) -> None:
        """Record one fault and whether the run survived it."""
        self.injected += 1
        self.survived += good
        print(f"{'survived' if good else 'NOT SURVIVED'}: {fault}", flush=True)


def parameters(workdir: str) -> str:
    """A hash of the parameters in a run's newest checkpoint."""
    import jax

    from metajax.training.opened import open_run
    from metajax.training.state import to_arrays

    digest = hashlib.sha256()
    for path, value in sorted(to_arrays(open_run(Path(workdir)).model).items()):
        digest.update(path.encode() + jax.device_get(value).tobytes())
    return digest.hexdigest()
