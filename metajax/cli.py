"""The command line: names, verbs, errors in one line, exit codes.

Exit codes: 0 success, 1 a run that broke down (a loss that is not finite), 2 an error the user can mend, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from etils import epath

from metajax import registry
from metajax.config import ANALYSES, Config, UserError, check_analyses, nearest, override, require
from metajax.interop import command as interop
from metajax.progress import say

EXAMPLES = """examples:
  python run.py                                     what there is
  python run.py quickstart                          run a table: every row, then the comparison
  python run.py quickstart --seeds 3                the same with the spread between seeds
  python run.py quickstart/metadata --set training.steps=400 --seed 1
  python run.py quickstart/plain --sweep model.layers=2,4,8 --seeds 3
  python run.py show quickstart/meta_tokens         what it is, before running it
  python run.py show pydocs                         a corpus: documents, fields, sizes
  python run.py generate quickstart/plain --prompt "Return the"
  python run.py analyze RUN --what sharpening       what its meta-tokens do
  python run.py compare RUN RUN                     two runs side by side
"""


def main(arguments: Sequence[str], started: float | None = None) -> int:
    """Run one command and return its exit code."""
    started = time.monotonic() if started is None else started
    try:
        registry.load()
        options = _parse(list(arguments))
        return options.act(options, started) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command takes up from the last checkpoint", file=sys.stderr)
        return 130


# ------------------------------------------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see `python {self.prog} --help`")


def _parse(arguments: list[str]) -> argparse.Namespace:
    verbs, names = _verbs(), [*registry.tables(), *registry.experiments()]
    first = arguments[0] if arguments else "list"
    if first in names:
        arguments = ["run", *arguments]
    elif not first.startswith("-"):
        require(
            first in verbs,
            f"unknown command or experiment {first!r}{nearest(first, [*verbs, *names])}; `python run.py` shows all",
        )
        arguments = arguments or [first]
    top = _Parser(
        prog="run.py", description="metajax: experiments by name", epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    sub = top.add_subparsers(dest="verb", required=True, metavar="NAME | VERB")
    for name, (summary, add, act) in verbs.items():
        parser = sub.add_parser(
            name, help=summary, description=summary, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
        )
        add(parser)
        parser.set_defaults(act=act)
    return top.parse_args(arguments)


def _verbs() -> dict[str, tuple[str, Any, Any]]:
    return {
        "run": ("run an experiment or a table (the verb itself can be left out)", _add_run, _run),
        "table": ("the same, for a table", _add_run, _run),
        "list": ("what there is: names, scales, expected minutes", _add_list, _list),
        "show": ("an experiment before it runs, or a corpus", _add_show, _show),
        "eval": ("evaluate a run's newest checkpoint again", _add_eval, _eval),
        "analyze": ("what goes on inside a run's newest checkpoint, as numbers and figures", _add_analyze, _analyze),
        "generate": ("text from a run's newest checkpoint", _add_generate, _generate),
        "import": ("a published checkpoint as a run, for generate and eval", _add_import, _import),
        "export": ("a run's newest checkpoint as a Hugging Face folder, for other programs", _add_export, _export),
        "runs": ("what has been run", _add_place, _runs),
        "compare": ("runs side by side", _add_compare, _compare),
    }


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs-dir", type=_local_folder, default=Path("runs"), metavar="DIR", help="root of the run directories (runs)"
    )
    parser.add_argument(
        "--cache-dir", type=_local_folder, default=Path("cache"), metavar="DIR",
        help="tokenised corpora and compiled programs (cache)",
    )  # fmt: skip
    parser.add_argument(
        "--data-dir", type=epath.Path, default=None, metavar="DIR", help="where relative data paths start, also gs://... (here)"
    )


def _local_folder(text: str) -> Path:
    require("://" not in text, f"{text}: runs and caches live in a local folder; only --data-dir can be a bucket")
    return Path(text)


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
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (0)")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="experiment or table")
    _add_config(parser)
    parser.add_argument(
        "--workdir",
        type=_local_folder,
        default=None,
        metavar="DIR",
        help="run here instead of RUNS/NAME/SCALE/HASH-sSEED; for a table the same as --runs-dir",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="a table or a sweep: this many seeds, from --seed on (1)"
    )
    parser.add_argument("--rows", default=None, metavar="ROWS", help="a table: `core`, or row names separated by commas")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="FIELD=VALUES", dest="sweeps",
        help="an experiment: a table over these values, such as model.layers=2,4,8; several make a product",
    )  # fmt: skip
    parser.add_argument("--render", action="store_true", help="a table: write it again from what has been run, and run nothing")
    _add_place(parser)


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="only names that contain this")


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME|CORPUS", help="experiment, table row, or a source such as pydocs or jsonl:FILE")
    parser.add_argument(
        "--rows", type=int, default=0, metavar="N", dest="count", help="decode N training rows, with their masks in colour"
    )
    parser.add_argument(
        "--field", action="append", default=[], metavar="TEMPLATE", dest="fields",
        help="a corpus: look at this beside its columns, such as '{url|host|top100}' or '{section}, {role|or_unknown}'",
    )  # fmt: skip
    _add_config(parser)
    _add_place(parser)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="workdir, its prefix, or an experiment's name (its newest run)")
    parser.add_argument("--documents", type=int, default=None, metavar="N", help="held-out documents (as in the run)")
    parser.add_argument(
        "--task", default=None, metavar="LIST", help="tasks such as list_recall,parity, or a run without (as in the run)"
    )
    parser.add_argument(
        "--lengths", default=None, metavar="LIST", help="length bins of the tasks, such as 64,128 (as in the run)"
    )
    parser.add_argument("--conditions", default=None, metavar="LIST", help="none, right, empty, shuffled (as in the run)")
    _add_place(parser)


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="workdir, its prefix, or an experiment's name (its newest run)")
    parser.add_argument("--what", default=None, metavar="LIST", help=f"some of {','.join(ANALYSES)} (all that fit the run)")
    parser.add_argument(
        "--task", default=None, metavar="TASK", help="whose prompts are read (list_recall, or the run's first task)"
    )
    parser.add_argument(
        "--length", type=int, default=None, metavar="N", help="slots of a prompt's row (the run's longest bin within training)"
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=None,
        metavar="N",
        help="prompts (500), and examples in a bin of the interventions (as in the run)",
    )
    _add_place(parser)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="workdir, its prefix, or an experiment's name (its newest run)")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to go on from")
    parser.add_argument("--context", default=None, metavar="TEXT", help="metadata put between the context delimiters in front")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="length of the continuation (64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (0.8)")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="draw from the N most likely tokens; 0: from all (0)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens that have probability P together (1)"
    )
    decode_help = "newest keys that a drawn token sees in a window: W+1 as in training, W as in Hymba's released code (W+1)"
    parser.add_argument("--decode-window", choices=["W+1", "W"], default="W+1", help=decode_help)
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    _add_place(parser)


def _add_import(parser: argparse.ArgumentParser) -> None:
    _add_place(interop.add_import(parser))


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_place(interop.add_export(parser))


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="two or more runs")
    _add_place(parser)


# ----------------------------------------------------------------------------------------------------- verbs


def _parse_changes(pairs: Sequence[str], runs: Path) -> dict[str, str]:
    """{field: text} of --set; a parent named in init.from becomes the run it stands for, said aloud."""
    for pair in pairs:
        require("=" in pair, f"--set {pair}: expected FIELD=VALUE, such as --set model.layers=8")
    changes = dict(pair.split("=", 1) for pair in pairs)
    for field, instead in (("seed", "--seed N"), ("scale", "--scale SCALE"), ("name", "another entry in experiments/")):
        require(field not in changes, f"--set {field}=...: use {instead}")
    if changes.get("init.from"):
        from metajax.lineage import find_parent

        changes["init.from"] = find_parent(changes["init.from"], runs)
    return changes


def _paths(options: argparse.Namespace) -> Any:
    from metajax.data.pipeline import Paths

    return Paths(cache=options.cache_dir, data=options.data_dir, runs=options.runs_dir)


def _config(experiment: registry.Experiment, options: argparse.Namespace) -> tuple[Config, tuple[Config, ...]]:
    """The experiment as this command asks for it, and the runs that it starts from, the oldest first."""
    from metajax.lineage import resolve_parents

    changes = _parse_changes(options.changes, options.runs_dir)
    config = override(experiment.build(options.scale), {**changes, "seed": options.seed})
    return resolve_parents(config, changes, options.runs_dir)


def _start_jax(options: argparse.Namespace) -> None:
    """Compiled programs are kept between runs; set before the first use of a device."""
    import jax

    # The TPU compiler may be installed for planning alone: without a chip, looking for one costs seconds and many warnings.
    chips = [path for pattern in ("accel*", "vfio/[0-9]*", "nvidia[0-9]*") for path in Path("/dev").glob(pattern)]
    if not chips and find_spec("libtpu") and "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str((options.cache_dir / "jax").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _run(options: argparse.Namespace, started: float) -> int:
    target = registry.find(options.name)
    require(options.seeds >= 1, f"--seeds {options.seeds}: at least 1")
    startup = iter([{"started": started, "imports_seconds": 0.0}])  # the command's first run pays for starting

    def run_one(config: Config, workdir: Path, analyses: Sequence[str] = ()) -> dict[str, Any]:
        from metajax.experiment import run_experiment

        first = next(startup, {})
        if first:
            first["imports_seconds"] = time.monotonic() - started
        return run_experiment(config, workdir, _paths(options), analyses=analyses, **first)

    if isinstance(target, registry.Table) or options.sweeps:
        return _run_table(target, options, run_one)
    return _run_single(target, options, run_one)


def _run_single(experiment: registry.Experiment, options: argparse.Namespace, run_one: Any) -> int:
    """Run one experiment, and before it the runs that it starts from."""
    require(
        options.seeds == 1 and options.rows is None and not options.render,
        f"{experiment.name} is one experiment; --seeds, --rows and --render are for tables and sweeps",
    )
    config, parents = _config(experiment, options)
    say(f"{options.name} at scale {options.scale}")
    _start_jax(options)
    from metajax.reporting.records import default_workdir
    from metajax.training.loop import NonFinite

    try:
        for parent in parents:
            say(f"{experiment.name} starts from {parent.name} (seed {parent.seed}), which comes first")
            run_one(parent, default_workdir(parent, options.runs_dir))
        workdir = options.workdir or default_workdir(config, options.runs_dir)
        _print_evaluation(run_one(config, workdir)["eval"])
        say(f"report: {workdir / 'report.html'}")
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run_table(target: registry.Table | registry.Experiment, options: argparse.Namespace, run_one: Any) -> int:
    """Run a table or a sweep, or render it from what there is; 1 when a run of it failed."""
    from metajax.reporting.formats import failures, markdown
    from metajax.reporting.tables import choose_rows, has_runs, plan_table, run_table
    from metajax.sweeps import sweep_table

    options.runs_dir = options.workdir or options.runs_dir
    changes = _parse_changes(options.changes, options.runs_dir)
    if isinstance(target, registry.Experiment):
        table = sweep_table(target, options.sweeps, options.scale, changes)
    else:
        require(
            not options.sweeps,
            f"{target.name} is a table; --sweep is for one experiment, such as {target.example}",
        )
        table = target
    rows, seeds = choose_rows(table, options.rows), range(options.seed, options.seed + options.seeds)
    plan = plan_table(table, options.scale, seeds, changes, options.runs_dir, rows)
    say(f"{options.name} at scale {options.scale}")
    if options.render:
        result = plan.result()
        require(has_runs(result), f"nothing of {table.name} has been run under {options.runs_dir}; leave --render out to run it")
        plan.write()
    else:
        _start_jax(options)
        result = run_table(plan, run_one)
    print(markdown(result))
    say(f"report: {plan.folder / 'report.html'}")
    return 1 if failures(result) else 0


def _print_evaluation(results: dict[str, dict[str, Any]]) -> None:
    from metajax.reporting.records import conditions
    from metajax.reporting.terminal import print_tasks

    if "tasks" in results:
        print_tasks(results["tasks"])
    for condition, values in conditions(results).items():
        size = f"({values['documents']} documents, {values['body_bytes']:,} bytes)"
        shown = "no" if condition == "none" else condition
        print(f"held-out bits/byte, {shown} metadata: {values['bpb']:.4f}  {size}")


def _list(options: argparse.Namespace, started: float) -> int:
    from metajax.reporting.terminal import print_list

    print_list(options.pattern)
    return 0


def _show(options: argparse.Namespace, started: float) -> int:
    from metajax.data.sources import KINDS
    from metajax.reporting import terminal

    if options.name.partition(":")[0].partition("?")[0] in KINDS:
        terminal.print_corpus(options.name, _paths(options), options.count, options.fields)
        return 0
    try:
        target = registry.find(options.name)
    except UserError as error:
        raise UserError(f"{error}; corpora: {', '.join(KINDS)}{nearest(options.name, KINDS)}") from None
    if isinstance(target, registry.Table):
        require(
            not options.count,
            f"{target.name} is a table; --rows shows rows of one experiment, such as {target.example}",
        )
        from metajax.reporting.tables import plan_table

        registry.find_experiment(target.example).build(
            options.scale
        )  # an unknown scale stops here, before a parent is looked for
        changes = _parse_changes(options.changes, options.runs_dir)
        terminal.print_table_plan(plan_table(target, options.scale, [options.seed], changes, options.runs_dir, target.rows))
        return 0
    config, _ = _config(target, options)
    terminal.print_experiment(target, config)
    if config.tasks is not None:
        terminal.print_curriculum(config, _paths(options))
    if options.count:
        terminal.print_rows(config, _paths(options), options.count)
    return 0


def _open_run(options: argparse.Namespace, word: str) -> Any:
    """A run's newest checkpoint."""
    _start_jax(options)
    from metajax.experiment import open_run
    from metajax.reporting.records import find_run

    workdir = find_run(word, options.runs_dir)
    say(f"run: {workdir}")
    return open_run(workdir)


