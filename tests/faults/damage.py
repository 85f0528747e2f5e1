"""Every file of a run or a cache, damaged in every way: the numbers stay the same, or one line names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.damage import DAMAGES, cases
from tests.faults.suite import Suite

CUT_AT = 48  # the last save before it is of step 45
READERS = (
    ("runs",),
    ("eval", "{run}", "--documents", "2"),
    ("compare", "{run}", "{other}"),
    ("checkpoints", "{run}", "--verify"),
)


def damaged_copies(suite: Suite, folder: Path, another: Path, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, Path]]:
    """(description, a copy of the folder with one file damaged), for every file and every kind of damage."""
    for name, way in list(cases(folder)):
        if Path(name).parts[0] in skip or (way == "others" and not (another / name).is_file()):
            continue
        copy = suite.new()
        shutil.copytree(folder, copy)
        DAMAGES[way](copy / name, another / name)
        yield f"{name}: {way}", copy
        shutil.rmtree(copy)


def damaged_runs(suite: Suite) -> None:
    """Damage a run that resumes and a complete one; "others" is the file of a run with another seed."""
    begun, other = suite.new(), suite.new()
    suite.cut(begun, CUT_AT)
    process = suite.start(other, words=("--seed", "1"))
    suite.wait_for(other, CUT_AT, process)
    process.kill()
    process.join()
    for fault, copy in damaged_copies(suite, begun, other):
        ended = suite.run(copy)
        good = ended.refused
        if ended.code == 0 and "Traceback" not in ended.said:
            told = json.loads((copy / "report.json").read_text())["warnings"]
            found, whole = suite.outcome(copy), suite.whole
            good = found == whole or (bool(told) and found[0] == whole[0])
        suite.check(f"a run that goes on, {fault}: exit code {ended.code}, {ended.errors}", good)
    for fault, copy in damaged_copies(suite, suite.undisturbed, other, skip=("damaged",)):
        for words in READERS:
            filled = [word.format(run=copy, other=suite.undisturbed) for word in words]
            place = ["--runs-dir", str(suite.home), "--cache-dir", str(suite.home / "cache")]
            ended = suite.run_words([*filled, *place], suite.log(copy))
            damage_found = words[0] == "checkpoints" and ended.code == 1
            good = "Traceback" not in ended.said and (ended.code == 0 or damage_found or (ended.refused and words[0] != "runs"))
            suite.check(f"{words[0]} of a complete run, {fault}: exit code {ended.code}, {ended.errors}", good)


def damaged_caches(suite: Suite) -> None:
    """Damage the cache of a corpus with metadata and a trained tokenizer; "others" is the file of another cache."""
    fields = ("data.tokenizer=bpe:320", "metadata.position=prepend", "metadata.template={topic}", "training.steps=5")
    caches = [suite.home / f"cache-{name}" for name in ("one", "two")]
    suite.finish(whole := suite.new(), *fields, cache=str(caches[0]))
    suite.finish(suite.new(), *fields, "data.on_bad_record=skip", cache=str(caches[1]))
    names = [{path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()} for cache in caches]
    for lost, new in zip(
        sorted(names[0] - names[1]), sorted(names[1] - names[0]), strict=False
    ):  # the same file of another corpus
        (caches[1] / lost).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(caches[1] / new, caches[1] / lost)
    for fault, copy in damaged_copies(suite, caches[0], caches[1]):
        workdir = suite.new()
        ended = suite.run(workdir, *fields, cache=str(copy))
        good = ended.refused
        if ended.code == 0 and "Traceback" not in ended.said:
            good = suite.outcome(workdir) == suite.outcome(whole)
        suite.check(f"a cache, {fault}: exit code {ended.code}, {ended.errors}", good)
