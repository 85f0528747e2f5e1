"""Figures of the reports: matplotlib figures as SVG text, several in one page."""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

Curve = tuple[Sequence[float], Sequence[float]]  # (steps, values)

# Okabe and Ito's colours without black and yellow; more rows than colours use other strokes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STROKES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
WIDTH = 5.4  # inches; with the font sizes below, text stays readable when the page scales the figure down to a phone
RAW_POINTS = 600  # points of a raw curve, so that the page of a long run stays small
STYLE = {
    **dict.fromkeys(("font.size", "axes.titlesize"), 10.5),
    "axes.titlelocation": "left",
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), "#8a8f98"),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), "#30343b"),
    "text.color": "#14171c",
    "text.parse_math": False,  # a row may have a dollar sign in its name
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and read aloud
    "svg.hashsalt": "metajax",  # makes equal numbers give equal files
}


def styled() -> AbstractContextManager[None]:
    """The style of all figures, for a `with` statement."""
    return matplotlib.rc_context(STYLE)


@dataclass(frozen=True)
class SpreadColumn:
    """A figure of `seed_spread`: a value per seed and row. Figures of one quantity share an axis if they fill a third of it."""

    title: str
    quantity: str
    values: Mapping[str, Sequence[float]]
    halves: Mapping[str, float | None]  # row -> half width of the interval around its mean


