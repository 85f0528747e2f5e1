"""Injection of learned meta-tokens into a row: a fixed number, at random or periodic positions.

Source: Language Modeling with Learned Meta-Tokens, section on pre-training. M = rate * row length, positions are uniformly
random, and targets that are meta-tokens carry no loss. Position 0 is never a meta-token (not stated in the paper).
"""

from __future__ import annotations

import numpy as np

from metajax.config import MetaTokens
from metajax.data.rows import Row


def choose_positions(length: int, count: int, inject: str, rng: np.random.Generator) -> np.ndarray:
    """Sorted int32 [count]: the positions, out of `length`, that become meta-tokens; never position 0."""
    if inject == "random":
        chosen = 1 + rng.choice(length - 1, size=count, replace=False)
        return np.sort(chosen).astype(np.int32)
    return (1 + (np.arange(count) + 0.5) * (length - 1) / max(count, 1)).astype(np.int32)


def inject(row: Row, rng: np.random.Generator, *, meta: MetaTokens, count: int, meta_id: int) -> Row:
    """Insert `count` meta-tokens into `row` (C positions), which gives C + count positions.

    A meta-token joins the segment of the token before it. With loss "skip_meta_targets", the position right before a real
    token predicts it, even if it is a meta-token; a position right before a meta-token carries no loss. With "real_only",
    each real token predicts the next real one, and meta-tokens predict nothing.
    """
    length = len(row["tokens"]) + count
    meta_positions = choose_positions(length, count, meta.inject, rng)
    is_real = np.ones(length, bool)
    is_real[meta_positions] = False
    source = np.cumsum(is_real) - 1  # the real token at or before each position
    out = {name: values[source] for name, values in row.items() if values.shape == row["tokens"].shape}
    out["tokens"][meta_positions] = meta_id
    out["is_metadata"][meta_positions] = False
    keeps_loss = np.append(is_real[1:], True) if meta.loss == "skip_meta_targets" else is_real
    out["loss_weights"] = out["loss_weights"] * keeps_loss
    for asked in ("is_body", "asks_metadata"):
        out[asked] = out[asked] & keeps_loss
    out["meta_positions"] = meta_positions
    return out
