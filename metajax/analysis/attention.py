"""Attention maps of one prompt: causal attention and meta-attention, by layer and head.

Only the first prompt: an illustration, not a measurement.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common.study import META_TOKENS, Arrays, Study, capture, rounded
from metajax.models.lm import LM
from metajax.reporting.figures import WIDTH
from metajax.reporting.panels import panels, token_ticks, weight_heat


def maps(model: LM, batch: Arrays) -> dict[str, jax.Array]:
    """causal: float32[B, L, H, T, T]. meta, with meta-attention: [.., M, M] if gathered, else over all tokens."""
    names = ["attention_probabilities"]
    if model.meta.attention != "none":
        names.append("meta_probabilities")
    found = capture(model, batch, *names)
    return {name.replace("_probabilities", "").replace("attention", "causal"): value for name, value in found.items()}


@analysis("attention", title="Attention maps", **META_TOKENS)
def attention(study: Study) -> dict[str, Any]:
    """Share of the last prompt token's causal attention that goes to meta-tokens; `details`: the maps of the first prompt."""
    one = Study(study.program, study.corpora, study.model, study.task, {k: v[:1] for k, v in study.rows.items()})
    found = one.over_prompts("attention maps", maps, one.model)
    end, meta_positions = int(one.asked[0]) + 1, one.rows["meta_positions"][0]
    meta_positions = meta_positions[meta_positions < end]
    causal = found["causal"][0, :, :, :end, :end]
    details = {"labels": one.labels(0), "meta_positions": meta_positions.tolist(), "causal": rounded(causal, 3)}
    if "meta" in found:
        meta = found["meta"][0]
        index = np.arange(len(meta_positions)) if meta.shape[-1] == len(one.rows["meta_positions"][0]) else meta_positions
        details["meta"] = rounded(meta[:, :, index[:, None], index[None, :]], 3)
    share = causal[:, :, end - 1, meta_positions].sum(axis=-1)
    return {
        "prompts": 1,
        "to_meta": {"mean": float(share.mean()), "least": float(share.min()), "most": float(share.max()), "heads": share.size},
        "details": details,
    }


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
    layers, heads, length, _ = causal.shape
    figure, axes_of = panels(layers, heads, WIDTH / heads)
    for axes, (layer, head) in zip(axes_of, np.ndindex(layers, heads), strict=True):
        axes.imshow(np.sqrt(causal[layer, head]), cmap="Blues", vmin=0, vmax=1, interpolation="none")
        axes.set_xticks(metas, [])
        axes.set_yticks(metas, [])
        axes.set_title(f"{layer + 1}.{head + 1}", fontsize=8, pad=2)
    caption = "Causal attention by layer.head: queries downwards, keys across, shade the square root of the weight, ticks at meta-tokens."
    drawn = [(figure, caption)]
    for query, words in ((length - 1, "the last token of the prompt"), (metas[-1], "the last meta-token")):
        figure, (axes,) = panels(1, 1, 1.6 + 0.13 * layers * heads)
        weight_heat(figure, axes, causal[:, :, query, : query + 1].reshape(layers * heads, -1))
        axes.set_yticks(range(layers * heads), [f"{i + 1}.{j + 1}" for i, j in np.ndindex(layers, heads)], fontsize=7)
        axes.set_ylabel("layer.head")
        token_ticks(axes, details["labels"][: query + 1])
        drawn.append((figure, f"What {words} attends to, by layer and head."))
    if "meta" in details and len(metas) > 1:  # a single meta-token attends only to itself
        drawn.append(_meta_maps(np.array(details["meta"])))
    return drawn


def _meta_maps(meta: np.ndarray) -> tuple[Figure, str]:
    layers, heads, count, _ = meta.shape
    figure, axes_of = panels(layers, heads, WIDTH / heads)
    for axes, (layer, head) in zip(axes_of, np.ndindex(layers, heads), strict=True):
        axes.imshow(meta[layer, head], cmap="Blues", vmin=0, vmax=1, interpolation="none")
        for (q, k), weight in np.ndenumerate(meta[layer, head]):
            if k <= q:
                color = "white" if weight > 0.6 else "#14171c"
                axes.text(k, q, f"{weight:.2f}", ha="center", va="center", fontsize=7.5, color=color)
        axes.set_xticks(range(count), range(1, count + 1), fontsize=7)
        axes.set_yticks(range(count), range(1, count + 1), fontsize=7)
        axes.set_title(f"{layer + 1}.{head + 1}", fontsize=8, pad=2)
    caption = "Meta-attention by layer.head, among the prompt's meta-tokens in their order."
    return figure, caption
