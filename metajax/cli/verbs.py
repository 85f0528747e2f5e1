"""What the verbs of the command line do. Each takes the parsed options and the time of the command, and returns the exit code."""

from __future__ import annotations

import argparse
import functools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from metajax import registry
from metajax.cli import interop
from metajax.config import AnyConfig, Config, ImageConfig, Runtime, check_analyses, require_text
from metajax.core.errors import UserError, nearest, require
from metajax.core.fields import Seed, convert, override
from metajax.core.progress import echo, fail, say, terminal
from metajax.core.storage import publish, stage


def _paths(options: argparse.Namespace) -> Any:
    from metajax.data.pipeline import Paths

    return Paths(cache=options.cache_dir, data=options.data_dir, runs=options.runs_dir)


def _config(experiment: registry.Experiment, options: argparse.Namespace) -> tuple[AnyConfig, tuple[AnyConfig, ...]]:
    """The experiment as this command asks for it, and the runs that it starts from, the oldest first."""
    from metajax.runs.parents import parse_changes, resolve_parents

    changes = parse_changes(options.changes, options.runs_dir)
    config = override(experiment.build(options.scale), {**changes, "seed": options.seed})
    return resolve_parents(config, changes, options.runs_dir)


def _start_jax(cache: Path) -> None:
    """Compiled programs are kept between runs; set before the first use of a device."""
    import jax

    from metajax.core.compat import keep_programs
    from metajax.distributed.hosts import has_tpu

    # The TPU compiler may be installed for planning alone: without a chip, looking for one costs seconds and many warnings.
    chips = has_tpu() or any(Path("/dev").glob("nvidia[0-9]*"))
    if not chips and find_spec("libtpu") and "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    keep_programs(cache / "jax")


def _connect(options: argparse.Namespace) -> None:
    """Start JAX, and meet the other processes of this run where there are some."""
    _start_jax(options.cache_dir)
    from metajax.distributed.hosts import connect, find_place

    connect(find_place(options.coordinator, options.processes, options.process_id))


def run(options: argparse.Namespace, started: float) -> int:
    """Run an experiment, a table, a sweep, or a sample of all tables."""
    require(options.all == (options.name is None), "name an experiment or a table, or say --all")
    require(options.all or options.budget is None, "--budget goes with --all")
    target = None if options.all else registry.find(options.name)
    single = isinstance(target, registry.Experiment) and not options.sweeps
    require(single or not isinstance(options.workdir, str), f"{options.workdir}: a bucket is for one experiment; name a folder")
    last = options.seed + options.seeds - 1
    convert(last, Seed, f"--seed {options.seed} --seeds {options.seeds}: the last seed")
    startup = iter([{"started": started, "imports_seconds": 0.0}])  # the command's first run pays for starting

    def run_one(config: AnyConfig, workdir: Path, analyses: Sequence[str] = ()) -> dict[str, Any]:
        from metajax.experiment import run_experiment

        first = next(startup, {})
        if first:
            first["imports_seconds"] = time.monotonic() - started
        return run_experiment(config, workdir, _paths(options), analyses=analyses, **first)

    if target is None:
        return _run_sample(options, run_one)
    return (_run_single if single else _run_table)(target, options, run_one)


def _run_single(experiment: registry.Experiment, options: argparse.Namespace, run_one: Any) -> int:
    """Run one experiment, and before it the runs that it starts from."""
    require(
        options.seeds == 1 and options.rows is None and not options.render and options.jobs == 1,
        f"{experiment.name} is one experiment; --seeds, --rows, --jobs and --render are for tables and sweeps",
    )
    config, parents = _config(experiment, options)
    say(f"{options.name} at scale {options.scale}")
    _connect(options)
    from metajax.distributed.hosts import is_first
    from metajax.reporting.terminal import print_evaluation
    from metajax.runs.directory import default_workdir
    from metajax.training.trainer import NonFinite

    try:
        for parent in parents:
            say(f"{experiment.name} starts from {parent.name} (seed {parent.seed}), which comes first")
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
    """Run a table or a sweep, or render it from what there is; 1 when a run of it failed."""
    from metajax.runs.parents import parse_changes
    from metajax.tables.formats import failures, markdown
    from metajax.tables.run import choose_rows, has_runs, plan_table
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
        require(has_runs(result), f"nothing of {table.name} has been run under {options.runs_dir}; leave --render out to run it")
        plan.write()
    else:
        from metajax.distributed.hosts import find_place
        from metajax.runs.loggers import check_loggers

        require(
            find_place(options.coordinator, options.processes, options.process_id) is None,
            f"{options.name} is a table, which runs in one process; several processes run one experiment, such as a row of it",
        )
        for logger in {logger for one in plan.runs() for logger in one.config.runtime.loggers}:
            check_loggers([logger])
        result = _run_jobs(plan, options, run_one)
    echo(markdown(result))
    say(f"report: {plan.folder / 'report.html'}")
    return 1 if failures(result) else 0


