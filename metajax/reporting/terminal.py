"""Terminal output: lists, an experiment before it runs, decoded rows, corpora, runs side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metajax import registry
from metajax.config import AnyConfig, Config, config_hash, difference
from metajax.core.errors import require
from metajax.core.fields import flatten
from metajax.core.progress import PROGRAM, echo, plain
from metajax.reporting.lines import console, grid_of, line_of, print_grid
from metajax.runs.directory import conditions, list_runs, read_config, read_report, readable
from metajax.runs.files import read_lines

BITS_A_WORD = (
    "entropy in bits; bits/word: saved in coding the words of documents from other origins by the frequencies of words under the same "
    "value, a lower estimate of the information of the field about a word; a value not met before saves nothing"
)


def print_experiment(experiment: registry.Experiment, config: AnyConfig) -> None:
    """Print resolved config, parameters by part, FLOPs per token, time estimate and published values."""
    from metajax.training.optimizers import unread_by_optimizer

    unread = {*config.unread(), *unread_by_optimizer(config)}
    console.print(line_of(config.name, f" at scale {config.scale}, hash {config_hash(config)}: {experiment.summary}"))
    fields = {name.rstrip("_"): value for name, value in flatten(config).items() if name not in unread}
    print_grid(("field", "value"), ((name, "-" if value in (None, "") else str(value)) for name, value in fields.items()))
    if isinstance(config, Config) and not _print_size(config):
        return
    row = experiment.row
    published = {key: row.paper(key) for key in row.published} if row else {}
    values = ", ".join(f"{key} {'not stated' if p.value is None else p.value}" for key, p in published.items())
    console.print(f"about {experiment.minutes[config.scale]:g} minutes; the paper reports: {values or 'nothing for this row'}")


def _print_size(config: Config) -> bool:
    """Print parameters, FLOPs and the size of the cache; False if the size of the vocabulary is not known."""
    from metajax.data.tokenizers import vocabulary_of
    from metajax.models.cache_bytes import cache_bytes
    from metajax.models.flops import flops_per_token
    from metajax.models.lm import param_count
    from metajax.training.program import abstract_model

    vocabulary = vocabulary_of(config.data.tokenizer)
    if vocabulary is None:
        console.print(f"the tokenizer {config.data.tokenizer} is a file of yours: parameters and FLOPs follow once it is read")
        return False
    counts, flops = param_count(abstract_model(config, vocabulary.size)), flops_per_token(config, vocabulary.size)
    parts = sorted(counts.keys() | flops.keys() - {"total"})
    texts = [(f"{counts[part]:,}" if part in counts else "-", f"{flops[part]:,.0f}" if part in flops else "-") for part in parts]
    print_grid(("part", "parameters", "training FLOPs a position"), zip(parts, *zip(*texts, strict=True), strict=True))
    count = config.training.steps * config.data.batch_size * config.row_positions
    console.print(f"{count:,} positions in {config.training.steps:,} steps, {sum(flops.values()) * count:.2e} training FLOPs")
    if config.model.hybrid is not None:
        kept = {part: size for part, size in cache_bytes(config.model, config.row_positions).items() if size}
        shares = ", ".join(f"{part} {size:,}" for part, size in kept.items())
        console.print(f"generation keeps {sum(kept.values()):,} bytes of a whole row: {shares}")
    return True


def print_plan(found: dict[str, Any]) -> None:
    """Print a plan: memory of the chips, transfers between them, and bounds of a step's time."""
    from metajax.reporting.plan_page import GIB, advice_lines, buffer_text, plan_facts

    mesh = ", ".join(f"{name} {size}" for name, size in found["mesh"].items())
    console.print(line_of(found["name"], f" at scale {found['scale']} on {found['topology']}: {found['chips']} chips, {mesh}"))
    for line in mesh_lines(found["meshes"]):
        console.print(line)
    if found["fits"]:
        for title, unit, facts in plan_facts(found):
            print_grid((title.lower(), unit), facts)
        console.print(f"compiled in {found['compile_seconds']:.0f} s; the largest buffers:")
    else:
        state = sum(found["state"].values()) / GIB
        console.print(f"it does not fit: {found['reason']}; parameters and optimiser take {state:.2f} GiB of each chip")
    for line in (*(f"  {buffer_text(buffer)}" for buffer in found["largest_buffers"]), *advice_lines(found)):
        console.print(line, soft_wrap=True)


