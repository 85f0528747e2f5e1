"""report.html of a run on text, and the page of a run's analyses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from metajax.config import Config, Metadata, Switch
from metajax.core.fields import from_dict
from metajax.reporting import facts, page
from metajax.reporting.figures import loss_curves
from metajax.reporting.page import Part
from metajax.reporting.tasks import CHOICE_HEAD, HEAD, accuracy_figure, choice_rows, table_rows, title
from metajax.runs.directory import conditions, read_config
from metajax.runs.files import read_json

CONDITIONS = {  # condition of the evaluation: title, what the model was shown
    "none": ("No metadata", "The model sees only the body."),
    "right": ("Right metadata", "Each document comes with its own metadata, where training had it."),
    "empty": ("Empty metadata", "Each document comes with an empty pair of delimiters."),
    "shuffled": ("Shuffled metadata", "Each document comes with another document's metadata."),
}
PHASES = {"data": "open data", "init": "build model", "first_step": "first step"}
ACCURACY = (
    "Share of test examples whose whole answer is right, with its 95 % interval. Dashed: chance; the vertical line is the longest example "
    "in training."
)
LIKELIHOOD = "By the likelihood of the answers: of their tokens together (acc), per character (acc_norm); ± is one standard error over questions."
PREFERENCES = (
    "In {accuracy:.1%} ({low:.1%} to {high:.1%}) of {pairs} validation pairs the chosen answer gains on the rejected one, relative to the "
    "reference; mean margin {margin:.3f}, reward of the chosen answer {chosen_reward:.3f}."
)
LOWER = (
    "Lower is better. Only body text counts; metadata and meta-tokens are context. One run has no spread, so it ranks nothing."
)
LOOKS = {"metadata": "context", "meta-token": "meta", "": ""}  # kind of a piece of a row: its look


def write_run_report(workdir: Path, analyses: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write report.html from the files of a complete run in `workdir`, and return its path.

    Args:
      analyses: from `metajax.analysis.Analyses.sections`.

    Raises:
      UserError: report.json is missing or damaged.
    """
    report = read_json(workdir / "report.json")
    config = from_dict(Config, report["config"])
    time = page.facts(_time_facts(report, config), "Time")
    parameters = page.facts(facts.parameter_facts(report["parameters"]), "Parameters")
    manifest = page.text(json.dumps(report["corpora"], indent=1, ensure_ascii=False), "text")
    return page.write_page(
        workdir / "report.html",
        **facts.head(report),
        sentence=_sentence(report, config),
        sections=[
            *_results(report["eval"], config),
            *map(page.analysis_section, analyses),
            _training(workdir, report, config),
            page.section("What happened", page.group("wide-cards", _startup(report["startup"]), time, parameters)),
            _sample(report["sample"]),
            _rows(report),
            *facts.foundation(workdir, config, facts.sources(report), page.details("Corpus manifest", manifest)),
        ],
    )


def write_analysis_page(workdir: Path, analyses: Sequence[Mapping[str, Any]]) -> Path:
    """Write WORKDIR/analysis/analysis.html with every analysis of the run, and return its path."""
    config = read_config(workdir)
    return page.write_page(
        workdir / "analysis" / "analysis.html",
        title=f"{config.name} (seed {config.seed}): analyses",
        eyebrow=f"Analyses · scale {config.scale} · seed {config.seed}",
        heading=config.name,
        sentence="Analyses of this run's newest checkpoint. One model: its spread over prompts says nothing about other seeds.",
        sections=[page.analysis_section(found) for found in analyses],
        files={f"{found['name']}.json": "" for found in analyses},
    )


