"""Caching: how much a meta-token's residual vector resembles the tokens before it, by layer and distance.

Cosine of the last meta-token's residual vector with the tokens before it. In the paper it is strongest close to the meta-token, within about
0.04 of zero. The paper describes the tokens' vectors in two ways, so both are made: residual vectors of the same layer, and embeddings.

Source: Language Modeling with Learned Meta-Tokens (arXiv 2509.16278), the cosine heat-map of "Meta Token #2".
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import stdtrit

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common.numbers import cluster_mean, rounded
from metajax.analysis.common.study import META_TOKENS, Arrays, Study, at_last_meta, capture
from metajax.models.lm import LM
from metajax.reporting.panels import centred_heat, panels, token_ticks

READINGS = {"same_layer": "residual vectors of the same layer", "embedding": "token embeddings"}
NEAR, FAR = 4, 16  # tokens before the meta-token: near is at most NEAR, far is more than FAR


def cosine(a: Float[Array, "*#batch width"], b: Float[Array, "*#batch width"]) -> Float[Array, "*batch"]:
    """Cosine of the angle between vectors, 0 if one of them is 0; leading axes broadcast."""
    lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.where(lengths > 0, lengths, 1.0)


def resemblance(model: LM, batch: Arrays) -> Arrays:
    """Cosines of the last meta-token's input of every block with that of all tokens, and with their embeddings, [B, L, T] each."""
    residual = capture(model, batch, "residual")["residual"].astype(jnp.float32)
    anchor = at_last_meta(residual, batch, 2)[:, :, None]
    return {"same_layer": cosine(anchor, residual), "embedding": cosine(anchor, model.embedding[...][batch["tokens"]][:, None])}


def by_distance(values: Float[np.ndarray, "N L T"], anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean [L, D], half width of its 95 % interval over prompts [L, D], prompts [D]) at 1 .. D tokens before `anchors` [N].
    The half width is NaN if only one prompt is that long."""
    source = anchors[:, None] - np.arange(1, anchors.max() + 1)
    shifted = np.take_along_axis(values, np.maximum(source, 0)[:, None], axis=2)
    there = source >= 0
    n = there.sum(axis=0)
    weight = there[:, None] / n
    mean = (weight * shifted).sum(axis=0)
    variance = (weight * np.square(shifted - mean)).sum(axis=0) * n / np.maximum(n - 1, 1)
    half = stdtrit(np.maximum(n - 1, 1), 0.975) * np.sqrt(variance / n)
    return mean, np.where(n > 1, half, np.nan), n


@analysis("caching", title="Caching", **META_TOKENS)
def caching(study: Study) -> dict[str, Any]:
    """For each reading: near and far, the mean cosine over all layers and prompts, with the half width of its interval over prompts.
    `details`: the heat-map, layers x distance, and one prompt's, layers x tokens."""
    cosines, end = study.over_prompts("residual vectors", resemblance), study.last_meta[0]
    distance = (study.last_meta[:, None] - np.arange(study.length))[:, None]
    parts = {"near": (distance > 0) & (distance <= NEAR), "far": distance > FAR}
    found: dict[str, Any] = {"details": {"labels": study.labels(0)[:end]}}
    for name in READINGS:
        values, found[name] = cosines[name], {"prompts": study.count}
        for part, at in parts.items():
            chosen = np.broadcast_to(at, values.shape)
            if chosen.any():
                centre, spread = cluster_mean(values, chosen)
                found[name][part] = {"mean": centre, "half": spread, "values": int(chosen.sum())}
        mean, half, n = by_distance(values, study.last_meta)
        shown = {"mean": rounded(mean), "half": rounded(half), "prompts": n.tolist(), "example": rounded(values[0, :, :end])}
        found["details"][name] = shown
    return found


@caching.headlines
def headlines(numbers: Numbers) -> list[str]:
    return [
        f"{words}, {distance}: mean cosine {n['mean']:+.3f} ± {n['half']:.3f} over {numbers[name]['prompts']:,} prompts"
        for name, words in READINGS.items()
        for part, distance in (("near", f"at most {NEAR} tokens before"), ("far", f"more than {FAR} tokens before"))
        if (n := numbers[name].get(part))
    ]


@caching.figures
def figures(result: Numbers) -> Figures:
    drawn = []
    for name, words in READINGS.items():
        found = result["details"][name]
        mean, half, n = (np.array(found[key], float) for key in ("mean", "half", "prompts"))
        kept = n >= max(2, n.max() // 20)
        figure, (axes,) = panels(1, 1, 1.3 + 0.2 * len(mean))
        centred_heat(figure, axes, mean[:, kept])
        shown = np.unique(np.linspace(0, kept.sum() - 1, 8).astype(int))
        axes.set_xticks(shown, (np.flatnonzero(kept) + 1)[shown].tolist())
        axes.set_xlabel("tokens before the meta-token")
        caption = (
            f"Mean cosine with the {words}, over {n[kept].min():,.0f} to {n.max():,.0f} prompts a distance; layer 1 is the input of the first "
            f"block. The half widths of the 95 % intervals reach {np.nanmax(half[:, kept]):.3f}."
        )
        drawn.append((figure, caption))
    example = np.array(result["details"]["same_layer"]["example"], float)
    figure, (axes,) = panels(1, 1, 2.0 + 0.2 * len(example))
    centred_heat(figure, axes, example)
    token_ticks(axes, result["details"]["labels"])
    return [*drawn, (figure, "Only the first prompt: cosine with the residual vectors of the same layer.")]
