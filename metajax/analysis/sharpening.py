"""Sharpening: what a meta-token's embedding does to the scores and to the entropy of causal attention.

Causal attention of the tokens after the first meta-token, with the meta-token's embedding and with zeros in its place. The paper's means are
1.26 (greatest score) and 1.40 nats (entropy) at 152M parameters. It does not state how it pools layers, heads, queries and prompts; here every
(layer, head, query) counts once.

Source: Language Modeling with Learned Meta-Tokens (arXiv 2509.16278), figure 2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jaxtyping import Array, Float

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common.study import META_TOKENS, Arrays, Study, capture, pooled, rounded
from metajax.models.lm import LM, with_intervention
from metajax.reporting.figures import look
from metajax.reporting.panels import GREY, by_layer, panels

BINS = 40
TAIL = 0.005  # share of values beyond each end of the histogram
QUANTITIES = {"boost": "greatest score before the softmax", "drop": "attention entropy (nats), lower by"}


def peak_score(probabilities: Float[Array, "*batch T T"], lse: Float[Array, "*batch T"]) -> Float[Array, "*batch T"]:
    """Each query's greatest scaled score before the softmax: ln p_max + log-sum-exp."""
    return jnp.log(jnp.max(probabilities, axis=-1)) + lse


def entropy(probabilities: Float[Array, "*batch keys"]) -> Float[Array, "*batch"]:
    """Nats over the last axis."""
    return jnp.sum(entr(probabilities), axis=-1)


def sharpness(model: LM, batch: Arrays) -> dict[str, jax.Array]:
    """peak (greatest score before the softmax) and entropy (nats) of every causal attention row, float32[B, L, H, T]."""
    found = capture(model, batch, "attention_probabilities", "attention_lse")
    probabilities, lse = found["attention_probabilities"], jnp.moveaxis(found["attention_lse"], -1, -2)
    return {"peak": peak_score(probabilities, lse), "entropy": entropy(probabilities)}


@analysis("sharpening", title="Sharpening", **META_TOKENS)
def sharpening(study: Study) -> dict[str, Any]:
    """boost: greatest score with the meta-token minus the same with its token embedding zeroed. drop: entropy without minus with, nats.

    Each as from `pooled`, over all layers and by layer; `details` has a histogram and the counts beyond its ends.
    """
    without = study.over_prompts(
        "attention without the meta-token's embedding", sharpness, with_intervention(study.model, embedding="zero")
    )
    whole = study.over_prompts("attention with it", sharpness, study.model)
    differences = {"boost": whole["peak"] - without["peak"], "drop": without["entropy"] - whole["entropy"]}
    chosen = np.broadcast_to(study.queries[:, None, None], whole["peak"].shape)
    found: dict[str, Any] = {"details": {}}
    for name in QUANTITIES:
        values = differences[name]
        layers = {f"layer_{i + 1}": pooled(values[:, i], chosen[:, i]) for i in range(values.shape[1])}
        found[name] = pooled(values, chosen) | {"layers": layers}
        ends = np.quantile(values[chosen], (TAIL, 1 - TAIL))
        counts, edges = np.histogram(values[chosen], BINS, ends)
        beyond = [int((values[chosen] < ends[0]).sum()), int((values[chosen] > ends[1]).sum())]
        found["details"][name] = {"counts": counts.tolist(), "edges": rounded(edges), "beyond": beyond}
    return found


@sharpening.headlines
def headlines(numbers: Numbers) -> list[str]:
    return [
        f"{words}: mean {n['mean']:+.3f} ± {n['half']:.3f}, median {n['median']:+.3f}, above 0 in {n['positive']:.1%} ± {n['positive_half']:.1%} "
        f"of {n['values']:,} rows of {n['prompts']:,} prompts"
        for words, n in ((words, numbers[name]) for name, words in QUANTITIES.items())
    ]


@sharpening.figures
def figures(result: Numbers) -> Figures:
    histograms, axes_of = panels(2, 1, 2.1)
    words = {"boost": "greatest score, with minus without the embedding", "drop": "entropy in nats, without minus with"}
    for axes, (name, label) in zip(axes_of, words.items(), strict=True):
        histogram = result["details"][name]
        axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=look(0)[0], alpha=0.75)
        axes.axvline(0, color=GREY, linewidth=1)
        axes.axvline(result[name]["mean"], color=look(1)[0], linewidth=1.6)
        axes.set(xlabel=label, ylabel="attention rows")
        left, right = histogram["beyond"]
        axes.set_title(f"beyond the frame: {left:,} left and {right:,} right", fontsize=8.5, color="#5b616b")
    layers, axes_of = panels(1, 2, 2.2)
    for axes, (name, label) in zip(axes_of, {"boost": "greatest score", "drop": "entropy (nats)"}.items(), strict=True):
        found = list(result[name]["layers"].values())
        by_layer(axes, {label: [n["mean"] for n in found]}, yerr=[n["half"] for n in found], capsize=2)
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set(title=label, xlabel="layer")
    counted = f"{result['boost']['values']:,} rows of {result['boost']['prompts']:,} prompts"
    return [
        (histograms, f"All layers, heads and queries, {counted}; orange: the mean."),
        (layers, "Means by layer with 95 % intervals over prompts."),
    ]