def _sentence(report: Mapping[str, Any], config: Config) -> str:
    """A sentence on what was trained."""
    model, data = config.model, config.data
    extras = []
    if config.meta_tokens is not None and config.tasks is None:
        extras.append(f"{config.meta_tokens.count(data.sequence_length)} meta-tokens in each row")
    if config.metadata is not None and config.metadata.position != "none":
        extras.append(_metadata_words(config.metadata))
    learned = ", ".join(map(title, config.tasks.names) if config.tasks else data.sources)
    size = f"{model.layers} layers, width {model.width} and {page.short_count(report['parameters']['total'])} parameters"
    steps = f"{report['steps']:,} steps of {data.batch_size} rows of {config.row_positions} positions"
    more = ", with " * bool(extras) + " and ".join(extras) + _switch_words(data.switch)
    return f"A decoder of {size}, trained for {steps} on {learned}{more}."


def _metadata_words(recipe: Metadata) -> str:
    what = f"{recipe.tokens} learnable tokens" if recipe.tokens else f"metadata {recipe.template!r}"
    whose = " of another document" if recipe.assigned == "shuffled" else ""
    return f"{what}{whose} in {recipe.keep:.0%} of the documents (position: {recipe.position})"


def _switch_words(switch: Switch | None) -> str:
    if switch is None:
        return ""
    changes = ["with other weights of the sources"] if switch.weights else []
    changes += ["without metadata"] if switch.metadata == "none" else []
    changes += ["on documents not read before"] if switch.unseen else []
    return f"; from step {switch.step:,} on {', '.join(changes) or 'as before'}"


def _results(results: Mapping[str, Any], config: Config) -> list[Part]:
    """Accuracy on tasks, multiple choice, preferences and bits per byte, if they were evaluated."""
    tasks, choice, pairs = (results.get(name) for name in ("tasks", "choice", "preferences"))
    shown: list[Part] = []
    if tasks:
        drawn = page.figure(accuracy_figure(tasks, config.tasks), ACCURACY)
        both = page.group("wide-cards", drawn, page.table(HEAD, table_rows(tasks)))
        shown.append(page.section("Accuracy on the tasks", both))
    if choice:
        scored = page.table(CHOICE_HEAD, choice_rows(choice))
        shown.append(page.section("Multiple choice", scored, page.text(LIKELIHOOD, "soft small")))
    if pairs:
        shown.append(page.section("Preferences", page.text(PREFERENCES.format(**pairs))))
    cards = []
    for name, result in conditions(results).items():
        words, meaning = CONDITIONS.get(name, (name, ""))
        number = Markup('{:.3f} <span class="unit">bits/byte</span>').format(result["bpb"])
        parts = page.text(words, "eyebrow"), page.text(number, "number"), page.text(meaning, "soft small")
        cards.append(page.group("card", *parts))
    if cards:
        remark = page.text(LOWER, "soft small")
        shown.append(page.section("Validation bits per byte", page.group("cards", *cards), remark))
    return shown


def _training(workdir: Path, report: Mapping[str, Any], config: Config) -> Part:
    unit, counts = facts.curve_unit(config), report["counts"]
    training, validation = ({"training text": [curve]} for curve in facts.curves(workdir, report))
    caption = (
        f"{unit.capitalize()} of each training batch (faint) and their moving average. Training text, so not exactly comparable with the "
        "validation numbers."
    )
    labels = {"positions": "positions", "loss_tokens": "tokens in the loss"}
    labels |= {key: label for key, label, _ in facts.PARTS_OF_ROWS}
    tokens = [(label, f"{counts[key]:,}") for key, label in labels.items()]
    tokens += [("bytes a body token", f"{report['bytes_per_token']:.2f}"), ("operations", f"{counts['flops']:.2e}")]
    shares = page.bars([facts.budget("all", counts, config)])
    used = page.group("card", shares, {"kind": "facts", "pairs": tokens}, title="Use of the positions")
    return page.section("Training", page.group("wide-cards", page.figure(loss_curves(training, validation, unit), caption), used))


def _startup(startup: Mapping[str, float]) -> Part:
    """The phases of the start-up as a staircase: each begins where the previous one ends."""
    total, rows, before = startup["total"] or 1.0, [], 0.0
    for name, seconds in startup.items():
        if name != "total":
            share = 100 * seconds / total
            parts = [{"name": "", "css": css, "percent": f"{part:.1f}"} for css, part in (("", before), ("p1", share))]
            rows.append({"name": PHASES.get(name, name), "total": page.seconds_text(seconds), "parts": parts})
            before += share
    title = f"From command to first step: {page.seconds_text(startup['total'])}"
    return page.group("card", page.bars(rows, keys=False), title=title)


