"""The command line: names, verbs, errors in one line, exit codes.

Exit codes: 0 success, 1 a run that broke down (a loss that is not finite), 2 an error the user can fix, 75 ended from outside
(preempted, or waiting for a missing host; start the same command again), 130 ended by Ctrl-C (the same command continues).
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import inspect
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from metajax import registry
from metajax.cli.verb import verbs
from metajax.core.errors import Stopped, UserError, nearest, require
from metajax.core.fields import is_text
from metajax.core.interrupts import Interrupted, interruptible, leave
from metajax.core.progress import PROGRAM, echo, fail, terminal
from metajax.core.storage import outages

EXAMPLES = """examples:
  python run.py                                     tables and experiments
  python run.py quickstart                          run a table: every row, then the comparison
  python run.py quickstart --seeds 3 --jobs 2       with the spread between seeds, two runs at a time
  python run.py table --all --budget 60m            a sample of every table, to see that all of it works
  python run.py quickstart/metadata --set training.steps=400 --seed 1
  python run.py quickstart/plain --sweep model.layers=2,4,8 --seeds 3
  python run.py show quickstart/meta_tokens         an experiment before it runs
  python run.py show pydocs                         a corpus: documents, fields, sizes
  python run.py plan learned_meta_tokens/pretrain/meta_rope --scale paper --topology v5e:8x8
  python run.py generate quickstart/plain --prompt "Return the"
  python run.py analyze RUN --what sharpening       the papers' analyses
  python run.py compare RUN RUN                     two runs side by side
"""
REMEDY = "; make room or restore the access, then give the same command again: it continues from what has been saved"
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


def command() -> NoReturn:
    """The installed command, with its own experiments and those of a folder `experiments` in the current folder."""
    here = Path.cwd()
    is_checkout = (here / "metajax" / "registry.py").exists()  # a checkout has the same experiments, or newer ones
    packages = ["metajax_experiments"] if importlib.util.find_spec("metajax_experiments") and not is_checkout else []
    if (here / "experiments").is_dir():
        sys.path.insert(0, str(here))
        packages.append("experiments")
    leave(main(sys.argv[1:], packages=packages))


def main(arguments: Sequence[str], started: float | None = None, packages: Sequence[str] = ("experiments",)) -> int:
    """Run one command with the experiments of some packages and return its exit code."""
    started = time.monotonic() if started is None else started
    with terminal():
        try:
            for at, text in enumerate(arguments, 1):
                require(is_text(text), f"argument {at}, {text!r}: expected text in UTF-8 without NUL")
            with interruptible(), outages():
                registry.load(*packages)
                options = _parse(list(arguments))
                return options.act(options, started) or 0
        except Stopped as reason:
            echo(str(reason), stream=sys.stderr)
            return reason.EXIT_CODE
        except UserError as error:
            fail(error)
            return 2
        except OSError as error:
            if error.filename is None and error.errno not in STORAGE:
                raise
            fail(f"{error.filename or 'storage'}: {error.strerror}{REMEDY * (error.errno in STORAGE)}")
            return 2
        except KeyboardInterrupt:
            echo("interrupted; the same command continues from what has been saved", stream=sys.stderr)
            return Interrupted.EXIT_CODE


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parse(arguments: list[str]) -> argparse.Namespace:
    names = [*registry.tables(), *registry.experiments()]
    first = arguments[0] if arguments else "list"
    if first in names:
        return build_parser().parse_args(["run", *arguments])
    known = verbs()
    close = nearest(first, [*known, *names])
    is_known = first.startswith("-") or first in known
    require(is_known, f"unknown command or experiment {first!r}{close}{registry.left_out(first)}; `{PROGRAM}` shows all")
    return build_parser().parse_args(arguments or [first])


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    top = _Parser(prog=PROGRAM, description="metajax: experiments by name", epilog=EXAMPLES)
    sub = top.add_subparsers(dest="verb", required=True, metavar="NAME | VERB")
    for name, (act, adds) in verbs().items():
        summary, _, examples = inspect.getdoc(act).partition("\n\n")
        summary, examples = summary[0].lower() + summary[1:].rstrip("."), "examples:\n" + textwrap.indent(examples, "  ")
        parser = sub.add_parser(name, help=summary, description=summary, epilog=examples)
        for add in adds:
            add(parser)
        parser.set_defaults(act=act)
    for parser in (top, *sub.choices.values()):
        parser.epilog = parser.epilog.replace("python run.py", PROGRAM)
        parser.formatter_class = argparse.RawTextHelpFormatter
    return top