def loss_curves(
    series: Mapping[str, Sequence[Curve]], validation: Mapping[str, Sequence[Curve]] | None = None, unit: str = "bits per byte"
) -> str:
    """The training loss in `unit` by step, as SVG.

    One seed: faint measurements with their moving average. Several seeds: the average of each thin, their mean thick.

    Args:
      series: row -> one curve for each seed.
      validation: row -> validation bits per byte during training, for each seed; drawn as points.
    """
    with styled():
        # The legend has two short names per line; names longer than a line are broken.
        columns, room = (2, 24) if max(map(len, series)) <= 24 else (1, 56)
        figure = Figure(figsize=(WIDTH, 3.2 + 0.22 * ((len(series) - 1) // columns)), layout="constrained")
        axes = figure.add_subplot()
        lines, points, handles = [], [], []
        for number, (name, curves) in enumerate(series.items()):
            colour, stroke = look(number)
            lines += _draw_row(axes, curves, colour, stroke)
            for steps, values in (validation or {}).get(name, ()):
                axes.plot(steps, values, "o", color=colour, markersize=5, markeredgecolor="#14171c", zorder=4)
                points += list(values)
            handles.append(Line2D([], [], color=colour, linestyle=stroke, linewidth=2, label=textwrap.fill(name, room)))
        if points:
            handles.append(Line2D([], [], color="#555", marker="o", linestyle="", markersize=5, label="validation text"))
        cut = _frame(axes, lines, points)
        axes.set(xlabel="step" + cut, ylabel=f"training {unit}")
        axes.grid(axis="y", color="#e7e9ec", linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(handles) > 1:
            figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, handlelength=1.8, borderpad=0)
        return to_svg(figure, f"Training {unit} against the step: {', '.join(series)}")


def seed_spread(columns: Sequence[SpreadColumn], baseline: str | None = None) -> list[str]:
    """An SVG per column: dots for seeds, a stroke at the mean, a bar for its interval, a dashed line at the baseline's mean."""
    drawn = []
    with styled():
        for column in columns:
            figure = Figure(figsize=(WIDTH, 0.95 + 0.29 * len(column.values)), layout="constrained")
            axes = figure.add_subplot()
            _draw_spread(axes, column, baseline)
            if limits := _limits([column]):
                low, high = _limits([other for other in columns if other.quantity == column.quantity])
                fills = 3 * (limits[1] - limits[0]) >= high - low
                axes.set_xlim(*((low, high) if fills else limits))
            axes.set_title(textwrap.fill(column.title, 44), fontweight="bold")
            drawn.append(to_svg(figure, f"Spread over seeds of {column.title} for {', '.join(column.values)}"))
    return drawn


def look(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], STROKES[number // len(COLOURS) % len(STROKES)]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a twentieth of the curve; the window is shorter at the ends."""
    half, places = len(values) // 40, np.arange(len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), RAW_POINTS)).astype(int))
    return steps[chosen], values[chosen]


def _draw_row(axes: Axes, curves: Sequence[Curve], colour: str, stroke: str) -> list[np.ndarray]:
    """Draw the finite values of the seeds of one row and return the smoothed curves."""
    arrays = ([np.asarray(part, np.float64) for part in curve] for curve in curves)
    finite = ((steps[np.isfinite(values)], values[np.isfinite(values)]) for steps, values in arrays)
    curves = [curve for curve in finite if len(curve[0])]
    smooth = [_smooth(values) for _, values in curves]
    if len(curves) == 1:
        axes.plot(*_thin(*curves[0]), color=colour, alpha=0.22, linewidth=0.9)
        axes.plot(*_thin(curves[0][0], smooth[0]), color=colour, linestyle=stroke, linewidth=2)
    elif curves:
        for (steps, _), line in zip(curves, smooth, strict=True):
            axes.plot(*_thin(steps, line), color=colour, alpha=0.45, linewidth=0.8)
        shortest = min(len(line) for line in smooth)  # a seed may have been stopped early
        mean = np.mean([line[:shortest] for line in smooth], axis=0)
        axes.plot(*_thin(curves[0][0][:shortest], mean), color=colour, linestyle=stroke, linewidth=2)
    return smooth


def _frame(axes: Axes, lines: Sequence[np.ndarray], points: Sequence[float]) -> str:
    """Set the y range so that the first steep steps do not flatten the rest, and return a remark for the axis label."""
    if not lines:
        return ""
    later = [line[len(line) // 6 :] for line in lines]
    low, high = (f([*(f(line) for line in later), *points]) for f in (min, max))
    margin = 0.06 * (high - low or abs(high) or 1.0)
    axes.set_ylim(low - 2 * margin, high + margin)
    cut = max(line.max() for line in lines) > high + margin
    return " (the first steps are above the frame)" if cut else ""


def _limits(columns: Sequence[SpreadColumn]) -> tuple[float, float] | None:
    """The range of all values with their intervals; an interval adds at most the values' own range on either side."""
    values = [v for c in columns for row in c.values.values() for v in row]
    if not values:
        return None
    low, high = min(values), max(values)
    bars = [(float(np.mean(row)), c.halves[name] or 0.0) for c in columns for name, row in c.values.items() if len(row)]
    left = max(low - (high - low), min(low, *(mean - half for mean, half in bars)))
    right = min(high + (high - low), max(high, *(mean + half for mean, half in bars)))
    margin = 0.06 * (right - left) or 0.01 * abs(low) or 1.0
    return left - margin, right + margin


def _draw_spread(axes: Axes, column: SpreadColumn, baseline: str | None) -> None:
    reference = column.values.get(baseline, ()) if baseline else ()
    if len(reference):
        axes.axvline(np.mean(reference), color="#9aa0a8", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for y, (name, values) in enumerate(column.values.items()):
        colour, half = look(y)[0], column.halves[name]
        if half is not None:
            mean, bar = np.mean(values), {"linewidth": 6, "alpha": 0.25, "solid_capstyle": "butt"}
            axes.plot([mean - half, mean + half], [y, y], color=colour, **bar)
            axes.plot([mean], [y], "|", color=colour, markersize=13, markeredgewidth=2.2)
        marker = MARKERS[y // len(COLOURS) % len(MARKERS)]
        axes.plot(values, [y] * len(values), marker, color=colour, markersize=5.5, alpha=0.85, markeredgecolor="white")
    axes.set_yticks(range(len(column.values)), [textwrap.fill(name, 28) for name in column.values])
    axes.set_ylim(len(column.values) - 0.4, -0.6)
    axes.grid(axis="x", color="#e7e9ec", linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.ticklabel_format(axis="x", useOffset=False)


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element without header and metadata, scaled by the page, with ids that no other figure has."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing")  # the browser draws the text with its own fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", text))
    prefix = "f" + hashlib.sha256(text.encode()).hexdigest()[:8] + "-"
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', lambda m: m[1] + prefix, text)
    opening = f'<svg role="img" aria-label="{escape(label)}"'
    return re.sub(r'<svg width="[^"]+" height="[^"]+"', lambda m: opening, text, count=1).strip()
