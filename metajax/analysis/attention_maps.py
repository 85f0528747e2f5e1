"""Attention maps of one prompt: causal attention and meta-attention, by layer and head."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from metajax.analysis.study import Batch, Study, capture, rounded
from metajax.models.lm import LM


def maps(model: LM, batch: Batch) -> dict[str, jax.Array]:
    """causal, float32[B, L, H, T, T]; meta where the model has meta-attention: [.., M, M], or over all tokens where that is not gathered."""
    names = ["attention_probabilities"]
    if model.meta.attention != "none":
        names.append("meta_probabilities")
    found = capture(model, batch, *names)
    return {name.replace("_probabilities", "").replace("attention", "causal"): value for name, value in found.items()}


def attention(study: Study) -> dict[str, Any]:
    """Share of the last prompt token's causal attention that goes to meta-tokens; `details`: the maps of the first prompt.

    All other analyses look at every prompt; this one is an illustration of one.
    """
    one = Study(study.program, study.corpora, study.model, study.task, {k: v[:1] for k, v in study.rows.items()})
    found = one.over_prompts("attention maps", maps, one.model)
    end, slots = int(one.asked[0]) + 1, one.rows["meta_slots"][0]
    slots = slots[slots < end]
    causal = found["causal"][0, :, :, :end, :end]
    details = {"labels": one.labels(0), "meta_slots": slots.tolist(), "causal": rounded(causal, 3)}
    if "meta" in found:
        meta = found["meta"][0]
        index = np.arange(len(slots)) if meta.shape[-1] == len(one.rows["meta_slots"][0]) else slots
        details["meta"] = rounded(meta[:, :, index[:, None], index[None, :]], 3)
    share = causal[:, :, end - 1, slots].sum(axis=-1)
    return {
        "prompts": 1,
        "to_meta": {"mean": float(share.mean()), "least": float(share.min()), "most": float(share.max()), "heads": share.size},
        "details": details,
    }
