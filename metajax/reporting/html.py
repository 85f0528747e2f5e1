"""report.html of a run and of a table: one file each, no script, nothing fetched, figures inside."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from metajax.atomic import write_text
from metajax.config import Config, difference, flatten, from_dict
from metajax.reporting.figures import Curve, SpreadColumn, loss_curves, seed_spread
from metajax.reporting.records import conditions
from metajax.reporting.tasks import HEAD, accuracy_figure, table_rows, title
from metajax.training.metrics import read_lines

CONDITIONS = {  # of the evaluation: title, what the model was shown
    "none": ("No metadata", "The model sees the body alone."),
    "right": ("Right metadata", "Each document comes behind its own metadata."),
    "empty": ("Empty metadata", "Each document comes behind an empty pair of delimiters."),
    "shuffled": ("Shuffled metadata", "Each document comes behind another document's metadata."),
}
PHASES = {
    "imports": "imports",
    "data": "open data",
    "init": "build model",
    "compile": "compile",
    "first_step": "first step",
}
SLOT_PARTS = (
    ("body", "body text", "p1"),
    ("metadata", "metadata", "p2"),
    ("meta_tokens", "meta-tokens", "p3"),
    ("padding", "padding", "p4"),
)

_templates = Environment(
    loader=PackageLoader("metajax.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def write_run_report(workdir: Path) -> Path:
    """Write report.html from what a complete run left in `workdir`, and return its path.

    Raises:
      FileNotFoundError: no report.json there.
    """
    report = _read(workdir / "report.json")
    config = from_dict(Config, report["config"])
    curve, held_out_curve = _curves(workdir)
    unit, tasks = _unit(config), report["eval"].get("tasks")
    page = _templates.get_template("run.html").render(
        title=f"{report['name']} (seed {report['seed']})",
        report=report,
        sentence=_run_sentence(report, config),
        conditions=[_condition(name, result) for name, result in conditions(report["eval"]).items()],
        tasks=tasks and {"head": HEAD, "rows": table_rows(tasks), "figure": Markup(accuracy_figure(tasks, config.tasks))},
        curve=Markup(loss_curves({"training text": [curve]}, {"training text": [held_out_curve]}, unit)),
        curve_caption=f"{unit.capitalize()} of each training batch (faint) and their moving average. Training text, so not comparable "
        "with the held-out numbers to the last digit.",
        budget=_budget("all", report["counts"], config),
        token_facts=_token_facts(report),
        startup=_startup(report["startup"]),
        time_facts=_time_facts(report, config),
        parameter_facts=_parameter_facts(report["parameters"]),
        corpora=[_corpus(manifest) for manifest in report["corpora"]],
        held_out=_held_out(report),
        config=[(name, _show(value)) for name, value in flatten(config).items()],
        environment_facts=_environment_facts(_read(workdir / "environment.json")),
        manifest=json.dumps(report["corpora"], indent=1, ensure_ascii=False),
    )
    return _write(workdir, page)


def write_table_report(
    folder: Path, result: dict[str, Any], *, head: Sequence[str], body: Sequence[Sequence[str]], seed_note: str
) -> Path:
    """Write report.html of a table from its result and from its runs' own files, and return its path.

    Args:
      result: what run_table made; its rows name the workdirs of their runs.
      head: titles of the rendered table's columns: the row, the result's columns, then the counts.
      body: rendered cells, one list a row.
      seed_note: what the number of seeds allows to be said.
    """
    names = [row["name"] for row in result["rows"]]
    reports = {row["name"]: [_read(Path(run) / "report.json") for run in row["runs"]] for row in result["rows"]}
    curves = {row["name"]: [_curves(Path(run)) for run in row["runs"]] for row in result["rows"]}
    first = {name: runs[0] for name, runs in reports.items()}
    basis_row = result["baseline"] if result["baseline"] in first else names[0]
    basis = first[basis_row]
    unit = _unit(from_dict(Config, basis["config"]))
    best = [_best(result, column) for column in result["columns"]]
    page = _templates.get_template("table.html").render(
        title=f"{result['name']} at scale {result['scale']}",
        result=result,
        sentence=_table_sentence(result, basis),
        head=head,
        cells=[
            [{"text": text, "best": 0 < i <= len(best) and best[i - 1] == name} for i, text in enumerate(cells)]
            for name, cells in zip(names, body, strict=True)
        ],
        any_best=any(best),
        seed_note=_code(seed_note),
        differs_from=f"The config against {basis_row}'s"
        if basis_row == result["baseline"]
        else "The config against the table's base",
        rows=[_row(folder, row, result, first) for row in result["rows"]],
        curves=Markup(loss_curves(*({name: [pair[i] for pair in runs] for name, runs in curves.items()} for i in (0, 1)), unit)),
        curve_caption=_curve_caption(len(result["seeds"]), unit),
        spread=Markup(seed_spread([_spread_column(result, c) for c in result["columns"]], result["baseline"])),
        spread_caption=_spread_caption(len(result["seeds"]), result["baseline"]),
        budgets=[_budget(name, report["counts"], from_dict(Config, report["config"])) for name, report in first.items()],
        samples=[{"row": name, **report["sample"]} for name, report in first.items() if report["sample"]],
        corpora=[_corpus(manifest) for manifest in basis["corpora"]],
        held_out=_held_out(basis),
        machine=_machine(_read(Path(result["rows"][names.index(basis_row)]["runs"][0]) / "environment.json")),
    )
    return _write(folder, page)


# ------------------------------------------------------------------------------------------------------ files


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(folder: Path, page: str) -> Path:
    """Put the page in its place whole."""
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _curves(workdir: Path) -> tuple[Curve, Curve]:
    """(training, held-out) bits per byte of a run, nats of answers where it trained on tasks, as (steps, values)."""
    lines = read_lines(workdir / "metrics.jsonl")
    training = [(line["step"], line["bpb" if "bpb" in line else "body_nll"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["held_out_bpb"]) for line in lines if "held_out_bpb" in line]
    return tuple(([s for s, _ in pairs], [v for _, v in pairs]) for pairs in (training, held_out))


# ---------------------------------------------------------------------------------------------- words and numbers


def _seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 100 else f"{int(value // 60)} min {int(value % 60)} s"


def _size(count: float) -> str:
    """A count with three digits and its thousands named: 1.23M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:,.0f}"


