"""Figures of the analyses: from the results that metajax/analysis leaves on disk to (figure, caption) pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from metajax.reporting.analysis_words import CATEGORIES, INTERVENTIONS, MIXERS, READINGS, SOURCES, twins_in
from metajax.reporting.figures import STYLE, WIDTH, look, to_svg
from metajax.reporting.metadata_figures import DRAWERS
from metajax.reporting.tasks import title

Result = Mapping[str, Any]
Drawn = list[tuple[str, str]]  # (SVG, caption)
LABELS = 64  # tokens that an axis has room for


def draw(name: str, result: Result) -> Drawn:
    """The figures of one analysis."""
    with rc_context(STYLE):
        return _DRAWERS[name](result)


def _interventions(result: Result) -> Drawn:
    tasks = result["none"]
    figure, panels = _panels(
        len(tasks), 1, 0.55 + 0.34 * sum(len(result[k][t]) for t in tasks for k in result if k in INTERVENTIONS) / len(tasks)
    )
    for axes, task in zip(panels, tasks, strict=True):
        shown = [(length, name) for length in tasks[task] for name in INTERVENTIONS if name in result]
        places = [(y, length, name) for y, (length, name) in enumerate(shown) if result[name][task][length]["exact"] is not None]
        for y, length, name in places:
            n = result[name][task][length]
            colour = look(list(INTERVENTIONS).index(name))[0]
            axes.errorbar(
                n["exact"],
                y,
                xerr=[[n["exact"] - n["exact_low"]], [n["exact_high"] - n["exact"]]],
                fmt="o",
                color=colour,
                capsize=2,
            )
        axes.set_yticks(
            [y for y, _, _ in places], [f"{length}: {INTERVENTIONS[name]}" for _, length, name in places], fontsize=8.5
        )
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(-0.03, 1.03)
        axes.grid(axis="x", color="#e7e9ec", linewidth=0.8)
        axes.set_title(title(task), fontweight="bold")
    figure.supxlabel("exact match", fontsize=10.5)
    return [
        (
            to_svg(figure, "Accuracy under interventions"),
            "Exact match by length and intervention, with 95 % intervals over examples.",
        )
    ]


def _sharpening(result: Result) -> Drawn:
    figure, panels = _panels(2, 1, 2.1)
    words = {"boost": "greatest score, with minus without the embedding", "drop": "entropy in nats, without minus with"}
    for axes, (name, label) in zip(panels, words.items(), strict=True):
        histogram, n = result["details"][name], result[name]
        axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=look(0)[0], alpha=0.75)
        axes.axvline(0, color="#9aa0a8", linewidth=1)
        axes.axvline(n["mean"], color=look(1)[0], linewidth=1.6)
        axes.set_xlabel(label)
        axes.set_ylabel("attention rows")
        beyond = [f"{count:,} {side}" for count, side in zip(histogram["beyond"], ("left", "right"), strict=True)]
        axes.set_title(f"beyond the frame: {' and '.join(beyond)}", fontsize=8.5, color="#5b616b")
    counted = f"{result['boost']['values']:,} rows of {result['boost']['prompts']:,} prompts"
    return [
        (
            to_svg(figure, "Histograms of logit boost and entropy drop"),
            f"All layers, heads and queries together, {counted}; orange: the mean.",
        ),
        _by_layer(result),
    ]


def _by_layer(result: Result) -> tuple[str, str]:
    figure, panels = _panels(1, 2, 2.2)
    for axes, (name, label) in zip(panels, {"boost": "greatest score", "drop": "entropy (nats)"}.items(), strict=True):
        layers = list(result[name]["layers"].values())
        axes.errorbar(
            range(1, len(layers) + 1),
            [n["mean"] for n in layers],
            yerr=[n["half"] for n in layers],
            fmt="o-",
            color=look(0)[0],
            capsize=2,
        )
        axes.axhline(0, color="#9aa0a8", linewidth=1)
        axes.set_xticks(range(1, len(layers) + 1))
        axes.set_title(label)
        axes.set_xlabel("layer")
    return to_svg(figure, "Logit boost and entropy drop by layer"), "Means by layer with 95 % intervals over prompts."


def _caching(result: Result) -> Drawn:
    drawn = []
    for name, words in READINGS.items():
        found = result["details"][name]
        mean, n = np.array(found["mean"], float), np.array(found["prompts"])
        kept = n >= max(2, n.max() // 20)
        figure, (axes,) = _panels(1, 1, 1.3 + 0.2 * len(mean))
        _heat(figure, axes, mean[:, kept], centred=True)
        axes.set_xticks(
            places := np.unique(np.linspace(0, kept.sum() - 1, 8).astype(int)), (np.flatnonzero(kept) + 1)[places].tolist()
        )
        axes.set_xlabel("tokens in front of the meta-token")
        _layer_ticks(axes, len(mean))
        caption = f"Mean cosine with the {words}, over {n[kept].min():,} to {n.max():,} prompts a distance; layer 1 is the input of the first block."
        halves = np.array(found["half"], float)[:, kept]
        drawn.append(
            (
                to_svg(figure, f"Cosine heat-map, {words}"),
                f"{caption} The half widths of the 95 % intervals reach {np.nanmax(halves):.3f}.",
            )
        )
    figure, (axes,) = _panels(1, 1, 2.0 + 0.2 * len(mean))
    example = np.array(result["details"]["same_layer"]["example"], float)
    _heat(figure, axes, example, centred=True)
    _layer_ticks(axes, len(example))
    _token_ticks(axes, result["details"]["labels"])
    return [
        *drawn,
        (
            to_svg(figure, "Cosine heat-map of one prompt"),
            "The first prompt alone: cosine with the residual vectors of the same layer.",
        ),
    ]


def _attention(result: Result) -> Drawn:
    details = result["details"]
    causal, slots = np.array(details["causal"]), details["meta_slots"]
    layers, heads, length, _ = causal.shape
    figure, panels = _panels(layers, heads, WIDTH / heads)
    for i, axes in enumerate(panels):
        axes.imshow(np.sqrt(causal[i // heads, i % heads]), cmap="Blues", vmin=0, vmax=1, interpolation="none")
        axes.set_xticks(slots, [])
        axes.set_yticks(slots, [])
        axes.set_title(f"{i // heads + 1}.{i % heads + 1}", fontsize=8, pad=2)
    grid = to_svg(figure, "Causal attention of every layer and head")
    drawn = [
        (
            grid,
            "Causal attention by layer.head, queries downwards, keys across; the shade is the square root of the weight, ticks are meta-tokens.",
        )
    ]
    for query, words in ((length - 1, "the last token of the prompt"), (slots[-1], "the last meta-token")):
        figure, (axes,) = _panels(1, 1, 1.6 + 0.13 * layers * heads)
        _heat(figure, axes, causal[:, :, query, : query + 1].reshape(layers * heads, -1), centred=False)
        axes.set_yticks(range(layers * heads), [f"{i // heads + 1}.{i % heads + 1}" for i in range(layers * heads)], fontsize=7)
        axes.set_ylabel("layer.head")
        _token_ticks(axes, details["labels"][: query + 1])
        drawn.append((to_svg(figure, f"Causal attention of {words}"), f"What {words} attends to, by layer and head."))
    return [*drawn, *_meta_maps(details, layers, heads)]


def _meta_maps(details: Result, layers: int, heads: int) -> Drawn:
    if "meta" not in details or len(details["meta_slots"]) < 2:  # a single meta-token attends to itself
        return []
    meta = np.array(details["meta"])
    figure, panels = _panels(layers, heads, WIDTH / heads)
    for i, axes in enumerate(panels):
        weights = meta[i // heads, i % heads]
        axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, interpolation="none")
        for (q, k), weight in np.ndenumerate(weights):
            if k <= q:
                axes.text(
                    k, q, f"{weight:.2f}", ha="center", va="center", fontsize=7.5, color="white" if weight > 0.6 else "#14171c"
                )
        axes.set_xticks(range(len(weights)), range(1, len(weights) + 1), fontsize=7)
        axes.set_yticks(range(len(weights)), range(1, len(weights) + 1), fontsize=7)
        axes.set_title(f"{i // heads + 1}.{i % heads + 1}", fontsize=8, pad=2)
    return [
        (
            to_svg(figure, "Meta-attention of every layer and head"),
            "Meta-attention by layer.head, among the prompt's meta-tokens in their order.",
        )
    ]


def _theory(result: Result) -> Drawn:
    details = result["details"]
    figure, (axes,) = _panels(1, 1, 3.0)
    axes.scatter(details["margin"], details["drop"], s=5, color=look(0)[0], alpha=0.35, linewidths=0, rasterized=True)
    axes.axhline(0, color="#9aa0a8", linewidth=1)
    axes.axvline(0, color="#9aa0a8", linewidth=1)
    axes.set_xlabel("margin: ln p + H (nats)")
    axes.set_ylabel(f"entropy drop, boost of {details['delta']:g} (nats)")
    caption = (
        f"{len(details['margin']):,} attention rows drawn at random from {result['margin']['values']:,}: right of 0 the theorem promises a "
        "drop; on the left entropy rises at first and may fall for a large boost."
    )
    return [(to_svg(figure, "Entropy drop against the margin"), caption)]


def _rate_distortion(result: Result) -> Drawn:
    drawn = []
    for budget, sizes in result["examples"].items():
        figure, panels = _panels(2, 1, 2.5)
        for axes, prefix, words in zip(panels, ("", "held_out_"), ("training", "held_out"), strict=True):
            for number, (source, curve) in enumerate(result[budget].items()):
                points = [point for key, point in curve.items() if key.startswith("beta_")]
                column = lambda key, points=points, prefix=prefix: [p[f"{prefix}{key}"] for p in points]  # noqa: E731 - binds both
                colour, stroke = look(number)
                axes.errorbar(
                    column("rate"), column("distortion"), xerr=column("rate_half"), yerr=column("distortion_half"), color=colour,
                    linestyle=stroke, marker="o", markersize=4, linewidth=1.5, capsize=2, label=SOURCES[source],
                )  # fmt: skip
            axes.axhline(result["uniform"], color="#9aa0a8", linewidth=1, linestyle=(0, (4, 3)))
            axes.set_xscale("symlog", linthresh=20)
            axes.set_xlim(
                0,
                right := max(
                    20.0, 1.1 * max(p["held_out_rate"] for c in result[budget].values() for k, p in c.items() if k != "gap")
                ),
            )
            axes.set_xticks(
                ticks := [n for n in (0, 5, 10, 15, 20, 50, 100, 200, 500, 1000, 2000) if n <= right], map(str, ticks)
            )
            axes.xaxis.minorticks_off()
            axes.set_title(f"{sizes[words]} {words.replace('_', '-')} examples", fontweight="bold")
            axes.set_ylabel("distortion (nats)")
        panels[1].set_xlabel("rate (nats), linear below 20")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False, fontsize=9)
        words = {"stated": "The paper's budget: batch 1, 5 epochs.", "converged": "A longer training of the same heads, ours."}[
            budget
        ]
        gaps = ", ".join(f"{SOURCES[s]} {result[budget][s]['gap']:.3f}" for s in result[budget])
        caption = (
            f"{words} A point for each beta from 0.01 to 1, mean over {result[budget]['meta']['beta_1']['seeds']} seeds of the head with 95 % intervals; dashed: a uniform "
            f"guess. In the last fifth of training the objective still fell by (nats): {gaps}."
        )
        drawn.append((to_svg(figure, f"Rate and distortion, {budget} budget"), caption))
    return drawn


def _overhead(result: Result) -> Drawn:
    figure, (steps, speed) = _panels(2, 1, 2.1)
    names = twins_in(result)
    for y, name in enumerate(names):
        step, colour = result[name]["step"], look(y)[0]
        spread = [[step["ratio"] - step["ratio_low"]], [step["ratio_high"] - step["ratio"]]]
        steps.errorbar(step["ratio"], y, xerr=spread, fmt="o", color=colour, capsize=2)
        speed.barh(y, result[name]["generation"]["tokens_per_second"], color=colour, alpha=0.75)
    steps.axvline(1, color="#9aa0a8", linewidth=1)
    for axes, label in ((steps, "time of a train step, x of the first"), (speed, "tokens generated per second")):
        axes.set_yticks(range(len(names)), list(names.values()), fontsize=8.5)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(label)
        axes.grid(axis="x", color="#e7e9ec", linewidth=0.8)
    caption = f"Medians of {result['rounds']} rounds in which every twin has its turn; whiskers are quartiles."
    return [(to_svg(figure, "Time of a step and of generation"), caption)]


def _mixing_maps(result: Result) -> Drawn:
    kinds = [kind for kind in MIXERS if kind in result]
    figure, panels = _panels(1, len(kinds), 3.0)
    for axes, kind in zip(panels, kinds, strict=True):
        layers, below = np.arange(1, len(result[kind]["entropy"]["layers"]) + 1), 0.0
        for i, (name, words) in enumerate(CATEGORIES.items()):
            share = np.array(result[kind][name]["layers"])
            axes.bar(layers, share, bottom=below, color=look(i)[0], alpha=0.8, label=words)
            below = below + share
        axes.set_title(MIXERS[kind], fontweight="bold")
        axes.set_xlabel("layer")
        axes.set_xticks(layers)
        axes.set_ylim(0, 1)
    panels[0].set_ylabel("share of the map")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(CATEGORIES), fontsize=8.5)
    return [
        (to_svg(figure, "Where tokens look, by layer"), "Mean over rows, queries and heads (for Mamba: some of its channels).")
    ]


def _branches(result: Result) -> Drawn:
    figure, panels = _panels(3, 1, 2.0)
    words = {"rms": "size before the norm", "scale": "learned scale", "knock_out": "nats a token without it"}
    for axes, (name, label) in zip(panels, words.items(), strict=True):
        for i, (branch, title_of_branch) in enumerate(MIXERS.items()):
            values = result[branch][name]["layers"] if name == "knock_out" else result[branch][name]
            axes.plot(range(1, len(values) + 1), values, marker="o", color=look(i)[0], label=title_of_branch)
        axes.set_ylabel(label)
        axes.set_xticks(range(1, len(values) + 1))
    panels[0].legend(fontsize=8.5)
    panels[-1].set_xlabel("layer")
    return [
        (
            to_svg(figure, "The two branches by layer"),
            "Root mean square and mean absolute scale; loss on the rows without the branch, minus with it.",
        )
    ]


def _needle(result: Result) -> Drawn:
    lengths = [length for length in result if length.isdigit()]
    values = np.array([[np.nan if cell["exact"] is None else cell["exact"] for cell in result[n]["depths"]] for n in lengths])
    figure, (axes,) = _panels(1, 1, 0.9 + 0.45 * len(lengths))
    image = axes.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02).ax.tick_params(labelsize=8)
    axes.set_yticks(range(len(lengths)), lengths)
    axes.set_ylabel("tokens")
    axes.set_xticks(range(values.shape[1]), [f"{100 * d // values.shape[1]} %" for d in range(values.shape[1])], fontsize=8.5)
    axes.set_xlabel("depth of the needle, from")
    return [(to_svg(figure, "Needles found by length and depth"), "Exact match; white cells may hold no example.")]


# ---------------------------------------------------------------------------------------------------------- parts


def _panels(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, each `height` inches high."""
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _heat(figure: Figure, axes: Axes, values: np.ndarray, *, centred: bool) -> None:
    """A heat-map with its colour bar, symmetric about 0 where `centred`, else from 0 with small weights told apart."""
    most = float(np.nanmax(np.abs(values)))
    scale = (
        {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
        if centred
        else {"cmap": "Blues", "norm": SymLogNorm(0.05, vmin=0, vmax=1)}
    )
    image = axes.imshow(values, aspect="auto", interpolation="none", **scale)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    if not centred:
        bar.set_ticks([0, 0.1, 0.3, 1], labels=["0", "0.1", "0.3", "1"])


def _layer_ticks(axes: Axes, layers: int) -> None:
    axes.set_yticks(range(layers), range(1, layers + 1))
    axes.set_ylabel("layer")


def _token_ticks(axes: Axes, labels: list[str]) -> None:
    """Tokens along the axis, every one where they fit."""
    places = range(0, len(labels), -(-len(labels) // LABELS))
    axes.set_xticks(places, [labels[i].strip(" ") or "␣" for i in places], rotation=90, fontsize=7)


_DRAWERS = {
    "interventions": _interventions, "sharpening": _sharpening, "caching": _caching, "attention": _attention, "theory": _theory,
    "rate_distortion": _rate_distortion, "overhead": _overhead, "mixing_maps": _mixing_maps, "branches": _branches, "needle": _needle, **DRAWERS,
}  # fmt: skip
