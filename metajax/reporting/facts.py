"""Facts of runs that several pages show: parameters, time, environment, data, differences to the baseline, curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metajax import registry
from metajax.config import AnyConfig, Config, difference
from metajax.core.fields import flatten
from metajax.core.progress import warn
from metajax.reporting import page
from metajax.reporting.figures import Curve
from metajax.reporting.page import Part
from metajax.runs.directory import conditions
from metajax.runs.files import Damaged, find_readable, read_lines

Pairs = list[tuple[str, str]]
PARTS_OF_ROWS = (  # key of the counts, title, colour
    ("body", "body text", "p1"),
    ("metadata", "metadata", "p2"),
    ("meta_tokens", "meta-tokens", "p3"),
    ("padding", "padding", "p4"),
)
VALIDATION = "Each module, package or site is in one split only, so validation text is from sites without training text."
FILES = dict.fromkeys(("report.json", "metrics.jsonl", "config.json", "environment.json"), "")


def head(report: Mapping[str, Any]) -> dict[str, Any]:
    """Title, headings and warnings of a run's page, for `write_page`."""
    warnings = report["warnings"]
    return {
        "title": f"{report['name']} (seed {report['seed']})",
        "eyebrow": f"Run report · scale {report['scale']} · seed {report['seed']} · config {report['hash']}",
        "heading": report["name"],
        "notes": [page.group("warning", page.lines(warnings, ""), title=page.plural(len(warnings), "warning"))],
        "files": FILES,
    }


def foundation(workdir: Path, config: AnyConfig, sources: list[Part], *more: Part) -> list[Part]:
    """The last sections of a run's page: differences to the baseline, sources, config, environment."""
    found = against(config)
    sections = []
    if found:
        rows = [[page.code(text) for text in field] for field in found["fields"]]
        same = page.text("Nothing: every field that can change a number is the same.")
        differs = page.table(("field", "here", "there"), rows, "words") if rows else same
        sections.append(page.section(f"Differences from {found['name']}", differs))
    fields = [[page.code(name), page.code(page.as_set(value))] for name, value in flatten(config).items()]
    resolved = page.details("Resolved config", page.table((), fields, "words"))
    environment = page.details("Environment", page.facts(environment_facts(find_readable(workdir / "environment.json"))))
    return [*sections, page.section("What this rests on", page.group("card", *sources), resolved, environment, *more)]


