"""Figures of the analyses of metadata, as in metajax/reporting/analysis_figures.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from metajax.reporting.figures import WIDTH, look, to_svg
from metajax.reporting.metadata_words import CHOICES, KINDS, PLACES, strengths

Result = Mapping[str, Any]
Drawn = list[tuple[str, str]]  # (SVG, caption)


def _panels(count: int, height: float = 2.2) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(WIDTH, height * count), layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False).flat)


def _probes(result: Result) -> Drawn:
    labels = [result[f"label_{i}"] for i in range(len(result["templates"]))]
    labels = [label for label in labels if "reason" not in label["balanced"]]
    if not labels:
        return []
    figure, panels = _panels(len(labels))
    for axes, label in zip(panels, labels, strict=True):
        for i, (kind, words) in enumerate(KINDS.items()):
            for choice, style in zip(CHOICES, ("-", "--"), strict=True):
                if "reason" not in label[choice]:
                    layers = label[choice][kind]["layers"]
                    axes.plot(
                        range(len(layers)), layers, style, marker="o", color=look(i)[0], label=f"{words}, {CHOICES[choice]}"
                    )
        axes.axhline(label["balanced"]["chance"], color="#9aa0a8", linewidth=1)
        axes.set_title(label["template"], fontweight="bold")
        axes.set_ylabel("accuracy")
        axes.set_xticks(range(result["layers"]))
    panels[0].legend(fontsize=8)
    panels[-1].set_xlabel("layer")
    return [
        (
            to_svg(figure, "Accuracy of probes by layer"),
            "Accuracy on documents of other origins, mean of the probes; the grey line is chance.",
        )
    ]


def _metadata_attention(result: Result) -> Drawn:
    parts = {name: part for name, part in result["parts"].items() if name != "text"}
    figure, (axes, maps) = _panels(2)
    for i, (name, part) in enumerate(parts.items()):
        axes.plot(range(1, 1 + len(part["layers"])), part["layers"], marker="o", color=look(i)[0], label=name.replace("_", " "))
    axes.set_xticks(range(1, 1 + len(next(iter(parts.values()))["layers"])))
    axes.set_xlabel("layer")
    axes.set_ylabel("share of attention")
    axes.legend(fontsize=8)
    heads = np.concatenate([np.asarray(part["heads"]).reshape(1, -1) for part in parts.values()])
    image = maps.imshow(heads, aspect="auto", cmap="Blues")
    figure.colorbar(image, ax=maps, fraction=0.05, pad=0.02).ax.tick_params(labelsize=8)
    maps.set_yticks(range(len(parts)), [name.replace("_", " ") for name in parts])
    maps.set_xlabel("heads, layer by layer")
    return [(to_svg(figure, "Attention to metadata by layer and head"), "Mean share of the attention of body tokens.")]


def _guidance(result: Result) -> Drawn:
    found = strengths(result)
    figure, (axes,) = _panels(1, 2.6)
    strength = [float(g) for g in found]
    accuracy, half = ([n[key] for n in found.values()] for key in ("accuracy", "half"))
    axes.errorbar(strength, accuracy, yerr=half, fmt="o-", color=look(0)[0], capsize=2)
    axes.axhline(result["chance"], color="#9aa0a8", linewidth=1)
    axes.axhline(result["real"]["accuracy"], color="#9aa0a8", linewidth=1, linestyle="--")
    axes.set_xlabel("g")
    axes.set_ylabel("texts with their topic")
    return [
        (
            to_svg(figure, "Topic of guided texts"),
            "With 95 % intervals over texts; grey: chance, and (dashed) the classifier on real texts.",
        )
    ]


def _by_position(result: Result) -> Drawn:
    figure, (axes,) = _panels(1, 2.4)
    for i, (name, words) in enumerate({"own": "metadata of training", "none": "no metadata"}.items()):
        axes.plot(range(len(PLACES)), [result[name][place] for place in PLACES], marker="o", color=look(i)[0], label=words)
    axes.set_xticks(range(len(PLACES)), PLACES.values())
    axes.set_ylabel("nats a token")
    axes.legend(fontsize=8.5)
    return [(to_svg(figure, "Loss by place in the document"), "Mean over the held-out documents' body tokens.")]


DRAWERS = {"probes": _probes, "metadata_attention": _metadata_attention, "guidance": _guidance, "by_position": _by_position}
