"""Bad values for every argument of every verb and for every field: python -m tests.fuzz_arguments [--cases N] [--seed S].

Each case is the words of a command. It has to end with 0, or with 2 and one line, and must send nothing that a terminal obeys. Nothing is
computed: where a value is legal after all, the command ends at what stands in for the work (`no_work`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import random
import sys
import tempfile
import time
import traceback
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from metajax import registry
from metajax.cli import main as cli
from metajax.config import config_hash
from metajax.core.errors import UserError
from metajax.core.fields import field_types, to_dict
from metajax.core.progress import shown
from metajax.runs.files import write_json
from tests.faults.suite import write_corpus

SECONDS = 20.0
VALUES = (
    "",
    " ",
    "-1",
    "0",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e300",
    "1e-38",
    "99999999999999999999",
    "9" * 5000,
    "[/x]",
    "[bold]",
    "ünï",
    "a\x1b]0;b\x07",
    "a\nb",
    "\u202eabc",
    "\x00",
    "a\udcff",
    "x" * 5000,
    "file.txt",
    "folder",
    "file.txt/inside",
    "nowhere/inside",
    "1,,2",
    "-1,0",
    "=",
    "{",
    "{}",
    '{"a": 1}',
    "[" * 2000,
    "none",
    "NULL",
    "true",
    "ftp://x",
    "gs://",
    ":",
    "{x|y}",
    "%s",
    "~",
    "data=0,fsdp=-1",
    "v5e:0x0",
    "1m",
)
RUN = {
    "run": ["quickstart/plain"],
    "table": ["quickstart"],
    "list": [],
    "show": ["quickstart/plain"],
    "cache": ["quickstart/plain"],
    "plan": ["quickstart/plain", "--topology=v5e:2x2"],
    "eval": ["tiny"],
    "analyze": ["tiny"],
    "generate": ["tiny", "--prompt=a"],
    "import": ["llama", "nowhere"],
    "export": ["gpt2", "tiny", "out"],
    "runs": [],
    "checkpoints": ["tiny"],
    "preflight": [],
    "compare": ["tiny", "tiny"],
}
OF_FIELDS = ("quickstart/metadata", "prompt_learning/base_to_new/coop/emoji")


def cases(seed: int) -> Iterator[list[str]]:
    """All cases, shuffled by the seed."""
    registry.load()
    found = [case for verb, parser in _verbs().items() for case in _of_verb(verb, parser)] + list(_of_fields())
    random.Random(seed).shuffle(found)
    yield from found


def _verbs() -> dict[str, argparse.ArgumentParser]:
    (sub,) = (action for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return sub.choices


def _of_verb(verb: str, parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    places = ["--runs-dir=runs", "--cache-dir=cache"] if "--runs-dir" in parser._option_string_actions else []
    words, at = RUN[verb], 0
    for action in parser._actions:
        if action.option_strings and action.nargs is None:
            yield from ([verb, *words, *places, f"{action.option_strings[-1]}={value}"] for value in VALUES)
        elif not action.option_strings:
            yield from ([verb, *words[:at], value, *words[at + 1 :], *places] for value in VALUES)
            at += 1
    if verb == "show":
        yield from (["show", "jsonl:corpus.jsonl?origin=module", *places, f"--field={value}"] for value in VALUES)
    if verb == "run":
        yield from (["run", "quickstart/plain", *places, f"--sweep=model.layers={value}"] for value in VALUES)
        yield from (["run", "--all", *places, f"--budget={value}"] for value in VALUES)


def _of_fields() -> Iterator[list[str]]:
    for name in OF_FIELDS:
        for field in fields(type(registry.find_experiment(name).build("cpu"))):
            yield from ([name, "--runs-dir=runs", "--cache-dir=cache", f"--set={field}={value}"] for value in VALUES)


def fields(cls: type, prefix: str = "") -> Iterator[str]:
    """Every field that --set can name: sub-configs and their fields."""
    for name, hint in field_types(cls).items():
        yield prefix + name
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from fields(part, f"{prefix}{name}.")


@contextlib.contextmanager
def no_work(home: Path) -> Iterator[None]:
    """Work in a folder with a corpus, a file and a run without a checkpoint; a command that would compute exits with 2."""

    for folder in ("folder", "runs/tiny"):
        (home / folder).mkdir(parents=True)
    (home / "file.txt").write_text("a file")
    write_corpus(home / "corpus.jsonl")
    registry.load()
    config = registry.find_experiment("quickstart/plain").build("cpu")
    write_json(home / "runs/tiny/config.json", {"hash": config_hash(config), "config": to_dict(config)})

    def stop(*_: Any, **__: Any) -> Any:
        raise UserError("the work would begin here")

    work = (
        "experiment.run_experiment",
        "training.opened.open_run",
        "data.pipeline.open_corpora",
        "cli.plans.plan",
        "distributed.hosts.connect",
        "tables.sampler.sample",
        "cli.verbs.run._run_jobs",
        "cli.preflight.preflight",
    )
    before = Path.cwd()
    with contextlib.ExitStack() as stack:
        for name in work:
            stack.enter_context(mock.patch(f"metajax.{name}", stop))
        for name in ("planning.topology.allow_compiler", "cli.common.start_jax"):
            stack.enter_context(mock.patch(f"metajax.{name}"))
        stack.callback(os.chdir, before)
        os.chdir(home)
        yield


def problem(words: Sequence[str]) -> str:
    """The problem with the answer to a command, or "". Call it inside `no_work`."""
    out, err, began = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code
        except BaseException:
            return traceback.format_exc()
    said = err.getvalue()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code not in (0, 2) or (code == 2) != (len(errors) == 1) or "Traceback" in said:
        return f"exit code {code}: {said[-1000:]}"
    if shown(out.getvalue() + said) != out.getvalue() + said:
        return "control characters are printed"
    return "" if time.monotonic() - began < SECONDS else f"takes {time.monotonic() - began:.0f} s"


def main(arguments: Sequence[str]) -> int:
    """Try cases and print those that fail; returns 1 if one did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=None, help="so many of them (all)")
    parser.add_argument("--seed", type=int, default=0, help="their order (0)")
    options = parser.parse_args(arguments)
    tried = survived = 0
    with tempfile.TemporaryDirectory() as home, no_work(Path(home)):
        for words in list(cases(options.seed))[: options.cases]:
            wrong = problem(words)
            tried, survived = tried + 1, survived + (not wrong)
            if wrong:
                print(f"NOT SURVIVED: {[word[:80] for word in words]}\n{wrong}", flush=True)
    print(f"bad arguments: {tried} tried, {survived} survived")
    return int(survived < tried)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