def metrics(workdir: Path, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metrics of a complete run; none, with a warning, if its report was made from other metrics."""
    try:
        return read_lines(workdir / "metrics.jsonl", report.get("metrics"))
    except Damaged as error:
        warn(f"curves left out: {error}")
        return []


def curve_of(found: list[dict[str, Any]], *names: str) -> Curve:
    """(steps, values) of the first of these metrics that the lines have."""
    having = [(line, next((name for name in names if name in line), None)) for line in found]
    return [line["step"] for line, name in having if name], [line[name] for line, name in having if name]


def curves(workdir: Path, report: Mapping[str, Any]) -> tuple[Curve, Curve]:
    """(training, validation) curves: bits per byte, nats of answers if the run trained on tasks, or the loss on images."""
    found = metrics(workdir, report)
    return curve_of([line for line in found if "loss" in line], "bpb", "body_nll", "loss"), curve_of(found, "validation_bpb")


def curve_unit(config: AnyConfig) -> str:
    """The unit of the training curve."""
    if not isinstance(config, Config):
        return "loss"
    return "bits per byte" if config.tasks is None else "nats per answer token"


def against(config: AnyConfig) -> dict[str, Any] | None:
    """Fields that differ from the baseline of the run's table, or from the experiment of its name; None if neither exists."""
    experiment = registry.experiments().get(config.name)
    if experiment is None or config.scale not in experiment.scales:
        return None
    table, row, baseline = experiment.table, experiment.row, experiment.build(config.scale)
    if table is not None and table.baseline is not None:
        part = experiment.name.removeprefix(f"{table.name}/{row.name}").strip("/")
        compared = next(row for row in table.rows if row.name == table.baseline)
        if part in table.parts_of(compared, config.scale):  # the baseline in the same part
            baseline = table.config(compared, config.scale, part)
    fields = [(name, *map(page.as_set, values)) for name, values in changed(config, baseline).items()]
    return {"name": baseline.name, "fields": fields}


def changed(config: AnyConfig, other: AnyConfig, *left_out: str) -> dict[str, tuple[Any, Any]]:
    """The differing fields that can change a result, with both values."""
    found = difference(config, other).items()
    return {name: pair for name, pair in found if name not in ("name", "seed", *left_out) and not name.startswith("runtime.")}


def sources(report: Mapping[str, Any]) -> list[Part]:
    """The corpora or image sets of a run, with attribution for images, and the documents of its evaluation."""
    shown = []
    for found in report["corpora"]:
        if "splits" in found:
            splits = ", ".join(f"{count:,} {name}" for name, count in found["splits"].items())
            shown.append(f"{found['spec']}: {found['classes']} classes; images: {splits}. {found['attribution']}".strip())
        else:
            bad = f"; {found['bad_records_skipped']} bad records left out" * bool(found["bad_records_skipped"])
            counts = f"{found['documents']:,} documents, {found['bytes']:,} bytes, {found['tokens']:,} tokens"
            shown.append(f"{found['source']['spec']}: {counts} with {found['tokenizer']['spec']}{bad}.")
    for result in list(conditions(report["eval"]).values())[:1]:  # all conditions share their documents
        size = f"{result['body_bytes']:,} bytes, {result['body_tokens']:,} body tokens"
        shown.append(f"Evaluated on {result['documents']:,} validation documents: {size}. {VALIDATION}")
    return [page.text(line) for line in shown]


def budget(name: str, counts: Mapping[str, float], config: Config) -> dict[str, Any]:
    """Shares of the training positions as a row of bars. The rest are ends of documents and, with tasks, prompts."""
    total = counts["positions"] or 1
    other = max(0, total - sum(counts[key] for key, _, _ in PARTS_OF_ROWS))
    body, rest = ("body text", "ends of documents") if config.tasks is None else ("answers", "prompts")
    rest = "rejected answers, ends" if config.dpo is not None else rest
    parts = [*((body if key == "body" else label, css, counts[key]) for key, label, css in PARTS_OF_ROWS), (rest, "p5", other)]
    shares = [{"name": label, "css": css, "percent": f"{100 * count / total:.1f}"} for label, css, count in parts]
    return {"name": name, "total": f"{page.short_count(counts['positions'])} positions", "parts": shares}


def time_facts(report: Mapping[str, Any]) -> Pairs:
    """The first facts of a run's time, for both families."""
    names = {"whole run, this process": "total_seconds", "training": "train_seconds"}
    return [(words, page.seconds_text(report["time"][key])) for words, key in names.items()]


def parameter_facts(parameters: Mapping[str, int]) -> Pairs:
    total = parameters["total"]
    parts = sorted(((k, v) for k, v in parameters.items() if k != "total"), key=lambda item: -item[1])
    shares = [(name.replace("_", " "), f"{count:,} ({count / total:.1%})") for name, count in parts]
    return [*shares, ("total", f"{total:,}" if total else "none")]


def environment_facts(found: Mapping[str, Any] | None) -> Pairs:
    """Machine and versions of a run; none if the file is missing or damaged."""
    if found is None:
        return []
    devices, git = found["devices"], found["git"]
    state = ", with uncommitted changes" * bool(git["dirty"])
    return [
        ("started", found["started"]),
        ("command", " ".join(found["command"])),
        ("devices", f"{devices['count']} x {devices['kind']}, {page.plural(devices['hosts'], 'host')}"),
        ("processor cores", str(found["cpu_count"])),
        ("git", f"{git['commit']}{state}" if git["commit"] else "not a git checkout"),
        ("python", found["python"]),
        ("platform", found["platform"]),
        *found["libraries"].items(),
    ]
