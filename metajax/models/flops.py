"""Analytic training FLOPs, exact for the matrix products and for the (query, key) pairs that a mask allows.

A multiply-add is two operations. The backward pass costs twice the forward pass. Recomputation is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from metajax.config import Config
from metajax.models.mixers import MIXERS
from metajax.models.mixers.base import Batch
from metajax.models.specs import layer_specs

# Peak dense bf16 operations per second of one chip, by JAX's device kind (figures published by the vendors).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def matmul_flops(config: Config, vocab_size: int) -> dict[str, int]:
    """Forward operations per token by part: matrix products, convolutions and scans, without (query, key) pairs.

    "meta_attention" is per token for which meta-attention is computed.
    """
    cfg, parts = config.model, Counter()
    for spec in layer_specs(cfg, config.meta_tokens):
        for name in spec.all_mixers:
            parts.update(MIXERS[name].token_flops(cfg, spec))
        widths = [MIXERS[name].channels(cfg) for name in spec.mixers]
        parts["output"] += 2 * cfg.width * (sum(widths) if spec.join == "concat" else max(widths))
        parts["mlp"] += 2 * cfg.width * cfg.mlp_width * (3 if cfg.activation == "swiglu" else 2)
    return {name: cost for name, cost in parts.items() if cost} | {"head": 2 * cfg.width * vocab_size}


def pair_flops(config: Config, batch: Batch, prefixes: int | float = 1) -> dict[str, int | float]:
    """Forward operations of allowed (query, key) pairs in a batch and `prefixes` learned prefixes, by mixer, in all layers."""
    cfg, found, prefix = config.model, {}, config.model.prefix_tokens
    of_prefix = {"positions": np.arange(prefix)[None], "segment_ids": np.ones((1, prefix), np.int32)}
    for spec, layers in Counter(layer_specs(cfg, config.meta_tokens)).items():
        for name in spec.all_mixers:
            if name == "meta_attention" and "meta_positions" not in batch:
                continue
            mixer = MIXERS[name]
            pairs = mixer.pairs(spec, batch, prefix)
            pairs += prefixes * mixer.pairs(spec._replace(window=None), of_prefix, 0) if prefix else 0
            found[name] = found.get(name, 0) + layers * mixer.pair_flops(cfg) * pairs
    return {name: cost for name, cost in found.items() if cost}


def token_counts(config: Config, batch: Batch) -> dict[str, int]:
    """Tokens computed by the layers, by meta-attention and by the head, with padding. A batch computes the prefix once."""
    tokens = batch["segment_ids"].size
    everywhere = config.meta_tokens is not None and config.meta_tokens.writes_everywhere
    metas = tokens if everywhere else batch["meta_positions"].size if "meta_positions" in batch else 0
    return {"layers": tokens + config.model.prefix_tokens, "meta_attention": metas, "head": tokens}


def passes(config: Config) -> int:
    """Cost of a step in forward passes: the backward pass counts two, the reference model of `dpo` one."""
    return 3 + (config.dpo is not None)


def step_flops(config: Config, vocab_size: int, batch: Batch) -> int:
    """Operations of one training step on the rows of `batch`; for all hosts if `batch` holds the rows of all hosts."""
    counts = token_counts(config, batch)
    products = sum(cost * counts.get(name, counts["layers"]) for name, cost in matmul_flops(config, vocab_size).items())
    return passes(config) * int(products + sum(pair_flops(config, batch).values()))


def flops_per_token(config: Config, vocab_size: int) -> dict[str, float]:
    """Training operations per position by part, if each row is one document (the most pairs that a row can have)."""
    rows, length = config.data.batch_size, config.row_positions
    metas = np.arange(config.row_meta_tokens)[None]
    batch = {"positions": np.arange(length)[None], "segment_ids": np.ones((1, length), np.int32), "meta_positions": metas}
    pairs = pair_flops(config, batch, prefixes=1 / rows)
    counts = token_counts(config, batch) | {"layers": length + config.model.prefix_tokens / rows}
    share = passes(config) / length
    parts = {k: share * cost * counts.get(k, counts["layers"]) for k, cost in matmul_flops(config, vocab_size).items()}
    if "meta_attention" in parts:
        parts["meta_attention"] += share * pairs.pop("meta_attention", 0)
    return parts | ({"attention_pairs": share * sum(pairs.values())} if pairs else {})


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Total peak bf16 operations per second of these devices, or None if the chip is unknown."""
    per_chip = PEAK_FLOPS.get(devices[0].device_kind)
    return None if per_chip is None else per_chip * len(devices)
