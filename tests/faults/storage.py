"""Storage that is damaged, full, slow, read-only, gone, or out of open files; and buckets that do not answer as they should."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.bucket import serving
from tests.faults.suite import Suite, corpus_rows, write_corpus


def damaged_checkpoints(suite: Suite) -> None:
    """The newest checkpoint has a flipped bit, is cut, or lacks a file: the run uses the one before and reports it."""
    workdir = suite.new()
    for number, damage in enumerate((_flip, _truncate, _tear), 1):
        suite.cut(workdir, 17 * number, "runtime.keep=4")
        newest = max(int(path.name.partition("-")[0]) for path in (workdir / "hashes").glob("*.json"))
        damage(workdir / "checkpoints" / str(newest))
    suite.finish(workdir)
    warnings = sum("is damaged" in text for text in json.loads((workdir / "report.json").read_text())["warnings"])
    good = suite.same(workdir) and warnings == 3
    for damage in ("a flipped bit", "cut short", "a file gone"):
        suite.check(f"the newest checkpoint with {damage}: the one before was used", good)


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


def _small_disk(bytes_: int = 1 << 15) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))


def full_disk(suite: Suite) -> None:
    """No file may grow beyond 32 kB, which fails like a full disk: one line, exit code 2, nothing damaged."""
    workdir = suite.new()
    suite.cut(workdir, 12)
    ended = suite.run(workdir, first=_small_disk)
    suite.finish(workdir)
    suite.check(f"full disk: exit code {ended.code}, {ended.errors}", ended.refused and suite.same(workdir))


def full_disk_while_tokenising(suite: Suite) -> None:
    """The same during tokenising, at several sizes, so that each file of the cache once meets the limit."""
    corpus = suite.home / "large.jsonl"
    write_corpus(corpus, 2_000)
    data = f"data.sources=jsonl:{corpus}?origin=module"
    whole = suite.new()
    suite.finish(whole, data, "training.steps=5")
    for size in (4_000, 9_000, 20_000, 60_000, 120_000):  # the log of the command has to fit, too
        workdir = suite.new()
        place = functools.partial(suite.run, workdir, data, "training.steps=5", cache=str(suite.home / f"cache-{size}"))
        ended = place(first=functools.partial(_small_disk, size))
        again = place()
        good = ended.refused and again.code == 0 and suite.outcome(workdir) == suite.outcome(whole)
        suite.check(f"full disk while tokenising, at {size:,} bytes: exit code {ended.code}, {ended.errors}", good)


def _no_privileges() -> None:
    """From now on root obeys file permissions like other users."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # capget(2), version 3; 0: this thread
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    sets[0] &= ~0b110  # effective: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def unwritable(suite: Suite) -> None:
    """At a restart the workdir is not writable: one line names a path. Writable again, the run resumes."""
    workdir = suite.new()
    suite.cut(workdir, 12)
    folders = [workdir, *(path for path in workdir.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    ended = suite.run(workdir, first=_no_privileges)
    for folder in folders:
        folder.chmod(0o755)
    suite.finish(workdir)
    good = ended.refused and str(workdir) in ended.errors[0] and suite.same(workdir)
    suite.check(f"unwritable directory: exit code {ended.code}, {ended.errors}", good)


def _slow_storage(seconds: float) -> None:
    """Delay every call that creates, renames or lists files."""
    for name in ("mkdir", "rename", "replace", "scandir", "listdir"):
        setattr(os, name, functools.partial(_slowly, getattr(os, name), seconds))


def _slowly(act: Callable[..., Any], seconds: float, *arguments: Any, **named: Any) -> Any:
    time.sleep(seconds)
    return act(*arguments, **named)


def slow_storage(suite: Suite) -> None:
    """A save takes longer than the steps to the next one; killed during a save, then run to the end: it costs only time."""
    workdir, slow = suite.new(), functools.partial(_slow_storage, 0.03)
    suite.cut(workdir, 17, first=slow)
    suite.finish(workdir, first=slow)
    spent = json.loads((workdir / "report.json").read_text())["goodput"]
    waited = spent["seconds"] * spent["checkpoint"]
    suite.check(f"slow storage: {waited:.1f} s of waiting for saves", waited > 1 and suite.same(workdir))


def vanished_data(suite: Suite) -> None:
    """At a restart the corpus is missing: one line names it. Put back, the run resumes."""
    workdir, corpus = suite.new(), suite.home / "corpus.jsonl"
    suite.cut(workdir, 12)
    os.replace(corpus, suite.home / "gone.jsonl")
    ended = suite.run(workdir)
    os.replace(suite.home / "gone.jsonl", corpus)
    suite.finish(workdir)
    good = ended.refused and str(corpus) in ended.errors[0] and suite.same(workdir)
    suite.check(f"vanished data file: exit code {ended.code}", good)


def vanished_workdir(suite: Suite) -> None:
    """The workdir is renamed during the run: one line, exit code 2. Put back, the run resumes."""
    workdir = suite.new()
    process = suite.start(workdir)
    suite.wait_for(workdir, 12, process)
    away = workdir.with_name(f"{workdir.name}-away")
    os.replace(workdir, away)
    process.join()
    said = suite.log(workdir).read_text()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    for path in sorted(workdir.rglob("*"), reverse=True) if workdir.exists() else ():
        path.rmdir() if path.is_dir() else path.unlink()
    if workdir.exists():
        workdir.rmdir()
    os.replace(away, workdir)
    suite.finish(workdir)
    good = process.exitcode == 2 and len(errors) == 1 and "Traceback" not in said and suite.same(workdir)
    suite.check(f"vanished workdir: exit code {process.exitcode}, {errors}", good)


def few_open_files(suite: Suite) -> None:
    """`ulimit -n 64` with a corpus of 120 files: the same numbers as without the limit, or one line that names the limit."""
    folder = suite.home / "many"
    folder.mkdir(exist_ok=True)
    for n, row in enumerate(corpus_rows(120)):
        (folder / f"{n:03}.jsonl").write_text(json.dumps(row) + "\n")
    data = f"data.sources=jsonl:{folder}/*.jsonl?origin=module"
    whole, workdir = suite.new(), suite.new()
    suite.finish(whole, data)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (64, 64))
    ended = suite.run(workdir, data, "data.on_bad_record=skip", first=limit, cache=str(suite.home / "cache-many"))
    named = ended.refused and "open files" in ended.errors[0]
    good = named or (ended.code == 0 and suite.outcome(workdir) == suite.outcome(whole))
    suite.check(f"64 open files at most: exit code {ended.code}, {ended.errors}", good)


# ------------------------------------------------------------------------------------------------------ buckets


def _on_bucket(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)


def bucket_outages(suite: Suite) -> None:
    """A bucket answers 503 for some time, answers slowly, or cuts its answers: the run gives the same numbers."""
    with serving() as bucket:
        names = (
            "STORAGE_EMULATOR_HOST",
            "TENSORSTORE_GCS_HTTP_URL",
            "CLOUD_STORAGE_EMULATOR_ENDPOINT",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING",
        )
        there = functools.partial(_on_bucket, {name: os.environ[name] for name in (*names, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")})
        for number, (fault, act) in enumerate(
            {
                "503 for a second at two saves": lambda: bucket.away.update(
                    {"run1/hashes/10-p0.json": 1.0, "run1/hashes/40-p0.json": 1.0}
                ),
                "every answer 20 ms late": lambda: setattr(bucket, "slow", 0.02),
                "answers cut short": lambda: setattr(bucket, "cut", 12),
            }.items(),
            1,
        ):
            stage = suite.home / f"stage{number}"
            words = ["--runs-dir", str(stage)]
            act()
            log = suite.home / f"bucket{number}.log"
            first = suite.run_words([*suite.command(f"gs://bucket/run{number}"), *words], log, there)
            bucket.slow, again = 0.0, first
            if first.code == 75:  # it ended from outside: the same command goes on
                again = suite.run_words([*suite.command(f"gs://bucket/run{number}"), *words], log, there)
            where = stage / "gs" / "bucket" / f"run{number}"
            same = again.code == 0 and _report(where) == _report(suite.undisturbed)
            left = f", {bucket.cut} answers left to cut" * bool(bucket.cut)
            suite.check(
                f"a bucket: {fault}: exit code {first.code}, then {again.code}{left}", same and "Traceback" not in first.said
            )
            bucket.cut = 0


def _report(workdir: Path) -> tuple[Any, ...]:
    report = json.loads((workdir / "report.json").read_text())
    return report["eval"], report["counts"]
