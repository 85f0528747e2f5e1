"""Bad input of every kind on the command line: one line, exit code 2, no traceback, less than 2 GiB and 20 seconds."""

from __future__ import annotations

import gzip
import json
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter

from tests.faults.suite import CONTEXT, Suite, child, corpus_rows

SECONDS, GIBIBYTES = 20.0, 2.0  # of the processor and of memory that one command may take
PATIENCE = 6 * SECONDS  # after which a command has hung, even on a busy machine
ARGUMENTS, CHECKPOINTS = 1_500, 400  # how many of them are tried


@dataclass(frozen=True)
class Case:
    """A command line that cannot be carried out; `may_pass` where what was damaged may still be legal."""

    kind: str
    name: str
    words: tuple[str, ...]
    may_pass: bool = False


def bad_inputs(suite: Suite) -> None:
    """Try all kinds; print each failed case with the end of its output."""
    counts: Counter[str] = Counter()
    for case in [*corpus_cases(suite), *run_file_cases(suite)]:
        counts[case.kind] += 1
        problem = try_case(suite, case)
        suite.check(f"bad input, {case.kind}: {case.name}{problem and ': ' + problem}", not problem)
    counts["arguments"] = others(suite, "-m", "tests.fuzz_arguments", "--cases", str(ARGUMENTS))
    counts["checkpoints"] = others(
        suite, "tests/interop/mutations.py", str(suite.home / "mutations"), "--count", str(CHECKPOINTS)
    )
    print(f"bad inputs: {sum(counts.values())} (" + ", ".join(f"{kind} {n}" for kind, n in counts.items()) + ")", flush=True)


def others(suite: Suite, *command: str) -> int:
    """Run a separate program on bad arguments or damaged checkpoints in one process; return the number of cases."""
    words = [sys.executable, *command, "--seed", str(suite.seed)]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    print(done.stdout, end="", flush=True)
    tried, survived = 0, 0
    if found := re.search(r"bad arguments: (\d+) tried, (\d+) survived", done.stdout):
        tried, survived = map(int, found.groups())
    elif found := re.search(r"(\d+) damaged checkpoints: (\d+) refused in one line, (\d+) imported", done.stdout):
        tried, survived = int(found[1]), int(found[2]) + int(found[3])
    suite.injected += max(tried, 1)
    suite.survived += survived
    if not tried:
        print(f"NOT SURVIVED: {command}: {done.stderr[-2000:]}", flush=True)
    return tried


def try_case(suite: Suite, case: Case) -> str:
    """The problem with the end of a command; "" if there is none."""
    log, used = suite.home / "fuzz.log", CONTEXT.Array("d", 2)
    log.write_bytes(b"")
    process = CONTEXT.Process(target=measured, args=(list(case.words), log, used))
    process.start()
    process.join(PATIENCE)
    late = process.is_alive()
    process.kill()
    process.join()
    said, code = log.read_text(errors="replace"), process.exitcode
    last = (said.strip().splitlines() or ["nothing was said"])[-1][:200]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if late:
        return f"it hangs; {last}"
    gibibytes, seconds = used
    if seconds > SECONDS:
        return f"{seconds:.0f} s of the processor; {last}"
    if gibibytes > GIBIBYTES:
        return f"{gibibytes:.1f} GiB of memory"
    if "Traceback" in said or "panicked" in said:
        return f"a traceback, {last}"
    if code == 0 and case.may_pass:
        return ""
    return "" if code == 2 and len(errors) == 1 else f"exit code {code}, {len(errors)} errors, {last}"


def measured(words: list[str], log: Path, used: Any) -> None:
    """Run a command line and write its peak memory (GiB) and processor time (s) to `used`."""
    try:
        child(words, log, None)
    finally:
        found = resource.getrusage(resource.RUSAGE_SELF)
        used[:] = found.ru_maxrss / 2**20, found.ru_utime + found.ru_stime


# ------------------------------------------------------------------------------------------------------- kinds


def corpus_cases(suite: Suite) -> Iterator[Case]:
    """Corpora of every file format, damaged or of another format than the name says."""
    folder = suite.home / "corpora"
    folder.mkdir(exist_ok=True)
    rows, draw = corpus_rows(30), np.random.default_rng(suite.seed)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    pq.write_table(pa.Table.from_pylist(rows), folder / "whole.parquet")
    writer = ArrayRecordWriter(str(folder / "whole.arrayrecord"), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()
    whole = {
        "jsonl": lines,
        "jsonl.gz": gzip.compress(lines),
        "parquet": (folder / "whole.parquet").read_bytes(),
        "arrayrecord": (folder / "whole.arrayrecord").read_bytes(),
    }
    surely = {
        "empty": b"",
        "a page": b"<!DOCTYPE html><html>404</html>",
        "zeros": bytes(4096),
        "not UTF-8": b'{"text": "\xff\xfe"}\n' * 9,
        "a list": b"[1, 2]\n" * 9,
        "no text": b'{"words": "a"}\n' * 9,
        "numbers": b'{"text": 3}\n' * 9,
        "deep": b"[" * 100_000 + b"\n",
        "half a surrogate": b'{"text": "\\ud800"}\n' * 9,
        "one long number": b'{"text": ' + b"9" * 5000 + b"}\n",
    }
    for ending, content in whole.items():
        kind = ending.partition(".")[0]
        made = {name: (data, False) for name, data in surely.items()}
        made |= {f"cut at {at:.0%}": (content[: int(len(content) * at)], kind == "jsonl") for at in (0.02, 0.3, 0.6, 0.97)}
        for n in range(8):
            data = bytearray(content)
            for at in draw.integers(0, len(data), 3):
                data[at] = draw.integers(0, 256)
            made[f"flipped {n}"] = (bytes(data), True)
        made |= {f"the file of {other}": (data, False) for other, data in whole.items() if other.partition(".")[0] != kind}
        for number, (name, (data, may_pass)) in enumerate(made.items()):
            path = folder / f"{kind}-{number}.{ending}"
            path.write_bytes(data)
            source = f"{kind}:{path}?origin=module"
            yield Case(
                f"corpus of {ending}",
                name,
                tuple(suite.command(suite.new(), f"data.sources={source}", "training.steps=2")),
                may_pass,
            )
            yield Case(f"corpus of {ending}", f"show, {name}", ("show", source, "--cache-dir", str(suite.home / "cache")), True)


def run_file_cases(suite: Suite) -> Iterator[Case]:
    """Other input files of a command: tokenizers, questions, pairs."""
    folder = suite.home / "given"
    folder.mkdir(exist_ok=True)
    contents = {
        "empty": b"",
        "a page": b"<html>",
        "zeros": bytes(100),
        "not UTF-8": b"\xff" * 50,
        "null": b"null",
        "a list": b"[]",
        "an object": b"{}",
        "a number": b"1e999",
        "cut": b'{"model": {"type": "BPE", "vocab": {"a": 0',
        "deep": b"[" * 50_000,
        "wrong types": b'{"model": 3, "added_tokens": "x"}',
        "question": b'{"question": 1, "choices": []}\n',
    }
    for number, (name, data) in enumerate(contents.items()):
        path = folder / f"given-{number}.json"
        path.write_bytes(data)
        for kind in ("hf", "sentencepiece", "gpt2", "run"):
            yield Case("tokenizers", f"{kind}, {name}", tuple(suite.command(suite.new(), f"data.tokenizer={kind}:{path}")))
        question = ("eval", str(suite.undisturbed), "--choice", f"arc_easy:{path}", "--cache-dir", str(suite.home / "cache"))
        yield Case("questions", name, question)
