"""The command line: names, verbs, errors in one line, exit codes.

Exit codes: 0 success, 1 a run that broke down (a loss that is not finite), 2 an error the user can mend, 75 ended from outside (preempted, or
hanging for the want of another host): start the same command again; 130 ended by Ctrl-C: the same command goes on.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

from metajax import registry
from metajax.analysis import analysis
from metajax.cli import arguments as checked
from metajax.cli import interop, verbs
from metajax.cli.arguments import Jobs, add_number
from metajax.config import Choice, Evaluation, Guidance, Processes, Tasks, Temperature, TopK, TopP
from metajax.core.errors import Stopped, UserError, nearest, require
from metajax.core.fields import Count, CountOrZero, Range, Seed, field_types, is_text
from metajax.core.interrupts import Interrupted, interruptible, leave
from metajax.core.progress import PROGRAM, echo, fail, terminal
from metajax.core.storage import outages

EXAMPLES = """examples:
  python run.py                                     what there is
  python run.py quickstart                          run a table: every row, then the comparison
  python run.py quickstart --seeds 3 --jobs 2       the same with the spread between seeds, two runs at a time
  python run.py table --all --budget 60m            a sample of every table, to see that all of it works
  python run.py quickstart/metadata --set training.steps=400 --seed 1
  python run.py quickstart/plain --sweep model.layers=2,4,8 --seeds 3
  python run.py show quickstart/meta_tokens         what it is, before running it
  python run.py show pydocs                         a corpus: documents, fields, sizes
  python run.py plan learned_meta_tokens/pretrain/meta_rope --scale paper --topology v5e:8x8
  python run.py generate quickstart/plain --prompt "Return the"
  python run.py analyze RUN --what sharpening       what goes on inside
  python run.py compare RUN RUN                     two runs side by side
