"""Validation bits per byte of body text, under each metadata condition."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from metajax.config import Config
from metajax.core.errors import require
from metajax.data.pipeline import Corpora, validation
from metajax.data.rows import Row
from metajax.training.program import Program

MOST_NATS = math.log(sys.float_info.max)  # the largest loss whose perplexity fits a float


def totals(program: Program, batches: Sequence[Row], sums_of: Callable[[Any], dict[str, jax.Array]]) -> dict[str, Any]:
    """The numbers of sums_of(batch on the devices), added up over all batches."""
    with jax.set_mesh(program.mesh):
        found = jax.device_get([sums_of(program.put(program.local_rows(batch))) for batch in batches])
    return {name: sum(sums[name].item() for sums in found) for name in found[0]}


def require_finite(loss: float, what: str) -> None:
    """UserError if the loss of `what` is not finite."""
    remedy = "lower optimizer.learning_rate in a new run, or look at an earlier checkpoint"
    require(math.isfinite(loss), f"the loss of {what} is {loss}: training has diverged; {remedy}")


def require_rows(config: Config, nats: float, what: str) -> None:
    """UserError if the loss is infinite because a token in `what` has no row in the imported checkpoint."""
    rows = config.imported.rows if config.imported is not None else 0
    require(
        not rows or nats != math.inf,
        f"{what} tokens without a row in the checkpoint, which has {rows}: use the checkpoint's own tokenizer, or other text",
    )


def evaluate_validation(program: Program, corpora: Corpora, model: Any, condition: str) -> dict[str, Any]:
    """Bits per byte of the bodies of the validation documents.

    bpb = sum of -log2 p(body token) / UTF-8 bytes of the bodies. Every body token of every chosen document is predicted
    exactly once, so the denominator is the same for every model and condition. Metadata and meta-tokens are never counted.

    Args:
      condition: what the model is shown: "none", "right", "empty" or "shuffled" metadata.

    Returns:
      bpb, nats_per_token, perplexity (e to the nats per body token; None if no float holds it), body_tokens, body_bytes,
      documents, metadata_tokens (positions), metadata_nats_per_token (None if metadata has no loss, or no row in an imported
      checkpoint).
    """
    data = validation(corpora, condition)
    sums = totals(program, data.batches, partial(program.eval_step, model))
    nll, metadata_nll, nats = sums["body_nll"], sums["metadata_nll"], sums["body_nll"] / sums["body_tokens"]
    require_rows(program.config, nll, "the validation documents have")
    require_finite(nll, f"the validation documents (metadata: {condition})")
    has_metadata_loss = sums["metadata_tokens"] and metadata_nll != math.inf
    return {
        "bpb": nll / math.log(2.0) / data.body_bytes,
        "nats_per_token": nats,
        "perplexity": math.exp(nats) if nats < MOST_NATS else None,
        "body_tokens": sums["body_tokens"],
        "body_bytes": data.body_bytes,
        "documents": data.documents,
        "metadata_tokens": data.metadata_tokens,
        "metadata_nats_per_token": metadata_nll / sums["metadata_tokens"] if has_metadata_loss else None,
    }
