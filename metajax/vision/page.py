"""report.html of a run on images: accuracies, delta tokens, loss curves, analyses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from metajax.config import config_from
from metajax.reporting import facts, page
from metajax.reporting.figures import MARKERS, look, loss_curves, styled, to_svg
from metajax.reporting.panels import panels
from metajax.runs.files import find_readable, read_json
from metajax.vision.analyses import image_analysis
from metajax.vision.config import ImageConfig
from metajax.vision.task import DETAILS

CURVES = {
    "loss": "The loss of each step (faint) and its moving average.",
    "ad_triplet": "AAPL's adversarial triplet loss; when all deltas are equal, each anchor costs the margin.",
}
DELTA_FACTS = {
    "images": "images",
    "silhouette": "silhouette of deltas by augmentation",
    "silhouette_classes": "silhouette of deltas by class",
    "meta_silhouette": "silhouette of instance tokens by augmentation",
    "meta_silhouette_classes": "silhouette of instance tokens by class",
    "norm": "mean length of a delta",
    "dead_units": "share of meta-net units that are 0 for all these images",
}
INTERVALS = "Intervals are over the test images (Wilson); they do not include the spread over seeds."
DELTAS = (
    "The change that an augmentation makes to the instance token of an image, for test images of the first classes. "
    "A silhouette near 1 means separate groups; near 0 or below, they are not separate."
)


def write_image_report(workdir: Path) -> Path:
    """Write report.html from the files of a complete run in `workdir`, and return its path."""
    report = read_json(workdir / "report.json")
    config, results, found = config_from(report["config"]), report["eval"], facts.metrics(workdir, report)
    curves = {name: facts.curve_of(found, name) for name in CURVES}
    drawn = [(loss_curves({n: [c]}, unit=n.replace("_", " ")), CURVES[n]) for n, c in curves.items() if c[0]]
    head = ("classes", "accuracy", "95 % interval", "test images")
    times = page.facts(_time_facts(report), "Time")
    parameters = page.facts(facts.parameter_facts(report["parameters"]), "Trained parameters")
    sections = [
        page.section("Accuracy", page.table(head, _accuracies(results)), page.text(INTERVALS, "soft small")),
        _deltas(results.get("delta"), find_readable(workdir / DETAILS)),
        page.section("Training", page.figures(drawn), page.group("wide-cards", times, parameters)),
        *map(page.analysis_section, image_analysis.sections(workdir)),
        *facts.foundation(workdir, config, facts.sources(report)),
    ]
    sentence = _sentence(report, config)
    return page.write_page(workdir / "report.html", **facts.head(report), sentence=sentence, sections=sections)


def _sentence(report: Mapping[str, Any], config: ImageConfig) -> str:
    """A sentence on what was trained."""
    size, cfg, images = page.short_count(report["parameters"]["total"]), config.prompts, config.images
    steps = f"for {report['steps']:,} steps"
    if cfg is None:
        trained = f"A CLIP of {size} parameters, trained from scratch {steps}"
        return f"{trained} of {images.batch} captioned images of {', '.join(images.sources)}."
    start = f"the CLIP of {config.weights or config.init.from_}"
    if not cfg.context:
        return f"Zero-shot classes of {images.sources[0]} from templates, with {start}; nothing is trained."
    learned = f"{cfg.context} context vectors{' and a meta-net' if cfg.condition != 'none' else ''} ({size} parameters)"
    classes = f"{'base ' if images.classes == 'base' else ''}classes of {images.sources[0]}"
    return f"{learned} trained on {start}, which is frozen, {steps} on {images.shots or 'all'} images of each of the {classes}."


def _accuracies(results: Mapping[str, Any]) -> list[list[str]]:
    """Rows of classes, accuracy, its interval and the number of test images."""
    found = {name: one for name, one in results.items() if isinstance(one, dict) and "accuracy" in one}
    rows = [
        [name, f"{one['accuracy']:.1%}", f"{one['low']:.1%} to {one['high']:.1%}", f"{one['images']:,}"]
        for name, one in found.items()
    ]
    mean = results.get("harmonic")
    return rows if mean is None else [*rows, ["harmonic mean of base and new", f"{mean:.1%}", "", ""]]


def _deltas(delta: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not delta:
        return None
    pairs = page.facts((words, _number(delta[name])) for name, words in DELTA_FACTS.items())
    figures = page.figures(delta_figures(found)) if found else None
    return page.section("Delta tokens", page.text(DELTAS, "soft small"), pairs, figures)


def _number(value: float | None) -> str:
    return "nothing to separate" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _time_facts(report: Mapping[str, Any]) -> facts.Pairs:
    clock, found, restarted = report["time"], facts.time_facts(report), report["restarted_from"]
    if clock["step_seconds"]:
        found.append(("a step, all included", page.seconds_text(clock["step_seconds"])))
        found.append(("images a second", f"{clock['images_per_second']:,.0f}"))
    found.append(("evaluation", page.seconds_text(clock["evaluate_seconds"])))
    found.append(("parameters from", report["parent"] or "a fresh start or a folder"))
    return [*found, ("resumed at step", str(restarted) if restarted else "not resumed")]


# ------------------------------------------------------------------------------------------------------- figures


def delta_figures(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(SVG, caption) of the deltas in two dimensions by augmentation and by class, and of each augmentation's silhouette."""
    names, pca, tsne = found["augmentations"], np.array(found["pca"]), found["tsne"]
    with styled():
        return [
            (
                _scatter(pca, found["types"], names, "PCA"),
                "Delta tokens in their first two principal components, by augmentation.",
            ),
            (
                _scatter(np.array(tsne["points"]), tsne["types"], names, "t-SNE"),
                "The same by t-SNE (perplexity 10), fewer images.",
            ),
            (_scatter(pca, found["classes"], None, "PCA"), "The same components, by class."),
            (_bars(names, found["by_type"]), "Mean silhouette of each augmentation's deltas among all."),
            (_matrix(names, found["pairs"]), "Silhouette of each pair of augmentations."),
        ]


def _scatter(points: np.ndarray, groups: list[int], names: list[str] | None, how: str) -> str:
    figure, (axes,) = panels(1, 1, 4.4)
    handles = []
    for number in sorted(set(groups)):
        style = {"color": look(number)[0], "marker": MARKERS[number // 6 % len(MARKERS)], "linestyle": ""}
        axes.plot(*points[np.array(groups) == number].T, markersize=3, alpha=0.7, **style)
        handles += [Line2D([], [], markersize=4, label=names[number], **style)] if names is not None else []
    axes.set(xticks=[], yticks=[], title=f"{how} by {'class' if names is None else 'augmentation'}")
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return to_svg(figure, f"{how} of delta tokens")


def _bars(names: list[str], values: list[float]) -> str:
    figure, (axes,) = panels(1, 1, 0.6 + 0.24 * len(names))
    axes.barh(range(len(names)), values, color=look(0)[0])
    axes.axvline(0, color="#8a8f98", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("silhouette")
    return to_svg(figure, "Silhouette of each augmentation's delta tokens")


def _matrix(names: list[str], values: list[list[float]]) -> str:
    figure, (axes,) = panels(1, 1, 5.0)
    shown = axes.imshow(np.ma.masked_array(values, np.eye(len(names), dtype=bool)), cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(shown, ax=axes, shrink=0.7)
    return to_svg(figure, "Silhouette of delta tokens for each pair of augmentations")
