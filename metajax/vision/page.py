"""report.html of a run on images: accuracies, curves of the losses, and what delta tokens look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metajax.config import ImageConfig, config_from
from metajax.core.fields import flatten
from metajax.reporting.figures import MARKERS, STYLE, WIDTH, look, loss_curves, to_svg
from metajax.reporting.html import (
    against,
    as_set,
    environment_facts,
    metrics,
    parameter_facts,
    seconds_text,
    short_count,
    templates,
    write_page,
)
from metajax.runs.files import find_readable, read_json
from metajax.vision.analysis_page import image_sections
from metajax.vision.task import DETAILS

CURVES = {
    "loss": "What is minimised, each step (faint) and its moving average.",
    "ad_triplet": "AAPL's adversarial triplet loss; equal deltas cost the margin of every anchor.",
}
FACTS = {
    "images": "images",
    "silhouette": "silhouette of deltas by augmentation",
    "silhouette_classes": "silhouette of deltas by class",
    "meta_silhouette": "silhouette of meta tokens by augmentation",
    "meta_silhouette_classes": "silhouette of meta tokens by class",
    "norm": "mean length of a delta",
    "dead_units": "meta-net units that are 0 for all these images",
}


def write_image_report(workdir: Path) -> Path:
    """Write report.html from what a complete run left in `workdir`, and return its path."""
    report = read_json(workdir / "report.json")
    config, results, details = config_from(report["config"]), report["eval"], find_readable(workdir / DETAILS)
    delta = results.get("delta")
    page = templates.get_template("image_run.html").render(
        title=f"{report['name']} (seed {report['seed']})",
        report=report,
        sentence=sentence(report, config),
        accuracies=accuracies(results),
        delta_facts=[(title, _number(delta[name])) for name, title in FACTS.items()] if delta else [],
        delta_figures=[(Markup(svg), caption) for svg, caption in delta_figures(details)] if details else [],
        curves=_curves(metrics(workdir, report)),
        sections=image_sections(workdir),
        time_facts=_time_facts(report),
        parameter_facts=parameter_facts(report["parameters"]) if report["parameters"]["total"] else [("total", "none")],
        sources=[source_line(found) for found in report["corpora"]],
        against=against(config),
        config=[(name, as_set(value)) for name, value in flatten(config).items()],
        environment_facts=environment_facts(find_readable(workdir / "environment.json")),
    )
    return write_page(workdir, page)


def sentence(report: dict[str, Any], config: ImageConfig) -> str:
    """What was trained, in words."""
    size, cfg, source = short_count(report["parameters"]["total"]), config.prompts, config.images.sources[0]
    if cfg is None:
        return f"A CLIP of {size} parameters, trained from its start for {report['steps']:,} steps of {config.images.batch} captioned images of {', '.join(config.images.sources)}."
    start = f"the CLIP of {config.weights or config.init.from_}"
    if not cfg.context:
        return f"Classes of {source} by templates alone, with {start}; nothing is trained."
    what = "base classes" if config.images.classes == "base" else "classes"
    return (
        f"{cfg.context} context vectors{' and a meta-net' if cfg.condition != 'none' else ''} ({size} parameters) trained beside {start}, "
        f"which stays as it is, for {report['steps']:,} steps on {config.images.shots or 'all'} images of each of the {what} of {source}."
    )


def accuracies(results: dict[str, Any]) -> list[list[str]]:
    """Rows of classes, accuracy, its interval and the number of test images."""
    rows = []
    for name, found in results.items():
        if isinstance(found, dict) and "accuracy" in found:
            interval = f"{found['low']:.1%} to {found['high']:.1%}"
            rows.append([name, f"{found['accuracy']:.1%}", interval, f"{found['images']:,}"])
    if "harmonic" in results:
        rows.append(["harmonic mean of base and new", f"{results['harmonic']:.1%}", "", ""])
    return rows


def source_line(found: dict[str, Any]) -> str:
    """A set of images as text, with the words that must stand beside its pictures."""
    splits = ", ".join(f"{count:,} {name}" for name, count in found["splits"].items())
    return f"{found['spec']}: {found['classes']} classes; images: {splits}. {found['attribution']}".strip()


def _number(value: float | None) -> str:
    return "nothing to tell apart" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _time_facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    clock = report["time"]
    facts = [
        ("whole run, this process", seconds_text(clock["total_seconds"])),
        ("training", seconds_text(clock["train_seconds"])),
    ]
    if clock["step_seconds"]:
        facts += [
            ("a step, all included", seconds_text(clock["step_seconds"])),
            ("images a second", f"{clock['images_per_second']:,.0f}"),
        ]
    facts += [
        ("evaluation", seconds_text(clock["evaluate_seconds"])),
        ("parameters from", report["parent"] or "a fresh start or a folder"),
    ]
    return [*facts, ("resumed at step", str(report["restarted_from"]) if report["restarted_from"] else "not resumed")]


def _curves(lines: list[dict[str, Any]]) -> list[tuple[Markup, str]]:
    drawn = []
    for name, caption in CURVES.items():
        curve = ([x["step"] for x in lines if name in x], [x[name] for x in lines if name in x])
        if curve[0]:
            drawn.append((Markup(loss_curves({name: [curve]}, unit=name.replace("_", " "))), caption))
    return drawn


# ------------------------------------------------------------------------------------------------------- figures


def delta_figures(details: dict[str, Any]) -> list[tuple[str, str]]:
    """(SVG, caption) of the deltas in two dimensions, by augmentation and by class, and of how well each augmentation stands apart."""
    names, pca, tsne = details["augmentations"], np.array(details["pca"]), details["tsne"]
    drawn = [
        (_scatter(pca, details["types"], names, "PCA"), "Delta tokens in their first two principal components, by augmentation."),
        (_scatter(np.array(tsne["points"]), tsne["types"], names, "t-SNE"), "The same by t-SNE (perplexity 10), fewer images."),
        (_scatter(pca, details["classes"], None, "PCA"), "The same components, by class."),
        (
            _bars(names, details["by_type"]),
            "Mean silhouette of each augmentation's deltas among all: the profile of augmentations.",
        ),
        (_matrix(names, details["pairs"]), "Silhouette of every two augmentations by themselves."),
    ]
    return drawn


def _scatter(points: np.ndarray, groups: list[int], names: list[str] | None, how: str) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        axes, handles = figure.add_subplot(), []
        for group in sorted(set(groups)):
            chosen = points[np.array(groups) == group]
            colour, marker = look(group)[0], MARKERS[group // 6 % len(MARKERS)]
            axes.plot(*chosen.T, marker, color=colour, markersize=3, alpha=0.7, linestyle="")
            if names is not None:
                handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", markersize=4, label=names[group]))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"{how} by {'augmentation' if names is not None else 'class'}")
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        return to_svg(figure, f"{how} of delta tokens")


def _bars(names: list[str], values: list[float]) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 0.24 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(range(len(names)), values, color=look(0)[0])
        axes.axvline(0, color="#8a8f98", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("silhouette")
        return to_svg(figure, "Silhouette of each augmentation's delta tokens")


def _matrix(names: list[str], values: list[list[float]]) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
        axes = figure.add_subplot()
        shown = axes.imshow(np.ma.masked_array(values, np.eye(len(names), dtype=bool)), cmap="viridis")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        figure.colorbar(shown, ax=axes, shrink=0.7)
        return to_svg(figure, "Silhouette of delta tokens for each pair of augmentations")