def _show(value: Any) -> str:
    """A config value as --set takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "(empty)"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else "(empty)" if value == "" else str(value)


def _unit(config: Config) -> str:
    """What the training curve counts."""
    return "bits per byte" if config.tasks is None else "nats per answer token"


def _run_sentence(report: dict[str, Any], config: Config) -> str:
    model, data = config.model, config.data
    extras = []
    if config.meta_tokens is not None and config.tasks is None:
        extras.append(f"{config.meta_tokens.count(data.row_length)} meta-tokens in each row")
    if config.metadata is not None and config.metadata.position != "none":
        extras.append(f"metadata {config.metadata.template!r} before {config.metadata.keep:.0%} of the documents")
    return (
        f"A decoder of {model.layers} layers, width {model.width} and {_size(report['parameters']['total'])} parameters, trained for "
        f"{report['steps']:,} steps of {data.batch_rows} rows of {config.row_slots} slots on {', '.join(map(title, config.tasks.names)) if config.tasks else ', '.join(data.sources)}"
        f"{', with ' + ' and '.join(extras) if extras else ''}."
    )


def _table_sentence(result: dict[str, Any], report: dict[str, Any]) -> str:
    """What was compared: the summary, and what the baseline's run says was spent on it."""
    rows = len(result["rows"])
    return (
        f"{rows} row{'' if rows == 1 else 's'}: {result['summary']}. The baseline {result['baseline']} has "
        f"{_size(report['parameters']['total'])} parameters and {report['steps']:,} training steps; what every other row changes is listed below."
    )


def _condition(name: str, result: dict[str, Any]) -> dict[str, str]:
    title, meaning = CONDITIONS[name]
    return {"title": title, "meaning": meaning, "bpb": f"{result['bpb']:.3f}"}


