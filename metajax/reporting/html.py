"""report.html of a run, one file: no script, nothing fetched, figures inside; and what the page of a table shares with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from metajax import registry
from metajax.config import AnyConfig, Config, Metadata, Switch, difference
from metajax.core.atomic import write_text
from metajax.core.fields import flatten, from_dict
from metajax.core.progress import warn
from metajax.reporting import choices
from metajax.reporting.analysis_sections import sections
from metajax.reporting.figures import Curve, loss_curves
from metajax.reporting.tasks import HEAD, accuracy_figure, table_rows, title
from metajax.runs.directory import conditions, read_config
from metajax.runs.files import Damaged, find_readable, read_json, read_lines

CONDITIONS = {  # of the evaluation: title, what the model was shown
    "none": ("No metadata", "The model sees the body alone."),
    "right": ("Right metadata", "Each document comes with its own metadata, where training had it."),
    "empty": ("Empty metadata", "Each document comes with an empty pair of delimiters."),
    "shuffled": ("Shuffled metadata", "Each document comes with another document's metadata."),
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

templates = Environment(
    loader=PackageLoader("metajax.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def write_run_report(workdir: Path) -> Path:
    """Write report.html from what a complete run left in `workdir`, and return its path.

    Raises:
      UserError: no report.json there, or a damaged one.
    """
    report = read_json(workdir / "report.json")
    config = from_dict(Config, report["config"])
    curve, held_out_curve = curves(workdir, report)
    unit, tasks = curve_unit(config), report["eval"].get("tasks")
    page = templates.get_template("run.html").render(
        title=f"{report['name']} (seed {report['seed']})",
        report=report,
        sentence=_run_sentence(report, config),
        conditions=[_condition(name, result) for name, result in conditions(report["eval"]).items()],
        tasks=tasks and {"head": HEAD, "rows": table_rows(tasks), "figure": Markup(accuracy_figure(tasks, config.tasks))},
        preferences=report["eval"].get("preferences"),
        choices=_choices(report["eval"].get("choice")),
        analyses=sections(workdir) if report.get("analyses") else [],
        curve=Markup(loss_curves({"training text": [curve]}, {"training text": [held_out_curve]}, unit)),
        curve_caption=f"{unit.capitalize()} of each training batch (faint) and their moving average. Training text, so not comparable "
        "with the held-out numbers to the last digit.",
        budget=budget("all", report["counts"], config),
        token_facts=_token_facts(report),
        startup=_startup(report["startup"]),
        time_facts=_time_facts(report, config),
        parameter_facts=parameter_facts(report["parameters"]),
        corpora=[corpus(manifest) for manifest in report["corpora"]],
        held_out=held_out(report),
        rows=report.get("rows"),
        against=against(config),
        config=[(name, as_set(value)) for name, value in flatten(config).items()],
        environment_facts=environment_facts(find_readable(workdir / "environment.json")),
        manifest=json.dumps(report["corpora"], indent=1, ensure_ascii=False),
    )
    return write_page(workdir, page)


def write_analysis_page(workdir: Path) -> Path:
    """Write WORKDIR/analysis/analysis.html with every analysis that has been made there, and return its path."""
    config, path = read_config(workdir), workdir / "analysis" / "analysis.html"
    page = templates.get_template("analysis.html").render(
        title=f"{config.name} (seed {config.seed}): analyses", config=config, sections=sections(workdir)
    )
    write_text(path, page)
    return path


# ------------------------------------------------------------------------------------------------------ files


def write_page(folder: Path, page: str) -> Path:
    """Put the page in its place whole."""
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _choices(results: dict[str, Any] | None) -> dict[str, Any] | None:
    return results and {"head": choices.HEAD, "rows": choices.table_rows(results)}


def metrics(workdir: Path, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metrics of a complete run; none, and a line that says so, where they are not those that its report was made of."""
    try:
        return read_lines(workdir / "metrics.jsonl", report.get("metrics"))
    except Damaged as error:
        warn(f"curves left out: {error}")
        return []


