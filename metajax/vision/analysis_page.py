"""Analyses of a run on images as sections of its report: attention over its pictures, time of a step beside CoCoOp's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from metajax.reporting.figures import STYLE, WIDTH, look, to_svg
from metajax.runs.files import find_readable

Result = Mapping[str, Any]
SECTIONS = {  # title, and what is looked at
    "attention": (
        "Where the class token looks",
        "Attention from the class token to the patches, for a few test images: an illustration, no measurement. The image tower is the frozen "
        "CLIP's, so learners that stand on one CLIP share these maps.",
    ),
    "overhead": (
        "Time of a step",
        "Train steps of learners of this run's shapes, one image each, taking turns in one process; images are there already, so that reading "
        "them is not in it. Of AAPL the extension (2511.03367) reports 1.25 times CoCoOp's training time, by third parties.",
    ),
}
TWINS = {"cocoop": "CoCoOp", "coop": "CoOp", "cocoop_augmented": "CoCoOp, augmented", "aapl": "AAPL"}


def headlines(name: str, result: Result) -> list[str]:
    """The sentences of one analysis."""
    if name == "attention":
        return [f"In the last block the class token keeps {result['itself']:.0%} of its weight for itself."]
    lines = [
        f"{result['classes']} classes of {result['tokens']} tokens on {result['device']}; medians of {result['rounds']} rounds"
    ]
    for twin, words in TWINS.items():
        step = result[twin]["step"]
        lines.append(
            f"{words}: step {step['ms']:.2f} ms, {step['ratio']:.3f}x ({step['ratio_low']:.3f} to {step['ratio_high']:.3f})"
        )
    return lines


def image_sections(workdir: Path) -> list[dict[str, Any]]:
    """Title, text, headline numbers and figures of each analysis that has been made of a run."""
    found = []
    for name, (title, text) in SECTIONS.items():
        saved = find_readable(workdir / "analysis" / f"{name}.json")
        if saved:
            result = saved["result"]
            figures = [(Markup(svg), caption) for svg, caption in _DRAWERS[name](result)]
            found.append({"title": title, "text": text, "lines": headlines(name, result), "figures": figures})
    return found


def _attention(result: Result) -> list[tuple[str, str]]:
    details = result["details"]
    pixels, names = np.array(details["pixels"], np.uint8), details["names"]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
        panels = figure.subplots(3, len(pixels))
        for n, image in enumerate(pixels):
            panels[0, n].set_title(names[n], fontsize=8)
            for row, maps in enumerate((None, details["last"], details["rollout"])):
                axes, side = panels[row, n], len(image)
                axes.imshow(image, extent=(0, side, side, 0))
                if maps is not None:
                    axes.imshow(
                        np.array(maps[n]), extent=(0, side, side, 0), cmap="inferno", alpha=0.65, interpolation="bilinear"
                    )
                axes.set_xticks([])
                axes.set_yticks([])
        for row, words in enumerate(("image", "last block", "all blocks")):
            panels[row, 0].set_ylabel(words, fontsize=8.5)
        svg = to_svg(figure, "Attention of the class token over test images")
    caption = "The last block's attention, mean over heads, and attention through all blocks (rollout); bright is much, each map by itself. "
    return [(svg, (caption + details["attribution"]).strip())]


def _overhead(result: Result) -> list[tuple[str, str]]:
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.9), layout="constrained")
        axes = figure.add_subplot()
        for y, name in enumerate(TWINS):
            step = result[name]["step"]
            spread = [[step["ratio"] - step["ratio_low"]], [step["ratio_high"] - step["ratio"]]]
            axes.errorbar(step["ratio"], y, xerr=spread, fmt="o", color=look(y)[0], capsize=2)
        for x, style in ((1.0, "-"), (1.25, ":")):
            axes.axvline(x, color="#9aa0a8", linewidth=1, linestyle=style)
        axes.set_yticks(range(len(TWINS)), list(TWINS.values()), fontsize=8.5)
        axes.set_ylim(len(TWINS) - 0.4, -0.6)
        axes.set_xlabel("time of a train step, x of CoCoOp's")
        svg = to_svg(figure, "Time of a step")
    return [
        (svg, f"Medians of {result['rounds']} rounds in which every learner has its turn; whiskers are quartiles; dotted: 1.25.")
    ]


_DRAWERS = {"attention": _attention, "overhead": _overhead}
