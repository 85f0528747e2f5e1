"""One experiment from start to finish: train or resume, evaluate, sample, write the report."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from metajax.analysis import analysis
from metajax.config import AnyConfig, Config, config_hash
from metajax.core.errors import Stopped, require
from metajax.core.fields import to_dict
from metajax.core.interrupts import Interrupted
from metajax.core.progress import progress, say
from metajax.core.storage import hashes_of, steps_of
from metajax.data.cache import build_metadata_table
from metajax.data.metadata import uniform_hash
from metajax.data.pipeline import EVALUATION_SEED, Corpora, Paths, training_rows
from metajax.distributed.hosts import is_first, of_first, together
from metajax.evaluation.multiple_choice import check_choice, evaluate_choice
from metajax.evaluation.preferences import evaluate_preferences
from metajax.evaluation.tasks import check_bins, evaluate_tasks, mean_exact
from metajax.evaluation.validation import check_validation, evaluate_validation
from metajax.inference.forward import prepare
from metajax.inference.generation import generate, room_for_prompt
from metajax.models.cache_bytes import cache_bytes, published_cache_bytes
from metajax.models.flops import flops_per_token
from metajax.models.lm import param_count
from metajax.models.specs import layer_specs
from metajax.reporting.rows import for_page
from metajax.runs.directory import RunDirectory, read_config
from metajax.runs.files import mark_of, read_lines, recall
from metajax.runs.loggers import check_loggers
from metajax.runs.metrics import memory_use
from metajax.runs.pace import Phases
from metajax.training.objectives import objectives
from metajax.training.opened import OpenedRun, open_run
from metajax.training.optimizers import unread_by_optimizer
from metajax.training.program import Program
from metajax.training.task import Task
from metajax.training.text import TextTask
from metajax.training.trainer import Trained, Trainer

CACHE_TOKENS = 8_000  # sequence length for which the report states the size of the caches
Names = Sequence[str]
PROMPT_TOKENS = 24  # tokens of a validation document that prompt the report's sample
ROWS_SHOWN = 2  # training rows in the report


def run_experiment(
    config: AnyConfig, workdir: Path, paths: Paths, *, analyses: Names = (), started: float = 0.0, imports_seconds: float = 0.0
) -> dict[str, Any]:
    """Run `config` in `workdir`, resuming a run that is there, and return its report.

    `analyses` names analyses of the trained model to make, if they have not been made yet. `started` is time.monotonic() of the
    command (0: now), of which imports took `imports_seconds`. UserError for bad input, or a workdir that holds another experiment;
    NonFinite if training broke down.
    """
    together(lambda: check_parts(config))
    run = together(lambda: RunDirectory.open(workdir, config))
    try:
        with run.while_there():
            return _run(config, run, paths, analyses, Phases(started or time.monotonic(), {"imports": imports_seconds}))
    except Stopped:
        raise
    except KeyboardInterrupt:
        step = max((step for step in steps_of(workdir) if hashes_of(workdir, step)), default=0)
        raise Interrupted(f"interrupted; the same command continues from step {step}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename is None:
            error.filename = str(workdir)  # the error of a full disk does not name its file
        raise
    finally:
        run.close()


def check_parts(config: AnyConfig) -> None:
    """Raise UserError for an unknown part, a field that the optimizer ignores, or a logger that is not installed."""
    check_loggers(config.runtime.loggers)
    unread_by_optimizer(config)
    if isinstance(config, Config):
        layer_specs(config.model, config.meta_tokens)
        objectives.find(config.training.objective, "training.objective")


def _run(config: AnyConfig, run: RunDirectory, paths: Paths, analyses: Names, phases: Phases) -> dict[str, Any]:
    workdir, again = run.path, "it is made again from the checkpoints"
    done = of_first(together(lambda: recall(workdir / "report.json", run.warn, again) if is_first() else None))
    if done is not None:
        say(f"{config.name} (seed {config.seed}) is complete in {workdir}")
        if is_first() and not (workdir / "report.html").exists():
            write_report(workdir)
    else:
        done = _make(config, run, paths, phases)
        run.write("report.json", done)
        if is_first():
            write_report(workdir)
    missing = [name for name in analyses if name not in done["analyses"]]
    require(not missing or jax.process_count() == 1, f"analyses ({', '.join(missing)}) run in one process: `analyze`, afterwards")
    if missing:
        done["analyses"] |= _analyse(config, workdir, paths, missing)
        run.write("report.json", done)
        write_report(workdir)
    return done


def _analyse(config: AnyConfig, workdir: Path, paths: Paths, names: Names) -> Iterator[tuple[str, dict[str, Any]]]:
    """Make analyses of a complete run of either family."""
    if isinstance(config, Config):
        from metajax.analysis.common.study import open_study

        opened = open_run(workdir)
        study = open_study(opened.program, opened.open_corpora(config, paths), opened.model)
        return analysis.run(study, names, workdir)
    from metajax.vision.analyses import image_analysis
    from metajax.vision.study import open_image_study

    return image_analysis.run(open_image_study(workdir, config, paths), names, workdir)


def write_report(workdir: Path) -> None:
    """Write report.html of a complete run of either family."""
    if isinstance(read_config(workdir), Config):
        from metajax.reporting.html import write_run_report

        write_run_report(workdir, analysis.sections(workdir))
    else:
        from metajax.vision.page import write_image_report

        write_image_report(workdir)


class TextRun(TextTask):
    """A run on text with its evaluation. Raises UserError if the config's evaluation is not possible."""

    def __init__(self, config: Config, *where: Any):
        super().__init__(config, *where)
        check_validation(self.corpora)
        check_choice(self.corpora)
        check_bins(config)

    def score(self, model: Any) -> tuple[float, dict[str, float]]:
        """Validation bits per byte, or the error rate of the tasks."""
        config, opened = self.config, (self.program, self.corpora, model)
        if config.tasks is not None:
            results = evaluate_tasks(*opened)
            exact = {f"exact/{task}/{length}": found["exact"] for task, bins in results.items() for length, found in bins.items()}
            return 1 - mean_exact(results), exact
        bpb = evaluate_validation(*opened, config.evaluation.conditions[0])["bpb"]
        choice = {"choice": evaluate_choice(*opened)["average"]} if config.evaluation.choice is not None else {}
        return bpb, {"validation_bpb": bpb, **choice}

    def report(self, trained: Trained, run: RunDirectory) -> dict[str, Any]:
        config, program, corpora, model = self.config, self.program, self.corpora, trained.state.model
        results = evaluate(config, program, corpora, model)
        wanted = config.evaluation.sample_tokens and config.tasks is None
        return {
            "parameters": param_count(model),
            "flops_per_token": flops_per_token(config, program.vocab_size),
            "cache_mb": _cache_mb(config),
            "bytes_per_token": corpora.bytes_per_token,
            "eval": results,
            "curves": _curves(config, run, results),
            "sample": sample(config, corpora, program.whole(model)) if wanted else None,
            "rows": for_page(training_rows(corpora, note=lambda _: None), corpora.tokenizer, ROWS_SHOWN),
            "corpora": [cache.manifest | {"folder": cache.folder.name} for cache in corpora.caches],
        }