def _held_out(report: dict[str, Any]) -> dict[str, str] | None:
    """What the evaluation was made on; every condition has the same documents. None: tasks alone."""
    result = next(iter(conditions(report["eval"]).values()), None)
    if result is None:
        return None
    return {"documents": f"{result['documents']:,}", "bytes": f"{result['body_bytes']:,}", "tokens": f"{result['body_tokens']:,}"}


def _corpus(manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        "spec": manifest["source"]["spec"],
        "tokenizer": manifest["tokenizer"]["spec"],
        "skipped": manifest["bad_records_skipped"],
        **{key: f"{manifest[key]:,}" for key in ("documents", "bytes", "tokens")},
    }


def _budget(name: str, counts: dict[str, float], config: Config) -> dict[str, Any]:
    """Shares of the training slots; what no part claims are ends of documents, and prompts where tasks are trained."""
    slots = counts["slots"] or 1
    other = max(0, slots - sum(counts[key] for key, _, _ in SLOT_PARTS))
    body, rest = ("body text", "ends of documents") if config.tasks is None else ("answers", "prompts")
    parts = [*((body if key == "body" else label, css, counts[key]) for key, label, css in SLOT_PARTS), (rest, "p5", other)]
    return {
        "name": name,
        "total": _size(counts["slots"]),
        "parts": [{"name": label, "css": css, "percent": f"{100 * count / slots:.1f}"} for label, css, count in parts],
    }


def _token_facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    counts = report["counts"]
    labels = {"slots": "slots", "loss_tokens": "tokens in the loss", **{key: label for key, label, _ in SLOT_PARTS}}
    facts = [(label, f"{counts[key]:,}") for key, label in labels.items()]
    return [*facts, ("bytes a body token", f"{report['bytes_per_token']:.2f}"), ("operations", f"{counts['flops']:.2e}")]


def _startup(startup: dict[str, float]) -> dict[str, Any]:
    """The phases as a staircase: each begins where the one before ended."""
    total, phases, before = startup["total"] or 1.0, [], 0.0
    for name, seconds in startup.items():
        if name != "total":
            share = 100 * seconds / total
            phase = {"name": PHASES.get(name, name), "seconds": _seconds(seconds)}
            phases.append(phase | {"before": f"{before:.1f}", "share": f"{share:.1f}"})
            before += share
    return {"total": _seconds(startup["total"]), "phases": phases}


def _time_facts(report: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    clock, restarted = report["time"], report["restarted_from"]
    facts = [("whole run, this process", _seconds(clock["total_seconds"])), ("training", _seconds(clock["train_seconds"]))]
    if clock["steps_here"] > 1:  # the first step is told apart: it waits for what the others find ready
        step = (clock["train_seconds"] - report["startup"].get("first_step", 0.0)) / (clock["steps_here"] - 1)
        facts.append(("a step, all included", _seconds(step)))
        facts.append(("slots a second", f"{config.data.batch_rows * config.row_slots / step:,.0f}"))
    return [
        *facts,
        ("waiting for data", f"{clock['data_wait_share']:.1%} of training"),
        ("held up by checkpoints", f"{clock['checkpoint_blocking_share']:.1%} of training"),
        (
            "restarts",
            f"resumed at step {restarted:,} of {report['steps']:,}" if restarted else "none: one process ran every step",
        ),
        ("parameters from", report["parent"] or "a fresh start"),
        ("warnings", str(len(report["warnings"])) if report["warnings"] else "none"),
    ]


def _parameter_facts(parameters: dict[str, int]) -> list[tuple[str, str]]:
    total = parameters["total"]
    parts = sorted(((k, v) for k, v in parameters.items() if k != "total"), key=lambda item: -item[1])
    return [*((name.replace("_", " "), f"{count:,} ({count / total:.1%})") for name, count in parts), ("total", f"{total:,}")]


def _code(text: str) -> Markup:
    """Escaped text, with what stands between backticks as code."""
    pieces = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(piece) if i % 2 else piece for i, piece in enumerate(pieces))


