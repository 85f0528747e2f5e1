"""`run` and `table`: run an experiment, a table, a sweep, or a sample of all tables."""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from metajax import registry
from metajax.cli import arguments as checked
from metajax.cli import common
from metajax.cli.arguments import Jobs, add_config, add_number, add_place, add_processes
from metajax.cli.verb import verb
from metajax.config import AnyConfig, Config
from metajax.core.errors import UserError, require
from metajax.core.fields import Seed, convert
from metajax.core.progress import echo, fail, say, terminal
from metajax.core.storage import stage


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="experiment or table")
    sample_help = "a sample of all tables instead, a row of each in turn; --seed chooses"
    parser.add_argument("--all", action="store_true", help=sample_help)
    parser.add_argument("--budget", type=_budget, metavar="TIME", help="of --all, such as 30m or 2h (60m)")
    add_config(parser)
    place = "run here instead of RUNS/NAME/SCALE/HASH-sSEED, also gs://BUCKET/PATH; for a table the same as --runs-dir"
    parser.add_argument("--workdir", type=checked.workdir, metavar="DIR", help=place)
    add_number(parser, "--seeds", Jobs, 1, "a table or a sweep: number of seeds, starting with --seed")
    rows = "a table: `core`, or row names separated by commas"
    parser.add_argument("--rows", type=checked.word, metavar="ROWS", help=rows)
    sweep = "an experiment: a table over these values, such as model.layers=2,4,8; several make a product, several in one word"
    sweep += " ('model.layers=2,4 model.width=64,128') change together"
    parser.add_argument("--sweep", action="append", default=[], metavar="FIELD=VALUES", dest="sweeps", help=sweep)
    add_number(parser, "--jobs", Jobs, 1, "a table: runs at a time, each on its share of the cores")
    add_processes(parser)
    parser.add_argument("--render", action="store_true", help="a table: write it from existing runs, and run nothing")
    add_place(parser)


def _budget(text: str) -> float:
    from metajax.tables.sampler import budget_seconds

    return budget_seconds(text)


@verb("table", add_run)
@verb("run", add_run)
def run(options: argparse.Namespace, started: float) -> int:
    """Run an experiment or a table; the word `run` can be left out.

    python run.py table quickstart --seeds 3 --jobs 2        three seeds of every row, two runs at a time
    python run.py table --all --budget 60m                   a sample of every table, to see that all of it works
    python run.py quickstart                                 run a table: every row, then the comparison
    python run.py quickstart/metadata --set training.steps=400 --seed 1
        run one experiment with changes
    python run.py quickstart/plain --sweep model.layers=2,4,8 --seeds 3
        run a sweep as a table
    """
    require(options.all == (options.name is None), "name an experiment or a table, or give --all")
    require(options.all or options.budget is None, "--budget is for --all")
    target = None if options.all else registry.find(options.name)
    single = isinstance(target, registry.Experiment) and not options.sweeps
    require(single or not isinstance(options.workdir, str), f"{options.workdir}: a bucket is for one experiment; name a folder")
    last = options.seed + options.seeds - 1
    convert(last, Seed, f"--seed {options.seed} --seeds {options.seeds}: the last seed")
    runs_before = itertools.count()  # the first run of the command counts the time of its start

    def run_one(config: AnyConfig, workdir: Path, analyses: Sequence[str] = ()) -> dict[str, Any]:
        from metajax.experiment import run_experiment

        startup = {"started": started, "imports_seconds": time.monotonic() - started} if next(runs_before) == 0 else {}
        return run_experiment(config, workdir, common.paths_of(options), analyses=analyses, **startup)

    if target is None:
        return _run_sample(options, run_one)
    return (_run_single if single else _run_table)(target, options, run_one)


def _run_single(experiment: registry.Experiment, options: argparse.Namespace, run_one: Any) -> int:
    """Run one experiment, and before it the runs that it starts from."""
    alone = options.seeds == 1 and options.rows is None and not options.render and options.jobs == 1
    require(alone, f"{experiment.name} is one experiment; --seeds, --rows, --jobs and --render are for tables and sweeps")
    config, parents = common.config_of(experiment, options)
    say(f"{options.name} at scale {options.scale}")
    common.connect(options)
    from metajax.distributed.hosts import is_first
    from metajax.reporting.terminal import print_evaluation
    from metajax.runs.directory import default_workdir
    from metajax.training.trainer import NonFinite

    try:
        for parent in parents:
            say(f"{experiment.name} starts from {parent.name} (seed {parent.seed}), which runs first")
            run_one(parent, default_workdir(parent, options.runs_dir))
        workdir = options.workdir or default_workdir(config, options.runs_dir)
        if isinstance(workdir, str):
            say(f"{workdir}: logs and reports are staged in {(workdir := stage(workdir, options.runs_dir))}")
        report = run_one(config, workdir)
        if is_first():
            print_evaluation(report["eval"])
        say(f"report: {workdir / 'report.html'}")
    except NonFinite as error:
        fail(error)
        return 1
    return 0


