"""Attention maps of one prompt: causal attention and meta-attention, by layer and head.

Only the first prompt: an illustration, not a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common.numbers import rounded
from metajax.analysis.common.study import META_TOKENS, Arrays, Study, capture
from metajax.models.lm import LM
from metajax.reporting.figures import WIDTH
from metajax.reporting.panels import panels, token_ticks, weight_heat


def maps(model: LM, batch: Arrays) -> Arrays:
    """causal: float32[B, L, H, T, T]. meta, with meta-attention: [.., M, M] if gathered, else over all tokens."""
    names = {"attention_probabilities": "causal"} | ({} if model.meta.attention == "none" else {"meta_probabilities": "meta"})
    return {names[captured]: maps for captured, maps in capture(model, batch, *names).items()}


@analysis("attention", title="Attention maps", **META_TOKENS)
def attention(study: Study) -> dict[str, Any]:
    """Share of the last prompt token's causal attention that goes to meta-tokens; `details`: the maps of the first prompt."""
    one = replace(study, rows={name: values[:1] for name, values in study.rows.items()})
    found = one.over_prompts("attention maps", maps)
    end, every = int(one.asked[0]) + 1, one.rows["meta_positions"][0]
    metas = every[every < end]
    causal = found["causal"][0, :, :, :end, :end]
    details = {"labels": one.labels(0), "meta_positions": metas.tolist(), "causal": rounded(causal, 3)}
    if "meta" in found:
        meta = found["meta"][0]
        index = np.arange(len(metas)) if meta.shape[-1] == len(every) else metas
        details["meta"] = rounded(meta[:, :, index[:, None], index[None, :]], 3)
    share = causal[:, :, end - 1, metas].sum(axis=-1)
    to_meta = {"mean": float(share.mean()), "least": float(share.min()), "most": float(share.max()), "heads": share.size}
    return {"prompts": 1, "to_meta": to_meta, "details": details}


@attention.headlines
def headlines(numbers: Numbers) -> list[str]:
    n = numbers["to_meta"]
    return [
        f"the last token of this prompt gives meta-tokens {n['mean']:.1%} of its causal attention ({n['least']:.1%} to {n['most']:.1%} "
        f"over {n['heads']} heads)"
    ]


@attention.figures
def figures(result: Numbers) -> Figures:
    details = result["details"]
    causal, metas = np.array(details["causal"]), details["meta_positions"]
    names = [f"{layer + 1}.{head + 1}" for layer, head in np.ndindex(causal.shape[:2])]
    figure, _ = _grid(np.sqrt(causal), names, metas, [])
    caption = "Causal attention by layer.head: queries downwards, keys across, shade the square root of the weight, ticks at meta-tokens."
    drawn = [(figure, caption)]
    for query, words in ((causal.shape[2] - 1, "the last token of the prompt"), (metas[-1], "the last meta-token")):
        figure, (axes,) = panels(1, 1, 1.6 + 0.13 * len(names))
        weight_heat(figure, axes, causal[:, :, query, : query + 1].reshape(len(names), -1))
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_ylabel("layer.head")
        token_ticks(axes, details["labels"][: query + 1])
        drawn.append((figure, f"What {words} attends to, by layer and head."))
    if "meta" in details and len(metas) > 1:  # a single meta-token attends only to itself
        meta, numbers = np.array(details["meta"]), range(1, len(metas) + 1)
        figure, axes_of = _grid(meta, names, range(len(metas)), numbers)
        for (layer, head, q, k), weight in np.ndenumerate(meta):
            if k <= q:
                style = {"ha": "center", "va": "center", "fontsize": 7.5, "color": "white" if weight > 0.6 else "#14171c"}
                axes_of[layer * meta.shape[1] + head].text(k, q, f"{weight:.2f}", **style)
        drawn.append((figure, "Meta-attention by layer.head, among the prompt's meta-tokens in their order."))
    return drawn


def _grid(maps: np.ndarray, names: list[str], ticks: Sequence[int], labels: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """A map of each head, a row of panels for each layer."""
    figure, axes_of = panels(*maps.shape[:2], WIDTH / maps.shape[1])
    for axes, name, weights in zip(axes_of, names, maps.reshape(-1, *maps.shape[2:]), strict=True):
        axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, interpolation="none")
        axes.set_xticks(ticks, labels, fontsize=7)
        axes.set_yticks(ticks, labels, fontsize=7)
        axes.set_title(name, fontsize=8, pad=2)
    return figure, axes_of