def _run_sample(options: argparse.Namespace, run_one: Any) -> int:
    """Make a sample of all tables; 1 when something in it failed."""
    given = {
        "--set": options.changes, "--rows": options.rows, "--sweep": options.sweeps, "--seeds": options.seeds > 1,
        "--jobs": options.jobs > 1, "--render": options.render,
    }  # fmt: skip
    for flag in (flag for flag, value in given.items() if value):
        raise UserError(
            f"{flag} does not go with --all, which takes rows of all tables as they are; name a table, or leave it out"
        )
    from metajax.reporting.terminal import print_sample
    from metajax.tables.sampler import sample, summary

    _start_jax(options.cache_dir)
    root = options.workdir or options.runs_dir
    made = sample(registry.tables().values(), options.scale, options.budget or 3600.0, options.seed, root, run_one)
    there = [table.name for table in registry.tables().values() if table.runs_at(options.scale)]
    print_sample(summary(made), there)
    return 1 if any(one.reason for one in made) else 0


def _run_jobs(plan: Any, options: argparse.Namespace, run_one: Any) -> dict[str, Any]:
    """The runs of a table, one by one here or several at a time in processes that write to the log of each run."""
    from metajax.core.workers import workers
    from metajax.distributed.hosts import has_tpu
    from metajax.runs.directory import RUN_LOG
    from metajax.tables.run import run_table

    start = functools.partial(_start_jax, options.cache_dir)
    if options.jobs == 1:
        start()
        return run_table(plan, run_one)
    require(
        not has_tpu() or os.environ.get("JAX_PLATFORMS") == "cpu",
        f"--jobs {options.jobs}: a TPU serves one process; leave it out, or compute on the cores with JAX_PLATFORMS=cpu",
    )
    say(f"{options.jobs} runs at a time; each writes what it says to {RUN_LOG} in its folder")
    try:
        with workers(options.jobs, start) as executor:
            return run_table(plan, functools.partial(_run_and_log, _paths(options)), executor, options.jobs)
    except BrokenProcessPool:
        raise UserError(
            "a run's process was killed, for want of memory perhaps; the same command goes on, with fewer --jobs"
        ) from None


def _run_and_log(paths: Any, config: Config, workdir: Path, analyses: Sequence[str]) -> dict[str, Any]:
    """Make a run in a process of its own; its progress goes to its folder."""
    from metajax.experiment import run_experiment
    from metajax.runs.directory import RUN_LOG

    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / RUN_LOG, "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        with terminal():
            return run_experiment(config, workdir, paths, analyses=analyses)


def list_all(options: argparse.Namespace, started: float) -> int:
    """Print what there is."""
    from metajax.tables.listing import print_list

    print_list(options.pattern)
    return 0


def show(options: argparse.Namespace, started: float) -> int:
    """Print an experiment before it runs, or a corpus."""
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
        require(not options.count, f"{target.name} is a table; --rows shows rows of one experiment, such as {target.example}")
        from metajax.runs.parents import parse_changes
        from metajax.tables.listing import print_table_plan
        from metajax.tables.run import plan_table

        target.parts_at(options.scale)  # an unknown scale stops here, before a parent is looked for
        changes = parse_changes(options.changes, options.runs_dir)
        print_table_plan(plan_table(target, options.scale, [options.seed], changes, options.runs_dir, target.rows))
        return 0
    config, _ = _config(target, options)
    terminal.print_experiment(target, config)
    if isinstance(config, ImageConfig):
        require(not options.count, f"{config.name} is a run on images; --rows shows rows of text")
        return 0
    if config.tasks is not None:
        terminal.print_curriculum(config, _paths(options))
    if options.count:
        terminal.print_rows(config, _paths(options), options.count)
    return 0


def _config_of_run(options: argparse.Namespace) -> Config:
    """The config of the run that a command names, on the devices that are here; changes to it are checked before anything is read."""
    from metajax.runs.directory import find_run, read_config

    config = require_text(read_config(find_run(options.run, options.runs_dir)), options.verb)
    return override(config, {"runtime.mesh": Runtime.mesh})


def _open_run(options: argparse.Namespace, word: str) -> Any:
    """A run's newest checkpoint."""
    _start_jax(options.cache_dir)
    from metajax.runs.directory import find_run
    from metajax.training.opened import open_run

    workdir = find_run(word, options.runs_dir)
    say(f"run: {workdir}")
    return open_run(workdir)