def mesh_lines(meshes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `runtime.mesh=auto` chose and what it rejected, with the costs of each."""
    line = "{mesh}: {state:,.0f} MiB of state, {links:,.0f} MB sent a step"
    costs = [line.format(mesh=m["mesh"], state=m["state"] / 2**20, links=m["links"] / 1e6) for m in meshes]
    return [f"runtime.mesh=auto {word} {cost}" for word, cost in zip(("chose", *("rejected",) * len(costs)), costs, strict=False)]


def print_survey(made: Sequence[dict[str, Any]]) -> None:
    """Print the plans of many programs, a line for each."""
    rows = []
    for found in made:
        line = [found["name"], str(len(found["stands_for"])), found["topology"]]
        if not found["fits"]:
            rows.append([*line, f"does not fit: {found['reason']}"])
            continue
        memory, bound, gib = found["memory"], found["bound"], 2**30
        line.append(f"{memory['total'] / gib:.2f} of {memory['limit'] / gib:g}")
        rows.append([*line, f"{1e3 * bound['step']:.1f}", f"{bound['mfu']:.1%}", f"{found['compile_seconds']:.0f}"])
    print_grid(("program", "for", "slice", "GiB of a chip", "ms a step, at least", "MFU, at most", "compiled, s"), rows)
    console.print(f"{sum(found['fits'] for found in made)} of {len(made)} programs fit")


def print_evaluation(results: dict[str, dict[str, Any]]) -> None:
    """Print validation results: tasks and choices as tables, accuracies and bits per byte a line each."""
    from metajax.reporting.tasks import CHOICE_HEAD, HEAD, choice_rows, table_rows

    if "tasks" in results:
        print_grid(HEAD, table_rows(results["tasks"]))
    if "choice" in results:
        print_grid(CHOICE_HEAD, choice_rows(results["choice"]))
    for name, values in results.items():
        if isinstance(values, dict) and "accuracy" in values:
            pairs = "{pairs} pairs, margin {margin:.3f}, reference of step {reference_step}"
            size = ("{images} images" if "images" in values else pairs).format(**values)
            echo(f"accuracy, {name}: {values['accuracy']:.1%} ({values['low']:.1%} to {values['high']:.1%}, {size})")
    for condition, values in conditions(results).items():
        size = f"({values['documents']} documents, {values['body_bytes']:,} bytes)"
        echo(f"validation bits/byte, {condition.replace('none', 'no')} metadata: {values['bpb']:.4f}  {size}")


def print_curriculum(config: Config, paths: Any) -> None:
    """Print the tasks of a config: lengths by phase, and for each task the first test example of the shortest bin."""
    from metajax.data.pipeline import open_corpora, task_examples

    examples, tasks = task_examples(open_corpora(config, paths)), config.tasks
    phases, lengths = range(len(tasks.phases)), ", ".join(map(str, tasks.eval_lengths))
    ranges = {task: [f"{examples.shortest(task)}-{examples.longest(task, phase)}" for phase in phases] for task in tasks.names}
    console.print(plain(f"tokens of an example; a phase is {config.training.steps / len(tasks.phases):,.0f} steps", "bold"))
    titles = ("task", *(f"phase {phase + 1}" for phase in phases), "evaluated at")
    print_grid(titles, ((task, *cells, lengths) for task, cells in ranges.items()))
    for task in tasks.names:
        console.print(plain(examples.test(task, min(tasks.eval_lengths), 0).text, "italic"))


def print_rows(config: Config, paths: Any, count: int) -> None:
    """Print the first `count` training rows as spans of positions: content, target and text."""
    from metajax.data.pipeline import open_corpora, phase_rows, training_rows
    from metajax.reporting.rows import LEGEND, spans, summary

    corpora = open_corpora(config, paths)
    rows = training_rows(corpora)
    if config.tasks is None:
        for i, spec in enumerate(config.data.sources):
            console.print(plain(f"{spec}: {summary(phase_rows(corpora, i, note=lambda _: None))}"))
    for n in range(count):
        row = rows[n]
        used, lost = int((row["segment_ids"] > 0).sum()), row["loss_weights"] > 0
        body, metadata = int(row["is_body"].sum()), int((lost & row["asks_metadata"]).sum())
        counts = f"{int(lost.sum())} with loss, {body} of them for body text, {metadata} for metadata"
        console.print(plain(f"row {n}: {used} of {len(lost)} positions, {counts}", "bold"))
        cells = ((str(span.document), span.holds, span.asked, span.text) for span in spans(row, corpora.tokenizer))
        print_grid(("document", "holds", "asked for", "text"), cells)
    console.print(plain(LEGEND, "italic"))


def print_corpus(spec: str, paths: Any, count: int, more: Sequence[str] = ()) -> None:
    """Print a corpus: documents, sizes, origins; for each field coverage, distinct values, entropy and mutual information."""
    from metajax.data.sources import open_source
    from metajax.reporting.information import survey

    source = open_source(spec, cache_dir=paths.cache, data_dir=paths.data)
    found = survey(source, more)
    sizes, sample = found.sizes, f" (here and below a sample: every {found.every}th document)" if found.every > 1 else ""
    bytes_ = f"{sizes.sum():,} bytes (median {int(np.median(sizes)):,})"
    console.print(line_of(spec, f": {len(source):,} documents, {bytes_}, {found.origins:,} origins{sample}"))
    for note in found.notes:
        console.print(plain(note, "yellow"))
    rows = []
    for field in found.fields:
        common = ", ".join(f"{value[:30]} ({n})" for value, n in field.common)
        saved = "-" if field.bits_a_word is None else f"{field.bits_a_word:.3f}"
        share = f"{field.documents / len(sizes):.1%}"
        rows.append((field.name, share, f"{field.distinct:,}", f"{field.entropy:.2f}", saved, common))
    grid = grid_of(("field", "has it", "distinct", "entropy", "bits/word", "most frequent"), rows)
    grid.expand, last = True, grid.columns[-1]  # the last column gets the remaining width
    last.ratio, last.no_wrap, last.overflow = 1, True, "ellipsis"
    console.print(grid)
    console.print(plain(BITS_A_WORD, "italic"))
    if len(found.paired) > 1:
        numbers = range(1, len(found.paired) + 1)
        names = (f"{n} {name}" for n, name in zip(numbers, found.paired, strict=True))
        rows = ([name, *(f"{bits:.1f}" for bits in row)] for name, row in zip(names, found.pairs, strict=True))
        print_grid(("bits in common", *map(str, numbers)), rows)
    for i in np.linspace(0, len(found.documents) - 1, count).astype(int).tolist():
        document = found.documents[i]
        console.print(plain(json.dumps(document.metadata), "blue"))
        console.print(plain(document.text[:600]))
    console.print_json(json.dumps(source.manifest()))


def print_cache(cache: Any) -> None:
    """Print a tokenised corpus: its size, its folder, and remarks on its documents."""
    from metajax.data.pipeline import notes

    manifest = cache.manifest
    skipped = f", {manifest['bad_records_skipped']:,} bad records skipped" if manifest["bad_records_skipped"] else ""
    size = f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens of the body, {manifest['bytes']:,} bytes{skipped}"
    head = f"{manifest['source']['spec']}: {size}; sha256 {manifest['sha256'][:12]}"
    echo("\n  ".join([head, str(cache.folder), *notes(cache)]))


def print_runs(root: Path) -> None:
    """Print every run under `root`, oldest first."""
    rows = [(run.name, *cells) for run, cells in readable(list_runs(root), _run_cells)]
    grid = grid_of(("run", "experiment", "scale", "seed", "state", "validation bits/byte"), rows)
    console.print(grid if rows else f"no runs under {root}; start with: {PROGRAM} quickstart")


def _run_cells(run: Path) -> list[str]:
    config, report = read_config(run), read_report(run)
    lines = [] if report else read_lines(run / "metrics.jsonl")
    state = "complete" if report else f"step {lines[-1]['step'] if lines else 0} of {config.training.steps}"
    scores = ", ".join(f"{k} {v['bpb']:.4f}" for k, v in conditions(report["eval"]).items()) if report else "-"
    return [config.name, config.scale, str(config.seed), state, scores]


def print_comparison(runs: list[Path]) -> None:
    """Print runs side by side: the fields that differ, then results."""
    found = readable(runs, lambda run: (read_config(run), read_report(run)))
    require(len(found) >= 2, "less than two of these runs can be read")
    configs, reports = [config for _, (config, _) in found], [report for _, (_, report) in found]
    rows = [("experiment", *(c.name for c in configs)), ("seed", *(str(c.seed) for c in configs))]
    for field in sorted({field for c in configs[1:] for field in difference(configs[0], c)} - {"name", "seed"}):
        rows.append((field, *(str(flatten(c).get(field, "-")) for c in configs)))
    if None in reports:
        rows.append(("state", *("complete" if report else "not complete" for report in reports)))
    scores = [_scores(report) if report else {} for report in reports]
    for title in dict.fromkeys(title for of_run in scores for title in of_run):
        rows.append((title, *(of_run.get(title, "-") for of_run in scores)))
    print_grid(("", *(run.name for run, _ in found)), rows)


def _scores(report: dict[str, Any]) -> dict[str, str]:
    """The results and the size of a complete run, by title."""
    results = report["eval"]
    shown = {f"bits/byte, {condition} metadata": f"{v['bpb']:.4f}" for condition, v in conditions(results).items()}
    for task, bins in results.get("tasks", {}).items():
        shown |= {f"{task}, {n} tokens": "-" if v["exact"] is None else f"{v['exact']:.1%}" for n, v in bins.items()}
    shown |= {f"accuracy, {k}": f"{v['accuracy']:.1%}" for k, v in results.items() if isinstance(v, dict) and "accuracy" in v}
    if "choice" in results:
        shown["multiple choice, mean"] = f"{results['choice']['average']:.1%}"
    counts = {"parameters": report["parameters"]["total"], "body tokens": report["counts"].get("body")}
    counts |= {key: report["counts"].get(key) for key in ("positions", "images")}
    return shown | {title: f"{count:,}" for title, count in counts.items() if count is not None}


def print_sample(lines: Sequence[dict[str, Any]], tables: Sequence[str]) -> None:
    """Print the findings of a sample of all tables, and the tables that it did not reach."""
    if not lines:
        console.print("no line of any table fits the time; give it more with --budget")
    rows = []
    for line in lines:
        counts = (str(line["lines"]), f"{line['minutes']:.1f}", str(len(line["failed"])))
        rows.append((line["table"], *counts, ", ".join(line["empty"]) or "-"))
    print_grid(("table", "lines", "minutes", "failed", "columns without a number"), rows)
    for failure in (f"{line['table']}/{failure}" for line in lines for failure in line["failed"]):
        console.print(plain(f"failed: {failure}", "red"), soft_wrap=True)
    rest = ", ".join(name for name in tables if name not in {line["table"] for line in lines})
    console.print(f"{len(lines)} of {len(tables)} tables reached" + f"; not reached: {rest}" * bool(rest))