def curves(workdir: Path, report: Mapping[str, Any]) -> tuple[Curve, Curve]:
    """(training, held-out) bits per byte of a run, nats of answers where it trained on tasks, the loss on images, as (steps, values)."""
    lines = metrics(workdir, report)
    training = [(line["step"], line.get("bpb", line.get("body_nll", line["loss"]))) for line in lines if "loss" in line]
    held_out = [(line["step"], line["held_out_bpb"]) for line in lines if "held_out_bpb" in line]
    return tuple(([s for s, _ in pairs], [v for _, v in pairs]) for pairs in (training, held_out))


def against(config: AnyConfig) -> dict[str, Any] | None:
    """The fields that differ from the baseline of the run's table, or from the experiment of its name; None where there is no such."""
    experiment = registry.experiments().get(config.name)
    if experiment is None or config.scale not in experiment.scales:
        return None
    baseline = _baseline(experiment, config.scale)
    changed = {
        k: v for k, v in difference(config, baseline).items() if k not in ("name", "seed") and not k.startswith("runtime.")
    }
    return {"name": baseline.name, "fields": [(k, *map(as_set, values)) for k, values in changed.items()]}


def _baseline(experiment: registry.Experiment, scale: str) -> AnyConfig:
    """The config of the table's baseline in the same part, or the experiment's own."""
    table, row = experiment.table, experiment.row
    if table is not None and table.baseline is not None:
        part = experiment.name.removeprefix(f"{table.name}/{row.name}").strip("/")
        compared = next(row for row in table.rows if row.name == table.baseline)
        if part in table.parts_of(compared, scale):
            return table.config(compared, scale, part)
    return experiment.build(scale)


# ---------------------------------------------------------------------------------------------- words and numbers