def open_task(config: AnyConfig, paths: Paths, devices: list[jax.Device] | None = None) -> Task:
    """Open the data of a config and return the task for `Trainer`. devices: devices of the mesh; None: all."""
    if isinstance(config, Config):
        return TextRun(config, paths, devices)
    from metajax.vision.task import image_task

    return image_task(config, paths, devices)


def _make(config: AnyConfig, run: RunDirectory, paths: Paths, phases: Phases) -> dict[str, Any]:
    """Train the remaining steps, evaluate, and return the report."""
    with phases.time("data"):
        task = together(lambda: open_task(config, paths))
        trainer = Trainer(task, run, phases)
    trained = trainer.train()
    with trained.goodput.spend("evaluation"):
        found = task.report(trained, run)
    trained.goodput.write()
    return {
        "name": config.name,
        "scale": config.scale,
        "seed": config.seed,
        "hash": config_hash(config),
        "steps": task.steps,
        "counts": trained.counts,
        "left_out": vars(trained.left_out),
        "analyses": {},
        "startup": trained.startup,
        "goodput": trained.goodput.shares(),
        "memory": memory_use(),
        "metrics": mark_of((run.path / "metrics.jsonl").read_bytes()) if is_first() else None,
        "restarted_from": trained.restarted_from,
        "parent": config.init.from_ or None,
        "warnings": run.warnings,
        "config": to_dict(config),
        **found,
        "time": {**trained.time, **found.get("time", {}), "total_seconds": time.monotonic() - phases.started},
    }


