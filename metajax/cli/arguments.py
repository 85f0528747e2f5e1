"""Command-line arguments that are checked when parsed: numbers within a range, folders, files, buckets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Any

from metajax.config import Processes
from metajax.core.errors import require
from metajax.core.fields import CountOrZero, Range, Seed, convert, describe
from metajax.core.storage import SCHEME, storage

Jobs = Annotated[int, Range(1, 1024)]
RUN = "workdir (also gs://...), its prefix, or an experiment's name (its newest run)"


def add_number(
    parser: Any, name: str, hint: Any, default: Any, text: str, shown: str = "", metavar: str = "N", dest: str | None = None
) -> None:
    """Add an option with one number, or a list of numbers, within the range of `hint`; the help states range and default.

    shown: the text for a default that is not a number.
    """

    def read(word: str) -> Any:
        require(bool(word.strip()), f"{name} is empty: expected {describe(hint)}")
        return convert(word, hint, name)

    text = f"{text}: {describe(hint)} ({shown or default})"
    parser.add_argument(name, type=read, default=default, metavar=metavar, help=text, dest=dest)


def word(text: str) -> str:
    """Text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def folder(text: str) -> Path:
    """A local folder that exists or can be made."""
    word(text)
    require("://" not in text, f"{text}: runs and caches live in a local folder; only --data-dir and --workdir can be a bucket")
    there = next(path for path in (Path(text).absolute(), *Path(text).absolute().parents) if path.exists())
    require(there.is_dir(), f"{text} cannot be a run directory or cache: {there} is a file; name a folder")
    return Path(text)


def data_folder(text: str) -> Any:
    """An existing local folder, or gs://BUCKET/PATH."""
    from etils import epath

    word(text)
    require("://" not in text or text.startswith(SCHEME), f"--data-dir {text}: expected a folder or gs://BUCKET/PATH")
    if text.startswith(SCHEME):
        storage(text)
    else:
        require(Path(text).is_dir(), f"--data-dir {text}: no such folder")
    return epath.Path(text)


def workdir(text: str) -> str | Path:
    """A local folder, or gs://BUCKET/PATH unchanged, whose staging folder is below --runs-dir."""
    return text if text.startswith(SCHEME) else folder(text)


def new_file(text: str) -> Path:
    """A path at which a file can be written."""
    path = Path(word(text))
    require(path.parent.is_dir() and not path.is_dir(), f"{text}: expected a file in an existing folder")
    return path


def add_place(parser: argparse.ArgumentParser) -> None:
    runs, cache = "root of the run directories (runs)", "tokenised corpora and compiled programs (cache)"
    parser.add_argument("--runs-dir", type=folder, default=Path("runs"), metavar="DIR", help=runs)
    parser.add_argument("--cache-dir", type=folder, default=Path("cache"), metavar="DIR", help=cache)
    data = "where relative data paths start, also gs://... (here)"
    parser.add_argument("--data-dir", type=data_folder, metavar="DIR", help=data)


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", default="cpu", metavar="SCALE", help="cpu, gpu or paper (cpu)")
    text = "set a field, such as model.layers=8; runs named in init.from get it too, except evaluation.*"
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes", help=text)
    add_number(parser, "--seed", Seed, 0, "seed of the run")


def add_run_word(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=word, metavar="RUN", help=RUN)


def add_processes(parser: argparse.ArgumentParser) -> None:
    text = "address of process 0, if several processes make one run without a launcher"
    parser.add_argument("--coordinator", type=word, metavar="HOST:PORT", help=text)
    add_number(parser, "--processes", Processes, None, "number of processes", "the launcher's")
    add_number(parser, "--process-id", CountOrZero, None, "number of this process", "the launcher's", "I")