def _eval(options: argparse.Namespace, started: float) -> int:
    opened = _open_run(options, options.run)
    changes: dict[str, Any] = {}
    if options.documents is not None:
        changes["evaluation.documents"] = options.documents
    if options.conditions is not None:
        changes["evaluation.conditions"] = options.conditions
    if options.task is not None:
        changes["tasks.names"] = options.task
    if options.lengths is not None:
        changes["tasks.eval_lengths"] = options.lengths
    if changes.keys() & {"tasks.names", "tasks.eval_lengths"} and opened.config.tasks is None:
        changes["tasks.train_length"] = opened.config.data.row_length  # what it was trained on is text
    _print_evaluation(opened.evaluate(override(opened.config, changes), _paths(options)))
    return 0


def _analyze(options: argparse.Namespace, started: float) -> int:
    names = tuple(options.what.split(",")) if options.what else ()
    check_analyses("--what", names)
    opened = _open_run(options, options.run)
    from metajax.analysis.analyses import fitting, run_analyses
    from metajax.reporting.html import write_analysis_page
    from metajax.reporting.terminal import print_analysis

    config, changes, choice = opened.config, {}, {"task": options.task, "length": options.length}
    task = options.task or ("list_recall" if config.tasks is None and config.meta_tokens is not None else None)
    if task not in (None, "text"):
        changes["tasks.names"] = choice["task"] = task
        if config.tasks is None:
            changes["tasks.train_length"] = config.data.row_length  # what it was trained on is text
    if options.examples is not None:
        choice["prompts"] = options.examples
        changes |= {"tasks.eval_examples": options.examples} if config.tasks is not None or changes else {}
    study = opened.study(override(config, changes), _paths(options), **choice)
    say(f"{study.count} prompts of {study.task}, at most {study.rows['tokens'].shape[1]} tokens each")
    for name, numbers in run_analyses(study, names or fitting(study), opened.workdir):
        print_analysis(name, numbers)
    say(f"figures: {write_analysis_page(opened.workdir)}")
    return 0


