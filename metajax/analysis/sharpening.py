"""Sharpening: what a meta-token's embedding does to the scores and to the entropy of causal attention.

Causal attention of the tokens after the first meta-token, with the meta-token's embedding and with zeros in its place. The paper's means are
1.26 (greatest score) and 1.40 nats (entropy) at 152M parameters. It does not state how it pools layers, heads, queries and prompts; here every
(layer, head, query) counts once.

Source: Language Modeling with Learned Meta-Tokens (arXiv 2509.16278), figure 2.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jaxtyping import Array, Float

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common.numbers import pooled, rounded
from metajax.analysis.common.study import META_TOKENS, Arrays, Study, capture
from metajax.models.lm import LM, with_intervention
from metajax.reporting.figures import look
from metajax.reporting.panels import GREY, by_layer, panels

BINS = 40
TAIL = 0.005  # share of values beyond each end of the histogram
QUANTITIES = {  # words; axes of the histogram and of the means by layer
    "boost": ("greatest score before the softmax", "greatest score, with minus without the embedding", "greatest score"),
    "drop": ("attention entropy (nats), lower by", "entropy in nats, without minus with", "entropy (nats)"),
}


def entropy(probabilities: Float[Array, "*batch keys"]) -> Float[Array, "*batch"]:
    """Nats over the last axis."""
    return jnp.sum(entr(probabilities), axis=-1)


def sharpness(model: LM, batch: Arrays) -> Arrays:
    """peak (greatest score before the softmax, ln p_max + log-sum-exp) and entropy (nats) of every causal attention row, [B, L, H, T]."""
    found = capture(model, batch, "attention_probabilities", "attention_lse")
    probabilities, lse = found["attention_probabilities"], jnp.moveaxis(found["attention_lse"], -1, -2)
    return {"peak": jnp.log(jnp.max(probabilities, axis=-1)) + lse, "entropy": entropy(probabilities)}


@analysis("sharpening", title="Sharpening", **META_TOKENS)
def sharpening(study: Study) -> dict[str, Any]:
    """boost: greatest score with the meta-token minus the same with its token embedding zeroed. drop: entropy without minus with, nats.
    Each as from `pooled`, over all layers and by layer; `details` has a histogram and the counts beyond its ends."""
    zeroed = with_intervention(study.model, embedding="zero")
    without = study.over_prompts("attention without the meta-token's embedding", sharpness, zeroed)
    whole = study.over_prompts("attention with it", sharpness)
    chosen = np.broadcast_to(study.queries_after(study.first_meta)[:, None, None], whole["peak"].shape)
    found: dict[str, Any] = {"details": {}}
    for name, values in {"boost": whole["peak"] - without["peak"], "drop": without["entropy"] - whole["entropy"]}.items():
        layers = {f"layer_{i + 1}": pooled(values[:, i], chosen[:, i]) for i in range(values.shape[1])}
        found[name] = pooled(values, chosen) | {"layers": layers}
        low, high = np.quantile(values[chosen], (TAIL, 1 - TAIL))
        counts, edges = np.histogram(values[chosen], BINS, (low, high))
        beyond = [int((values[chosen] < low).sum()), int((values[chosen] > high).sum())]
        found["details"][name] = {"counts": counts.tolist(), "edges": rounded(edges), "beyond": beyond}
    return found


@sharpening.headlines
def headlines(numbers: Numbers) -> list[str]:
    return [
        f"{words}: mean {n['mean']:+.3f} ± {n['half']:.3f}, median {n['median']:+.3f}, above 0 in {n['positive']:.1%} ± {n['positive_half']:.1%} "
        f"of {n['values']:,} rows of {n['prompts']:,} prompts"
        for n, words in ((numbers[name], words) for name, (words, _, _) in QUANTITIES.items())
    ]


@sharpening.figures
def figures(result: Numbers) -> Figures:
    (histograms, rows), (layers, columns) = panels(2, 1, 2.1), panels(1, 2, 2.2)
    for (name, (_, across, title)), row, column in zip(QUANTITIES.items(), rows, columns, strict=True):
        histogram, by_name = result["details"][name], result[name]["layers"].values()
        row.stairs(histogram["counts"], histogram["edges"], fill=True, color=look(0)[0], alpha=0.75)
        row.axvline(0, color=GREY, linewidth=1)
        row.axvline(result[name]["mean"], color=look(1)[0], linewidth=1.6)
        row.set(xlabel=across, ylabel="attention rows")
        left, right = histogram["beyond"]
        row.set_title(f"beyond the frame: {left:,} left and {right:,} right", fontsize=8.5, color="#5b616b")
        by_layer(column, {title: [n["mean"] for n in by_name]}, yerr=[n["half"] for n in by_name], capsize=2)
        column.axhline(0, color=GREY, linewidth=1)
        column.set(title=title, xlabel="layer")
    counted = f"{result['boost']['values']:,} rows of {result['boost']['prompts']:,} prompts"
    return [
        (histograms, f"All layers, heads and queries, {counted}; orange: the mean."),
        (layers, "Means by layer with 95 % intervals over prompts."),
    ]