def plan(options: argparse.Namespace, started: float) -> int:
    """Compile the train step of an experiment, or of all, for a slice that is not there; 1 where one does not fit."""
    require(options.all or bool(options.name and options.topology), "name an experiment and its --topology, or say --all")
    given = {f"--{name.replace('_', '-')}": getattr(options, name) for name in ("json", "html", "largest_batch", "schedules")}
    given["--set"] = options.changes
    for flag in (flag for flag, value in given.items() if options.all and value):
        raise UserError(f"{flag} does not go with --all, which plans experiments as they are; name one, or leave it out")
    from metajax.planning.topology import allow_compiler, parse_topology

    for topology in options.topology.split(",") if options.topology else ():
        parse_topology(topology)
    with tempfile.TemporaryDirectory(prefix="plan-") as dump:
        allow_compiler(Path(dump))
        from metajax.cli.plan import run_plan, run_survey

        if options.all:
            return run_survey(options, _paths(options), Path(dump))
        config, parents = _config(registry.find_experiment(options.name), options)
        return run_plan(options, config, parents, _paths(options), Path(dump))


def cache(options: argparse.Namespace, started: float) -> int:
    """Tokenise what an experiment reads, and print what there is; with --measure how fast it is read."""
    from metajax.data import beam, tokenising
    from metajax.data.pipeline import open_corpora
    from metajax.reporting.feeding import feeding
    from metajax.reporting.terminal import print_cache

    local = functools.partial(tokenising.in_processes, workers=options.workers)
    make = local if options.beam is None else functools.partial(beam.on_beam, options=options.beam)
    config, _ = _config(registry.find_experiment(options.name), options)
    for found in (corpora := open_corpora(config, _paths(options), make)).caches:
        print_cache(found)
    if options.measure:
        echo("one core: " + ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in feeding(corpora).items()))
    return 0


def evaluate(options: argparse.Namespace, started: float) -> int:
    """Evaluate a run's newest checkpoint."""
    config, changes = _config_of_run(options), {}
    if options.documents is not None:
        changes["evaluation.documents"] = options.documents
    if options.conditions is not None:
        changes["evaluation.conditions"] = options.conditions
    for field, words in (("tasks", options.choice), ("shots", options.shots), ("contexts", options.contexts)):
        if words is not None:
            require(
                options.choice is not None or config.evaluation.choice is not None,
                f"--{field}: the run has no multiple choice; name its files with --choice KIND:FILE",
            )
            changes[f"evaluation.choice.{field}"] = words
    if options.task is not None:
        changes["tasks.names"] = options.task
    if options.lengths is not None:
        changes["tasks.eval_lengths"] = options.lengths
    if changes.keys() & {"tasks.names", "tasks.eval_lengths"} and config.tasks is None:
        changes["tasks.train_length"] = config.data.row_length  # what it was trained on is text
    config = override(config, changes)
    opened = _open_run(options, options.run)
    from metajax.experiment import evaluate_run
    from metajax.reporting.terminal import print_evaluation

    print_evaluation(evaluate_run(opened, config, _paths(options)))
    return 0


def analyze(options: argparse.Namespace, started: float) -> int:
    """Make analyses of a run's newest checkpoint."""
    names = tuple(options.what.split(",")) if options.what else ()
    check_analyses("--what", names)
    from metajax.runs.directory import find_run, read_config

    workdir = find_run(options.run, options.runs_dir)
    if isinstance(read_config(workdir), ImageConfig):
        return _analyze_images(workdir, names, options)
    config, changes, choice = _config_of_run(options), {}, {"task": options.task, "length": options.length}
    task = options.task or ("list_recall" if config.tasks is None and config.meta_tokens is not None else None)
    if task not in (None, "text"):
        changes["tasks.names"] = choice["task"] = task
        if config.tasks is None:
            changes["tasks.train_length"] = config.data.row_length  # what it was trained on is text
    if options.examples is not None:
        choice["prompts"] = options.examples
        changes |= {"tasks.eval_examples": options.examples} if config.tasks is not None or changes else {}
    config = override(config, changes)
    opened = _open_run(options, options.run)
    from metajax.analysis.analyses import fitting, run_analyses
    from metajax.analysis.study import open_study
    from metajax.reporting.html import write_analysis_page
    from metajax.reporting.terminal import print_analysis

    study = open_study(opened.program, opened.open_corpora(config, _paths(options)), opened.model, **choice)
    say(f"{study.count} prompts of {study.task}, at most {study.rows['tokens'].shape[1]} tokens each")
    for name, numbers in run_analyses(study, names or fitting(study), opened.workdir):
        print_analysis(name, numbers)
    say(f"figures: {write_analysis_page(opened.workdir)}")
    publish(opened.workdir)
    return 0