def _machine(found: dict[str, Any]) -> str:
    facts = dict(_environment_facts(found))
    return f"{facts['devices']}; jax {facts['jax']}, python {facts['python']}; git {facts['git']}"


def _environment_facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    devices, git = found["devices"], found["git"]
    state = {True: ", with uncommitted changes", False: "", None: ""}[git["dirty"]]
    return [
        ("started", found["started"]),
        ("command", " ".join(found["command"])),
        ("devices", f"{devices['count']} x {devices['kind']}, {devices['hosts']} host{'' if devices['hosts'] == 1 else 's'}"),
        ("processor cores", str(found["cpu_count"])),
        ("git", f"{git['commit']}{state}" if git["commit"] else "not a git checkout"),
        ("python", found["python"]),
        ("platform", found["platform"]),
        *found["libraries"].items(),
    ]


# ------------------------------------------------------------------------------------------------------ tables


def _row(folder: Path, row: dict[str, Any], result: dict[str, Any], first: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A row's difference to the baseline and the way to its runs' own reports."""
    links = [
        {"seed": seed, "href": quote(os.path.relpath(Path(run) / "report.html", folder))}
        for seed, run in zip(result["seeds"], row["runs"], strict=True)
    ]
    made = {"name": row["name"], "links": links, "unchanged": "nothing", "parameters": f"{row['parameters']:,} parameters"}
    if result["baseline"] not in first:  # the table was run without it: all there is, is what the row declares
        return made | {"changes": [f"{k} = {v}" for k, v in row["changes"].items()]}
    if row["name"] == result["baseline"]:
        return made | {"changes": [], "unchanged": "this is the baseline"}
    baseline, config = (from_dict(Config, first[name]["config"]) for name in (result["baseline"], row["name"]))
    more = row["parameters"] / first[result["baseline"]]["parameters"]["total"] - 1
    made["parameters"] += f", {more:+.1%} against {result['baseline']}" if more else f", as many as {result['baseline']}"
    changed = [
        (k, *v) for k, v in difference(baseline, config).items() if k not in ("name", "seed") and not k.startswith("runtime.")
    ]
    return made | {"changes": [f"{name}: {_show(then)} \N{RIGHTWARDS ARROW} {_show(now)}" for name, then, now in changed]}


def _numbers(row: dict[str, Any], column: dict[str, Any]) -> list[float]:
    return [v for v in row["values"][column["path"]] if v is not None]


def _best(result: dict[str, Any], column: dict[str, Any]) -> str | None:
    """The row with the best mean, where there are at least three seeds and its range touches no other row's."""
    sign = 1.0 if column["better"] == "lower" else -1.0
    rows = {row["name"]: [sign * v for v in _numbers(row, column)] for row in result["rows"]}
    rows = {name: values for name, values in rows.items() if values}
    if len(result["seeds"]) < 3 or len(rows) < 2:
        return None
    best = min(rows, key=lambda name: fmean(rows[name]))
    return best if all(max(rows[best]) < min(values) for name, values in rows.items() if name != best) else None


def _spread_column(result: dict[str, Any], column: dict[str, Any]) -> SpreadColumn:
    """A column's panel; columns whose paths end alike ("bpb") measure the same thing."""
    title = f"{column['title']} ({column['better']} is better)"
    return SpreadColumn(title, column["path"].rpartition(".")[2], {row["name"]: _numbers(row, column) for row in result["rows"]})


def _curve_caption(seeds: int, unit: str) -> str:
    if seeds == 1:
        return f"{unit.capitalize()} of each training batch (faint) and their moving average."
    return f"Moving averages of the training batches' {unit}: each of {seeds} seeds thin, their mean thick."


def _spread_caption(seeds: int, baseline: str) -> str:
    line = f"The dashed line is {baseline}."
    if seeds == 1:
        return f"One dot a row, because there is one seed: how far another seed would fall is not known. {line}"
    return f"A dot for each of {seeds} seeds, an upright stroke at their mean. {line}"
