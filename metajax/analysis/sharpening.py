"""Sharpening: what a meta-token's embedding does to the scores and to the entropy of causal attention.

Source: Language Modeling with Learned Meta-Tokens (arXiv 2509.16278), figure 2. How layers, heads and queries are pooled there,
and how many prompts, is not stated in the paper; here every (layer, head, query behind the first meta-token) counts once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jaxtyping import Array, Float

from metajax.analysis.study import Batch, Study, capture, pooled, rounded
from metajax.models.lm import LM, with_intervention

BINS = 40
TAIL = 0.005  # of the values on either side, beyond the ends of the histogram
QUANTITIES = ("boost", "drop")


def peak_score(probabilities: Float[Array, "*batch T T"], lse: Float[Array, "*batch T"]) -> Float[Array, "*batch T"]:
    """Each query's greatest scaled score before the softmax: ln p_max + log-sum-exp."""
    return jnp.log(jnp.max(probabilities, axis=-1)) + lse


def entropy(probabilities: Float[Array, "*batch keys"]) -> Float[Array, "*batch"]:
    """Nats over the last axis."""
    return jnp.sum(entr(probabilities), axis=-1)


def sharpness(model: LM, batch: Batch) -> dict[str, jax.Array]:
    """peak (greatest score before the softmax) and entropy (nats) of every causal attention row, float32[B, L, H, T]."""
    found = capture(model, batch, "attention_probabilities", "attention_lse")
    probabilities, lse = found["attention_probabilities"], jnp.moveaxis(found["attention_lse"], -1, -2)
    return {"peak": peak_score(probabilities, lse), "entropy": entropy(probabilities)}


def sharpening(study: Study) -> dict[str, Any]:
    """boost: greatest score with the meta-token minus the same with its token embedding zeroed. drop: entropy without minus with, nats.

    Each as of `pooled`, by layer too; `details` has a histogram of all of them and how many lie beyond its ends.
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