"""
GO_ON = "; make room or restore the access, then give the same command again: it goes on from what has been saved"
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


def command() -> NoReturn:
    """The installed command: the experiments that came with it, and those of a folder `experiments` where it is called."""
    here = Path.cwd()
    is_checkout = (here / "metajax" / "registry.py").exists()  # whose experiments are the same, or newer
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
            fail(f"{error.filename or 'storage'}: {error.strerror}{GO_ON * (error.errno in STORAGE)}")
            return 2
        except KeyboardInterrupt:
            echo("interrupted; the same command goes on from what has been saved", stream=sys.stderr)
            return Interrupted.EXIT_CODE


# ------------------------------------------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parse(arguments: list[str]) -> argparse.Namespace:
    names = [*registry.tables(), *registry.experiments()]
    first = arguments[0] if arguments else "list"
    if first in names:
        return build_parser().parse_args(["run", *arguments])
    require(
        first.startswith("-") or first in _verbs(),
        f"unknown command or experiment {first!r}{nearest(first, [*_verbs(), *names])}{registry.left_out(first)}; `{PROGRAM}` shows all",
    )
    return build_parser().parse_args(arguments or [first])


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    top = _Parser(
        prog=PROGRAM, description="metajax: experiments by name", epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    sub = top.add_subparsers(dest="verb", required=True, metavar="NAME | VERB")
    for name, (summary, add, act) in _verbs().items():
        parser = sub.add_parser(
            name, help=summary, description=summary, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
        )
        add(parser)
        parser.set_defaults(act=act)
    for parser in (top, *sub.choices.values()):
        parser.epilog = parser.epilog.replace("python run.py", PROGRAM)
    return top


def _verbs() -> dict[str, tuple[str, Any, Any]]:
    return {
        "run": ("run an experiment or a table (the verb itself can be left out)", _add_run, verbs.run),
        "table": ("the same, for a table", _add_run, verbs.run),
        "list": ("what there is: names, scales, expected minutes", _add_list, verbs.list_all),
        "show": ("an experiment before it runs, or a corpus", _add_show, verbs.show),
        "plan": ("compile an experiment's train step for a TPU slice that is not there", _add_plan, verbs.plan),
        "cache": (
            "tokenise an experiment's corpora once, by several processes; goes on where it stopped",
            _add_cache,
            verbs.cache,
        ),
        "eval": ("evaluate a run's newest checkpoint again", _add_eval, verbs.evaluate),
        "analyze": ("what goes on inside a run's newest checkpoint, as numbers and figures", _add_analyze, verbs.analyze),
        "generate": ("text from a run's newest checkpoint", _add_generate, verbs.generate),
        "import": ("a published checkpoint as a run, for generate and eval", _add_import, verbs.import_model),
        "export": ("a run's newest checkpoint as a Hugging Face folder, for other programs", _add_export, verbs.export_model),
        "runs": ("what has been run", _add_place, verbs.list_runs),
        "checkpoints": ("a run's checkpoints: list, verify, prune", _add_checkpoints, verbs.list_checkpoints),
        "preflight": ("before a run on several hosts: who is there, and what is missing", _add_preflight, verbs.preflight),
        "compare": ("runs side by side", _add_compare, verbs.compare),
    }


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs-dir", type=checked.folder, default=Path("runs"), metavar="DIR", help="root of the run directories (runs)"
    )
    parser.add_argument(
        "--cache-dir", type=checked.folder, default=Path("cache"), metavar="DIR", help="tokenised corpora and compiled programs (cache)"
    )  # fmt: skip
    parser.add_argument(
        "--data-dir", type=checked.data_folder, default=None, metavar="DIR",
        help="where relative data paths start, also gs://... (here)",
    )  # fmt: skip


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", default="cpu", metavar="SCALE", help="cpu, gpu or paper (cpu)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="changes",
        help="set a field, such as model.layers=8; in runs that come first as init.from too, but for evaluation",
    )
    add_number(parser, "--seed", Seed, 0, "seed of the run")


def _add_run_word(parser: argparse.ArgumentParser) -> None:
    text = "workdir (also gs://...), its prefix, or an experiment's name (its newest run)"
    parser.add_argument("run", type=checked.word, metavar="RUN", help=text)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="experiment or table")
    parser.add_argument(
        "--all", action="store_true", help="a sample of all tables instead, a row of each in turn; --seed chooses"
    )
    parser.add_argument("--budget", type=_budget, default=None, metavar="TIME", help="of --all, such as 30m or 2h (60m)")
    _add_config(parser)
    parser.add_argument(
        "--workdir",
        type=checked.workdir,
        default=None,
        metavar="DIR",
        help="run here instead of RUNS/NAME/SCALE/HASH-sSEED, also gs://BUCKET/PATH; for a table the same as --runs-dir",
    )
    add_number(parser, "--seeds", Jobs, 1, "a table or a sweep: seeds from --seed on")
    parser.add_argument(
        "--rows", type=checked.word, default=None, metavar="ROWS", help="a table: `core`, or row names separated by commas"
    )
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="FIELD=VALUES", dest="sweeps",
        help="an experiment: a table over these values, such as model.layers=2,4,8; several make a product, several in one "
        "word ('model.layers=2,4 model.width=64,128') go in step",
    )  # fmt: skip
    add_number(parser, "--jobs", Jobs, 1, "a table: runs at a time, each on its share of the cores")
    _add_processes(parser)
    parser.add_argument("--render", action="store_true", help="a table: write it again from what has been run, and run nothing")
    _add_place(parser)


def _budget(text: str) -> float:
    from metajax.tables.sampler import budget_seconds

    return budget_seconds(text)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--coordinator",
        type=checked.word,
        default=None,
        metavar="HOST:PORT",
        help="of process 0, where several processes make one run and no launcher says so",
    )
    add_number(parser, "--processes", Processes, None, "how many there are", "the launcher's")
    add_number(parser, "--process-id", CountOrZero, None, "which of them this is", "the launcher's", "I")


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="only names that contain this")


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME|CORPUS", help="experiment, table row, or a source such as pydocs or jsonl:FILE")
    add_number(parser, "--rows", CountOrZero, 0, "decode so many training rows, with their masks in colour", dest="count")
    parser.add_argument(
        "--field", type=checked.word, action="append", default=[], metavar="TEMPLATE", dest="fields",
        help="a corpus: look at this beside its columns, such as '{url|host|top100}' or '{section}, {role|or_unknown}'",
    )  # fmt: skip
    _add_config(parser)
    _add_place(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="experiment; with --all: what names contain")
    parser.add_argument("--all", action="store_true", help="all experiments of the scale, one of each distinct program")
    parser.add_argument(
        "--topology",
        type=checked.word,
        metavar="KIND:SIZE",
        help="such as v5e:4x4, v5p:2x2x2, v6e:8x8; with --all several, tried in this order until it fits (slices of v5p)",
    )
    add_number(
        parser, "--vocabulary", Annotated[int, Range(1, 10**7)], None, "tokens, where the tokenizer is a file of yours", "its own"
    )
    parser.add_argument("--json", action="store_true", help="the plan as data")
    parser.add_argument(
        "--html", type=checked.new_file, default=None, metavar="FILE", help="the plan as a page too, with a picture of the memory"
    )
    parser.add_argument(
        "--largest-batch", action="store_true", help="find the most rows that fit, by bisection: a compilation for each trial"
    )
    parser.add_argument(
        "--schedules", action="store_true", help="count the kernels' cycles too: each is compiled once more, alone"
    )
    _add_config(parser)
    _add_place(parser)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="experiment, whose data.sources and data.tokenizer count")
    makers = parser.add_mutually_exclusive_group()
    add_number(makers, "--workers", Jobs, os.cpu_count(), "processes", "one for each core")
    beam_help = "by Apache Beam instead, with the options of its runner, which are all that follows: docs/data.md"
    makers.add_argument("--beam", nargs=argparse.REMAINDER, default=None, metavar="OPTION", help=beam_help)
    parser.add_argument("--measure", action="store_true", help="how fast one core reads it, alone and as rows, and tokenises")
    _add_config(parser)
    _add_place(parser)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    _add_run_word(parser)
    as_there = "as in the run"
    add_number(parser, "--documents", field_types(Evaluation)["documents"], None, "held-out documents", as_there)
    parser.add_argument(
        "--task", default=None, metavar="LIST", help="tasks such as list_recall,parity, or a run without (as in the run)"
    )
    add_number(parser, "--lengths", field_types(Tasks)["eval_lengths"], None, "length bins of the tasks", as_there, "LIST")
    parser.add_argument("--conditions", default=None, metavar="LIST", help="none, right, empty, shuffled (as in the run)")
    parser.add_argument(
        "--choice",
        default=None,
        metavar="LIST",
        help="multiple choice, KIND:FILE such as arc_easy:arc_easy/test.jsonl (as in the run)",
    )
    add_number(parser, "--shots", field_types(Choice)["shots"], None, "solved examples before each question", as_there, "LIST")
    parser.add_argument(
        "--contexts",
        default=None,
        metavar="LIST",
        help="what stands in front of the questions: none, empty, task (a fitting source)",
    )
    _add_place(parser)


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    _add_run_word(parser)
    known = ",".join(analysis.names())
    parser.add_argument("--what", type=checked.word, default=None, metavar="LIST", help=f"some of {known} (all that fit the run)")
    parser.add_argument(
        "--task", type=checked.word, default=None, metavar="TASK", help="whose prompts are read (list_recall, or the run's first task)"
    )  # fmt: skip
    longest = "the run's longest bin within training"
    add_number(parser, "--length", Annotated[int, Range(2, 2**20)], None, "positions of a prompt's row", longest)
    text = "prompts, and examples in a bin of the interventions"
    add_number(parser, "--examples", Annotated[int, Range(2, 10**6)], None, text, "500, and as in the run")
    _add_place(parser)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_run_word(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to go on from")
    parser.add_argument("--context", default=None, metavar="TEXT", help="metadata put between the context delimiters in front")
    marker_help = (
        "read control tokens that the prompt or the context spells, such as a chat's turn markers, as those tokens (as text)"
    )
    parser.add_argument("--markers", action="store_true", help=marker_help)
    text = "with --context: 0 draws as without the context, 1 as with it, more than 1 goes further"
    add_number(parser, "--guidance", Guidance, None, text, "none", "G")
    add_number(parser, "--tokens", Annotated[int, Range(1, 2**20)], 64, "length of the continuation")
    add_number(parser, "--temperature", Temperature, 0.8, "0 takes the most likely token", metavar="T")
    add_number(parser, "--top-k", TopK, 0, "draw from so many most likely tokens; 0: from all")
    add_number(parser, "--top-p", TopP, 1.0, "draw from the fewest tokens that have this probability together", metavar="P")
    decode_help = "newest keys that a drawn token sees in a window: W+1 as in training, W as in Hymba's released code (W+1)"
    parser.add_argument("--decode-window", choices=["W+1", "W"], default="W+1", help=decode_help)
    add_number(parser, "--seed", Seed, 0, "of the sampling")
    _add_place(parser)


def _add_import(parser: argparse.ArgumentParser) -> None:
    _add_place(interop.add_import(parser))


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_place(interop.add_export(parser))


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    _add_run_word(parser)
    parser.add_argument(
        "--verify", action="store_true", help="read every file and hold it against its hash; 1 when one is damaged"
    )
    text = "delete all but so many of the newest, those set aside as damaged too"
    add_number(parser, "--prune", Count, None, text, "delete none")
    _add_place(parser)


def _add_preflight(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", default=None, metavar="NAME", help="the experiment, whose configuration and data are compared"
    )
    parser.add_argument(
        "--workdir", type=checked.workdir, default=None, metavar="DIR", help="where it will run: written and read back (--runs-dir)"
    )  # fmt: skip
    add_number(parser, "--seconds", Annotated[float, Range(0.1, 86_400)], 10.0, "for each check", metavar="S")
    _add_config(parser)
    _add_processes(parser)
    _add_place(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=checked.word, metavar="RUN", help="two or more runs")
    _add_place(parser)
