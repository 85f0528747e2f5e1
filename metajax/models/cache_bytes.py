"""Cache bytes of generation: as Hymba's paper counts them, and as our caches store them."""

from __future__ import annotations

import jax.numpy as jnp

from metajax.config import Model
from metajax.models.mixers import MIXERS
from metajax.models.specs import layer_specs


def published_cache_bytes(model: Model, tokens: int) -> dict[str, int | float]:
    """Cache bytes of one row in 16 bits, by part; reproduces Hymba (arXiv 2411.13676, tables 1, 2 and 10) to two decimals.

    The tables use 8,000 tokens and 10^6 bytes. 2 KV (dk + dv) (G tokens + (L - G) / share W + G M) + 2 L C N; G of L layers have
    no window. The paper does not print this formula; it is inferred from its numbers. They count window layers that share keys
    as pairs, the prefix's keys only in the G layers, and the convolution's inputs only in a pure Mamba model.
    """
    specs, hybrid = layer_specs(model), model.hybrid
    width = 2 * model.num_kv_heads * (model.head_dim + model.value_dim)
    attending = [spec.window for spec in specs if "attention" in spec.mixers]
    full = attending.count(None)
    share = 2 if hybrid is not None and max(hybrid.kv_groups, default=1) > 1 else 1
    recurrent = [MIXERS[name].cache_bytes(model, spec, 0) for spec in specs for name in spec.mixers if name != "attention"]
    return {
        "full": width * full * tokens,
        "window": width * sum(min(tokens, window) for window in attending if window is not None) / share,
        "meta": width * full * model.prefix_tokens,
        "state": sum(kept.get("state", 0) for kept in recurrent) // 2,
        "conv": 0 if attending else sum(kept.get("conv", 0) for kept in recurrent) * 2 // jnp.dtype(model.compute_dtype).itemsize,
    }


def cache_bytes(model: Model, tokens: int, rows: int = 1) -> dict[str, int]:
    """Cache bytes of `inference` for rows of up to `tokens` earlier tokens, by part; "meta" is the learned prefix, stored once.

    A window stores keys of W earlier tokens. States are float32, all else has the compute dtype. Meta-attention is not counted.
    """
    parts: dict[str, int] = dict.fromkeys(("full", "window", "meta", "state", "conv"), 0)
    prefix = model.prefix_tokens
    for spec in layer_specs(model):
        for mixer in (MIXERS[name] for name in spec.mixers):
            for part, size in mixer.cache_bytes(model, spec, tokens).items():
                parts[part] = parts.get(part, 0) + rows * size
            if prefix:  # all of its keys are kept in every layer, windowed or not
                parts["meta"] += sum(mixer.cache_bytes(model, spec._replace(window=None), prefix).values())
    return parts
