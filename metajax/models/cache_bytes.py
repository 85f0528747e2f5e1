"""Bytes that generation keeps of earlier tokens: as Hymba's paper counts them, and as the caches here hold them."""

from __future__ import annotations

import jax.numpy as jnp

from metajax.config import Model
from metajax.models.hybrid import Kind
from metajax.models.hybrid_flops import layers_of

FLOAT32 = 4


def published_cache_bytes(model: Model, tokens: int) -> dict[str, int | float]:
    """Of one row in 16 bits, by part: the sizes of Hymba (arXiv 2411.13676, tables 1, 2 and 10) to two decimals, with 8,000 tokens in 10^6 bytes.

    2 KV (dk + dv) (G tokens + (L - G) / share W + G M) + 2 L C N, G of L layers being without a window. The paper does not print it; it is
    inferred from its numbers, which count window layers that share keys as pairs, the meta tokens' keys in the G layers alone, and the
    convolution's inputs in a model of Mamba alone.
    """
    kinds, hybrid = _kinds(model), model.hybrid
    width = 2 * model.num_kv_heads * (model.head_dim + model.value_dim)
    windows = [kind.window for kind in kinds if kind.attends and kind.window is not None]
    full = sum(kind.attends for kind in kinds) - len(windows)
    share = 2 if hybrid is not None and max(hybrid.kv_groups, default=1) > 1 else 1
    scans = sum(kind.scans for kind in kinds)
    return {
        "full": width * full * tokens,
        "window": width * sum(min(tokens, window) for window in windows) / share,
        "meta": width * full * hybrid.meta_tokens if hybrid is not None else 0,
        "state": 2 * scans * model.ssm_width * hybrid.state if hybrid is not None else 0,
        "conv": 2 * scans * model.conv_width * (hybrid.d_conv - 1) if hybrid is not None and hybrid.fusion == "mamba" else 0,
    }


def cache_bytes(model: Model, tokens: int, rows: int = 1) -> dict[str, int]:
    """What `inference` holds for rows of up to `tokens` earlier tokens, by part; "meta", of a hybrid's meta tokens, once for all rows.

    Keys of a window are its W earlier tokens'. States are float32, all else in the compute dtype.
    """
    kinds, size = _kinds(model), jnp.dtype(model.compute_dtype).itemsize
    width = model.num_kv_heads * (model.head_dim + model.value_dim) * size
    owners = [kind for kind in kinds if kind.owns_kv]
    scans = sum(kind.scans for kind in kinds)
    metas = model.hybrid.meta_tokens if model.hybrid is not None else 0
    state = scans * model.ssm_width * model.hybrid.state * FLOAT32 if scans else 0
    conv = scans * model.conv_width * (model.hybrid.d_conv - 1) * size if scans else 0
    return {
        "full": rows * width * tokens * sum(kind.window is None for kind in owners),
        "window": rows * width * sum(min(tokens, kind.window) for kind in owners if kind.window is not None),
        "meta": width * metas * len(owners) + (state + conv if metas else 0),
        "state": rows * state,
        "conv": rows * conv,
    }


def _kinds(model: Model) -> list[Kind]:
    """The layers in order, those of other models than hybrids too."""
    if model.hybrid is not None:
        return layers_of(model)
    return [Kind(attends=True, scans=False, owns_kv=True, window=model.window)] * model.layers