def _run_table(target: registry.Table | registry.Experiment, options: argparse.Namespace, run_one: Any) -> int:
    """Run a table or a sweep, or render it from existing runs; returns 1 if a run failed."""
    from metajax.runs.parents import parse_changes
    from metajax.tables.choice import choose_rows
    from metajax.tables.formats import failures, markdown
    from metajax.tables.run import has_runs, plan_table
    from metajax.tables.sweeps import sweep_table

    options.runs_dir = options.workdir or options.runs_dir
    changes = parse_changes(options.changes, options.runs_dir)
    if isinstance(target, registry.Experiment):
        table = sweep_table(target, options.sweeps, options.scale, changes)
    else:
        require(not options.sweeps, f"{target.name} is a table; --sweep is for one experiment, such as {target.example}")
        table = target
    rows, seeds = choose_rows(table, options.rows), range(options.seed, options.seed + options.seeds)
    plan = plan_table(table, options.scale, seeds, changes, options.runs_dir, rows)
    say(f"{options.name} at scale {options.scale}")
    if options.render:
        result = plan.result()
        require(has_runs(result), f"no row of {table.name} has been run under {options.runs_dir}; leave out --render to run it")
        plan.write()
    else:
        from metajax.distributed.hosts import find_place
        from metajax.runs.loggers import check_loggers

        alone = find_place(options.coordinator, options.processes, options.process_id) is None
        require(alone, f"{options.name} is a table and runs in one process; run one experiment, such as a row of it, in several")
        check_loggers({logger for one in plan.runs() for logger in one.config.runtime.loggers})
        result = _run_jobs(plan, options, run_one)
    echo(markdown(result))
    say(f"report: {plan.folder / 'report.html'}")
    return 1 if failures(result) else 0


def _run_sample(options: argparse.Namespace, run_one: Any) -> int:
    """Run a sample of all tables; returns 1 if a run failed."""
    given = {"--set": options.changes, "--rows": options.rows, "--sweep": options.sweeps, "--render": options.render}
    given |= {"--seeds": options.seeds > 1, "--jobs": options.jobs > 1}
    for flag, value in given.items():
        remedy = "which runs rows of all tables unchanged; name a table, or leave it out"
        require(not value, f"{flag} does not go with --all, {remedy}")
    from metajax.reporting.terminal import print_sample
    from metajax.tables.sampler import sample, summary

    common.start_jax(options.cache_dir)
    root = options.workdir or options.runs_dir
    tables = registry.tables().values()
    made = sample(tables, options.scale, options.budget or 3600.0, options.seed, root, run_one)
    print_sample(summary(made), [table.name for table in tables if table.runs_at(options.scale)])
    return 1 if any(one.reason for one in made) else 0


def _run_jobs(plan: Any, options: argparse.Namespace, run_one: Any) -> dict[str, Any]:
    """Run the rows of a table one by one here, or several at a time in processes that write to the log of each run."""
    from metajax.core.workers import workers
    from metajax.distributed.hosts import has_tpu
    from metajax.runs.directory import RUN_LOG
    from metajax.tables.run import run_table

    start = functools.partial(common.start_jax, options.cache_dir)
    if options.jobs == 1:
        start()
        return run_table(plan, run_one)
    free = not has_tpu() or os.environ.get("JAX_PLATFORMS") == "cpu"
    require(free, f"--jobs {options.jobs}: a TPU serves one process; leave it out, or use the cores with JAX_PLATFORMS=cpu")
    say(f"{options.jobs} runs at a time; each writes its messages to {RUN_LOG} in its folder")
    try:
        with workers(options.jobs, start) as executor:
            return run_table(plan, functools.partial(_run_and_log, common.paths_of(options)), executor, options.jobs)
    except BrokenProcessPool:
        raise UserError("the process of a run was killed, perhaps for lack of memory; continue with fewer --jobs") from None


def _run_and_log(paths: Any, config: Config, workdir: Path, analyses: Sequence[str]) -> dict[str, Any]:
    """Run in a separate process; messages go to the run's folder."""
    from metajax.experiment import run_experiment
    from metajax.runs.directory import RUN_LOG

    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / RUN_LOG, "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        with terminal():
            return run_experiment(config, workdir, paths, analyses=analyses)