def _analyze_images(workdir: Path, names: Sequence[str], options: argparse.Namespace) -> int:
    require(
        options.task is None and options.length is None and options.examples is None,
        f"{workdir} is a run on images; --task, --length and --examples choose prompts of text",
    )
    _start_jax(options.cache_dir)
    from metajax.runs.directory import read_config
    from metajax.vision.analysis_page import headlines
    from metajax.vision.page import write_image_report
    from metajax.vision.study import fitting, open_image_study, run_image_analyses

    study = open_image_study(workdir, read_config(workdir), _paths(options))
    for name, numbers in run_image_analyses(study, names or fitting(study), workdir):
        echo("\n  ".join((name, *headlines(name, numbers))))
    say(f"figures: {write_image_report(workdir)}")
    publish(workdir)
    return 0


def generate(options: argparse.Namespace, started: float) -> int:
    """Print what a run's newest checkpoint makes of a prompt."""
    from metajax.inference.decoding import Sampling
    from metajax.inference.forward import prepare
    from metajax.inference.generation import stream

    opened = _open_run(options, options.run)
    pieces = stream(
        prepare(opened.model, options.decode_window), opened.config, opened.tokenizer.marked() if options.markers else opened.tokenizer,
        [options.prompt], count=options.tokens, context=options.context, guidance=options.guidance, sampling=Sampling(options.temperature, options.top_k, options.top_p), seed=options.seed,
        stride=1 if sys.stdout.isatty() else opened.config.row_slots,
    )  # fmt: skip
    echo(options.prompt, end="")
    for (piece,) in pieces:
        echo(piece, end="")
    echo()
    return 0


def import_model(options: argparse.Namespace, started: float) -> int:
    """A published checkpoint as a run."""
    _start_jax(options.cache_dir)
    interop.run_import(options)
    return 0


def export_model(options: argparse.Namespace, started: float) -> int:
    """A run as a Hugging Face folder."""
    interop.run_export(options, _open_run(options, options.run))
    return 0


def list_runs(options: argparse.Namespace, started: float) -> int:
    """Print what has been run."""
    from metajax.reporting.terminal import print_runs

    print_runs(options.runs_dir)
    return 0


def list_checkpoints(options: argparse.Namespace, started: float) -> int:
    """Print a run's checkpoints, verify or prune them; 1 where one is damaged."""
    from metajax.runs.directory import RunDirectory, find_run, read_config
    from metajax.training.inventory import inventory, prune

    workdir = find_run(options.run, options.runs_dir)
    if options.prune is not None:
        run = RunDirectory.open(workdir, read_config(workdir))  # not while it is running
        for folder in prune(workdir, options.prune):
            echo(f"deleted {folder}")
        run.close()
    kept = inventory(workdir, options.verify)
    require(bool(kept), f"{workdir} has no checkpoint yet; run the experiment first")
    for one in kept:
        echo(f"step {one.step:>8}  {one.bytes / 1e6:10.1f} MB  {one.written}  {one.state}")
    return 1 if any(one.damaged for one in kept) else 0


def preflight(options: argparse.Namespace, started: float) -> int:
    """Check this host, and with the others that all are alike; 1 where something is missing."""
    from importlib.metadata import version

    from metajax.cli.preflight import preflight as check_all
    from metajax.config import config_hash
    from metajax.runs.directory import LIBRARIES, git_state

    facts: dict[str, Any] = {name: version(name) for name in LIBRARIES}
    facts |= {"Python": platform.python_version(), "code": git_state()}
    sources: Sequence[str] = ()
    if options.name is not None:
        config, _ = _config(registry.find_experiment(options.name), options)
        facts["configuration"], sources = config_hash(config), config.data.sources
    arguments = {
        "coordinator": options.coordinator, "processes": options.processes, "process": options.process_id, "workdir": str(options.workdir or options.runs_dir),
        "sources": sources, "data_dir": options.data_dir and str(options.data_dir),
        "cache_dir": str(options.cache_dir), "facts": facts,
    }  # fmt: skip
    findings = check_all(arguments, options.seconds)
    for finding in findings:
        echo(f"{'ok    ' if finding.good else 'FAILED'}  {finding.check:<11} {finding.text}")
    return 0 if all(finding.good for finding in findings) else 1


def compare(options: argparse.Namespace, started: float) -> int:
    """Print runs side by side."""
    from metajax.reporting.terminal import print_comparison
    from metajax.runs.directory import find_run

    require(len(options.runs) >= 2, "compare needs at least two runs")
    print_comparison([find_run(word, options.runs_dir) for word in options.runs])
    return 0