def _curves(config: Config, run: RunDirectory, results: dict[str, dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Curves of (step, value) from evaluations during training and at the end; tables compare budgets by them."""
    if not config.evaluation.documents:
        return {}
    ends = {"bpb": ("validation_bpb", results[config.evaluation.conditions[0]]["bpb"])}
    if "choice" in results:
        ends["choice"] = ("choice", results["choice"]["average"])
    lines, steps = read_lines(run.path / "metrics.jsonl"), config.training.steps
    during = {curve: [(line["step"], line[name]) for line in lines if name in line] for curve, (name, _) in ends.items()}
    return {curve: [*during[curve], (steps, last)] for curve, (_, last) in ends.items()}


def _cache_mb(config: Config) -> dict[str, float]:
    """Cache size in 10^6 bytes for CACHE_TOKENS tokens: as the Hymba paper counts it, in 16 bits, and as allocated here."""
    ways = {"published": published_cache_bytes, "here": cache_bytes}
    return {name: 1e-6 * sum(count(config.model, CACHE_TOKENS).values()) for name, count in ways.items()}


def evaluate(config: Config, program: Program, corpora: Corpora, model: Any) -> dict[str, dict[str, Any]]:
    """Validation results under every condition of `config.evaluation`. "tasks": the results of `config.tasks` by task and length.
    "choice": those of `config.evaluation.choice`. "preferences": those of validation pairs, with `config.dpo`."""
    results: dict[str, dict[str, Any]] = {}
    if config.tasks is not None:
        results["tasks"] = evaluate_tasks(program, corpora, model)
        if not config.evaluation.documents:
            return results
    with progress(f"evaluating {config.name}", total=len(config.evaluation.conditions)) as advance:
        for condition in config.evaluation.conditions:
            results[condition] = evaluate_validation(program, corpora, model, condition)
            advance(1)
    if config.dpo is not None:
        results["preferences"] = evaluate_preferences(program, corpora, model)
    if config.evaluation.choice is not None:
        results["choice"] = evaluate_choice(program, corpora, model)
    return results


def evaluate_run(opened: OpenedRun, config: Config, paths: Paths) -> dict[str, dict[str, Any]]:
    """Results of an opened run with the evaluation settings of `config`; UserError if corpus or tokenizer is not the run's."""
    return evaluate(config, opened.program, opened.open_corpora(config, paths), opened.model)


def sample(config: Config, corpora: Corpora, model: Any) -> dict[str, str | None]:
    """The model's continuation of a validation document, after its metadata if training had it there; cut to fit a row."""
    cache, tokenizer, recipe = corpora.caches[0], corpora.tokenizer, config.metadata
    available = cache.documents("validation", config.data.validation_share, config.data.min_bytes)
    long_enough = available[cache.lengths[available] >= 2 * PROMPT_TOKENS]
    candidates = long_enough if len(long_enough) else available
    document = int(candidates[uniform_hash(EVALUATION_SEED, candidates).argmin()])
    context = None
    if recipe is not None and recipe.prepended and not recipe.tokens:
        ids = build_metadata_table(cache, tokenizer, recipe.template)[document]
        context = None if ids is None else ids.tolist()  # ids, because the text of control tokens would give other ids
    body, room = cache[document].tolist(), room_for_prompt(config, tokenizer, context)
    shown = min(PROMPT_TOKENS, room // 2)
    prompt = body[:shown]
    count = min(config.evaluation.sample_tokens, room - len(prompt))
    (text,) = generate(prepare(model), config, tokenizer, [prompt], count=count, context=[context])
    start = tokenizer.decode(prompt)
    rest = tokenizer.decode(body[: shown + count]).removeprefix(start)
    return {"context": context and tokenizer.decode(context), "prompt": start, "continuation": text, "document": rest}