def seconds_text(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 100 else f"{int(value // 60)} min {int(value % 60)} s"


def short_count(count: float) -> str:
    """A count with three digits and its thousands named: 1.23M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:,.0f}"


def as_set(value: Any) -> str:
    """A config value as --set takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "(empty)"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else "(empty)" if value == "" else str(value)


def curve_unit(config: AnyConfig) -> str:
    """What the training curve counts."""
    if not isinstance(config, Config):
        return "loss"
    return "bits per byte" if config.tasks is None else "nats per answer token"


def _run_sentence(report: dict[str, Any], config: Config) -> str:
    model, data = config.model, config.data
    extras = []
    if config.meta_tokens is not None and config.tasks is None:
        extras.append(f"{config.meta_tokens.count(data.row_length)} meta-tokens in each row")
    if config.metadata is not None and config.metadata.position != "none":
        extras.append(_metadata_words(config.metadata))
    return (
        f"A decoder of {model.layers} layers, width {model.width} and {short_count(report['parameters']['total'])} parameters, trained for "
        f"{report['steps']:,} steps of {data.batch_rows} rows of {config.row_slots} slots on {', '.join(map(title, config.tasks.names)) if config.tasks else ', '.join(data.sources)}"
        f"{', with ' + ' and '.join(extras) if extras else ''}{_switch_words(data.switch)}."
    )


def _metadata_words(recipe: Metadata) -> str:
    what = f"{recipe.tokens} learnable tokens" if recipe.tokens else f"metadata {recipe.template!r}"
    whose = " of another document" if recipe.assigned == "shuffled" else ""
    where = {"prepend": "before", "append": "after", "both": "before and after"}.get(
        recipe.position, f"at position {recipe.position!r} of"
    )
    return f"{what}{whose} {where} {recipe.keep:.0%} of the documents"


def _switch_words(switch: Switch | None) -> str:
    if switch is None:
        return ""
    changes = ["with other weights of the sources"] if switch.weights else []
    changes += ["without metadata"] if switch.metadata == "none" else []
    changes += ["of documents not read before"] if switch.unseen else []
    return f"; from step {switch.step:,} on {', '.join(changes) or 'as before'}"


def _condition(name: str, result: dict[str, Any]) -> dict[str, str]:
    title, meaning = CONDITIONS[name]
    return {"title": title, "meaning": meaning, "bpb": f"{result['bpb']:.3f}"}


def held_out(report: dict[str, Any]) -> dict[str, str] | None:
    """What the evaluation was made on; every condition has the same documents. None: tasks alone."""
    result = next(iter(conditions(report["eval"]).values()), None)
    if result is None:
        return None
    return {"documents": f"{result['documents']:,}", "bytes": f"{result['body_bytes']:,}", "tokens": f"{result['body_tokens']:,}"}


def corpus(manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        "spec": manifest["source"]["spec"],
        "tokenizer": manifest["tokenizer"]["spec"],
        "skipped": manifest["bad_records_skipped"],
        **{key: f"{manifest[key]:,}" for key in ("documents", "bytes", "tokens")},
    }


def budget(name: str, counts: dict[str, float], config: Config) -> dict[str, Any]:
    """Shares of the training slots; what no part claims are ends of documents, and prompts where tasks are trained."""
    slots = counts["slots"] or 1
    other = max(0, slots - sum(counts[key] for key, _, _ in SLOT_PARTS))
    body, rest = ("body text", "ends of documents") if config.tasks is None else ("answers", "prompts")
    rest = "rejected answers, ends" if config.dpo is not None else rest
    parts = [*((body if key == "body" else label, css, counts[key]) for key, label, css in SLOT_PARTS), (rest, "p5", other)]
    return {
        "name": name,
        "total": short_count(counts["slots"]),
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
            phase = {"name": PHASES.get(name, name), "seconds": seconds_text(seconds)}
            phases.append(phase | {"before": f"{before:.1f}", "share": f"{share:.1f}"})
            before += share
    return {"total": seconds_text(startup["total"]), "phases": phases}


def _time_facts(report: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    clock, restarted = report["time"], report["restarted_from"]
    facts = [
        ("whole run, this process", seconds_text(clock["total_seconds"])),
        ("training", seconds_text(clock["train_seconds"])),
    ]
    if clock["steps_here"] > 1:  # the first step is told apart: it waits for what the others find ready
        step = (clock["train_seconds"] - report["startup"].get("first_step", 0.0)) / (clock["steps_here"] - 1)
        facts.append(("a step, all included", seconds_text(step)))
        facts.append(("slots a second", f"{config.data.batch_rows * config.row_slots / step:,.0f}"))
    return [
        *facts,
        ("waiting for data", f"{clock['data_wait_share']:.1%} of training"),
        ("held up by checkpoints", f"{clock['checkpoint_blocking_share']:.1%} of training"),
        (
            "restarts",
            f"resumed at step {restarted:,} of {report['steps']:,}" if restarted else "none: one process ran every step",
        ),
        *_goodput_facts(report),
        ("parameters from", report["parent"] or "a fresh start"),
        ("warnings", str(len(report["warnings"])) if report["warnings"] else "none"),
    ]


def _goodput_facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the time of all starts went, and the memory that the devices tell of; runs of before this was counted have neither."""
    goodput, memory = report.get("goodput"), report.get("memory")
    facts = []
    if goodput:
        apart = sorted(
            ((k, v) for k, v in goodput.items() if k not in ("productive", "seconds", "starts")), key=lambda item: -item[1]
        )
        spent = ", ".join(f"{kind.replace('_', ' ')} {share:.1%}" for kind, share in apart if share >= 0.0005)
        starts = f"{goodput['starts']} start{'' if goodput['starts'] == 1 else 's'}"
        facts.append(("goodput", f"{goodput['productive']:.1%} of {seconds_text(goodput['seconds'])} in {starts} ({spent})"))
    if memory:
        facts.append(("device memory at its peak", f"{memory['hbm_gib']:.2f} GiB ({memory['hbm_share']:.0%})"))
    return facts


def parameter_facts(parameters: dict[str, int]) -> list[tuple[str, str]]:
    total = parameters["total"]
    parts = sorted(((k, v) for k, v in parameters.items() if k != "total"), key=lambda item: -item[1])
    return [*((name.replace("_", " "), f"{count:,} ({count / total:.1%})") for name, count in parts), ("total", f"{total:,}")]


def with_code(text: str) -> Markup:
    """Escaped text, with what stands between backticks as code."""
    pieces = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(piece) if i % 2 else piece for i, piece in enumerate(pieces))


def environment_facts(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What a run was made with; none where its file is missing or damaged."""
    if found is None:
        return []
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
