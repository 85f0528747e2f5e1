"""Building blocks of the analyses' figures: equal panels, heat-maps, curves by layer, ratios with their quartiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from metajax.reporting.figures import WIDTH, look

GREY, FAINT = "#9aa0a8", "#e7e9ec"
LABELS = 64  # most tokens that fit on an axis


def panels(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, each `height` inches high."""
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def heat(figure: Figure, axes: Axes, values: np.ndarray, **scale: Any) -> None:
    """A heat-map in blue with its colour bar; `scale` is passed to imshow."""
    image = axes.imshow(values, aspect="auto", interpolation="none", **{"cmap": "Blues"} | scale)
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02).ax.tick_params(labelsize=8)


def centred_heat(figure: Figure, axes: Axes, values: np.ndarray) -> None:
    """A heat-map of layers by tokens, with colours symmetric about 0."""
    most = float(np.nanmax(np.abs(values)))
    heat(figure, axes, values, cmap="RdBu_r", vmin=-most, vmax=most)
    axes.set_yticks(range(len(values)), range(1, len(values) + 1))
    axes.set_ylabel("layer")


def weight_heat(figure: Figure, axes: Axes, values: np.ndarray) -> None:
    """A heat-map of weights from 0 to 1 on a scale that separates small weights."""
    heat(figure, axes, values, norm=SymLogNorm(0.05, vmin=0, vmax=1))
    figure.axes[-1].set_yticks([0, 0.1, 0.3, 1], labels=["0", "0.1", "0.3", "1"])


def token_ticks(axes: Axes, labels: Sequence[str]) -> None:
    """Label the x axis with tokens, with all of them if they fit."""
    shown = range(0, len(labels), -(-len(labels) // LABELS))
    axes.set_xticks(shown, [labels[i].strip(" ") or "␣" for i in shown], rotation=90, fontsize=7)


def by_layer(axes: Axes, curves: Mapping[str, Sequence[float]], first: int = 1, **style: Any) -> None:
    """A curve for each label, its points at the layers `first`, `first` + 1, ..."""
    for i, (label, values) in enumerate(curves.items()):
        axes.errorbar(range(first, first + len(values)), values, label=label, **{"fmt": "o-", "color": look(i)[0]} | style)
        axes.set_xticks(range(first, first + len(values)))


def name_rows(axes: Axes, names: Sequence[str], what: str) -> None:
    """One name for each row of a panel, from top to bottom, and a title for its x axis."""
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(what)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)


def point(axes: Axes, y: float, low: float, middle: float, high: float, number: int) -> None:
    """A value with its interval on row `y`, in the colour with that number."""
    axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="o", color=look(number)[0], capsize=2)