def _generate(options: argparse.Namespace, started: float) -> int:
    from metajax.inference.decoding import Sampling
    from metajax.inference.forward import prepare
    from metajax.inference.generation import stream

    opened = _open_run(options, options.run)
    pieces = stream(
        prepare(opened.model, options.decode_window), opened.config, opened.tokenizer, [options.prompt], count=options.tokens, context=options.context,
        sampling=Sampling(options.temperature, options.top_k, options.top_p), seed=options.seed,
        stride=1 if sys.stdout.isatty() else opened.config.row_slots,
    )  # fmt: skip
    print(options.prompt, end="")
    for (piece,) in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _import(options: argparse.Namespace, started: float) -> int:
    _start_jax(options)
    interop.run_import(options)
    return 0


def _export(options: argparse.Namespace, started: float) -> int:
    interop.run_export(options, _open_run(options, options.run))
    return 0


def _runs(options: argparse.Namespace, started: float) -> int:
    from metajax.reporting.terminal import print_runs

    print_runs(options.runs_dir)
    return 0


def _compare(options: argparse.Namespace, started: float) -> int:
    from metajax.reporting.records import find_run
    from metajax.reporting.terminal import print_comparison

    require(len(options.runs) >= 2, "compare needs at least two runs")
    print_comparison([find_run(word, options.runs_dir) for word in options.runs])
    return 0