def _time_facts(report: Mapping[str, Any], config: Config) -> facts.Pairs:
    clock, restarted, found = report["time"], report["restarted_from"], facts.time_facts(report)
    if clock["steps_here"] > 1:  # without the first step, which also waits for the start of the pipeline
        step = (clock["train_seconds"] - report["startup"].get("first_step", 0.0)) / (clock["steps_here"] - 1)
        found.append(("a step, all included", page.seconds_text(step)))
        found.append(("positions a second", f"{config.data.batch_size * config.row_positions / step:,.0f}"))
    resumed = f"resumed at step {restarted:,} of {report['steps']:,}" if restarted else "none: one process ran every step"
    found += [
        ("waiting for data", f"{clock['data_wait_share']:.1%} of training"),
        ("blocked by checkpoints", f"{clock['checkpoint_blocking_share']:.1%} of training"),
        ("restarts", resumed),
    ]
    if goodput := report.get("goodput"):  # of all starts; older runs have neither goodput nor memory
        shares = {kind: share for kind, share in goodput.items() if kind not in ("productive", "seconds", "starts")}
        apart = sorted(shares.items(), key=lambda item: -item[1])
        spent = ", ".join(f"{kind.replace('_', ' ')} {share:.1%}" for kind, share in apart if share >= 0.0005)
        time = f"{page.seconds_text(goodput['seconds'])} in {page.plural(goodput['starts'], 'start')}"
        found.append(("goodput", f"{goodput['productive']:.1%} of {time} ({spent})"))
    if memory := report.get("memory"):
        found.append(("peak device memory", f"{memory['hbm_gib']:.2f} GiB ({memory['hbm_share']:.0%})"))
    found.append(("parameters from", report["parent"] or "a fresh start"))
    return [*found, ("warnings", str(len(report["warnings"]) or "none"))]


def sample_pieces(sample: Mapping[str, Any]) -> Part:
    """A generated text after its context and prompt."""
    context = [(f"{sample['context']}\n", "context")] if sample["context"] else []
    return page.pieces([*context, (sample["prompt"], "given"), (sample["continuation"], "made")])


def document_pieces(sample: Mapping[str, Any]) -> Part:
    """The document whose beginning was the prompt."""
    return page.pieces([(sample["prompt"], "given"), (sample["document"], "")])


def _sample(sample: Mapping[str, Any] | None) -> Part:
    if not sample:
        return None
    remark = "The beginning of a validation document (grey), continued by the model (marked) and by its author."
    remark += " Its metadata (coloured) comes first, as in training." if sample["context"] else ""
    model = page.group("card", sample_pieces(sample), title="The model")
    document = page.group("card", document_pieces(sample), title="The document")
    return page.section("A text sample", page.text(remark, "soft small"), page.group("wide-cards", model, document))


def _rows(report: Mapping[str, Any]) -> Part:
    """The first training rows, decoded."""
    if not report.get("rows"):
        return None
    cards = []
    for row in report["rows"]:
        spans = ([(text, f"{LOOKS.get(kind, '')} {'given' * silent}") for text, kind, silent in one["pieces"]] for one in row)
        cards.append(page.group("card", *(page.pieces(of_document, "document") for of_document in spans)))
    look = '<span class="text"><span class="{}">{}</span></span>'
    legend = Markup(
        f"The beginning of the first rows of training, decoded: {look.format('context', 'metadata')}, {look.format('meta', 'meta-tokens')}, and "
        f"{look.format('given', 'grey')} at positions without loss. A line separates documents. All of a row: {{}}."
    ).format(page.code(f"show {report['name']} --rows 2"))
    return page.section("What the model saw", page.text(legend, "soft small"), page.group("wide-cards", *cards))
