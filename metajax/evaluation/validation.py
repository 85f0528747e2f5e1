"""Validation bits per byte of body text, under each metadata condition."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from metajax.config import Config
from metajax.core.errors import require
from metajax.data.metadata import uniform_hash
from metajax.data.pipeline import EVALUATION_SEED, Corpora, complete_row, packed_rows
from metajax.data.rows import Row, RowSource, batches
from metajax.training.program import Program

MOST_NATS = math.log(sys.float_info.max)  # the largest loss whose perplexity fits a float


class Validation(NamedTuple):
    """Validation documents under one condition: batches, and the counts that bits per byte needs."""

    batches: list[Row]
    documents: int
    body_bytes: int
    metadata_tokens: int


def _validation_rows(corpora: Corpora, condition: str) -> tuple[list[RowSource], int, int]:
    """(rows of the chosen validation documents of each source, number of these documents, their UTF-8 bytes).

    Raises UserError if a source has no validation document, or none of the chosen ones has text.
    """
    data, rows, documents, tokens, size = corpora.config.data, [], 0, 0, 0
    for spec, cache in zip(data.sources, corpora.caches, strict=True):
        available = cache.documents("validation", data.validation_share, data.min_bytes)
        remedy = f"raise data.validation_share = {data.validation_share}, lower data.min_bytes = {data.min_bytes}"
        require(len(available) > 0, f"{spec} has no validation document; {remedy}, or use a corpus of more origins")
        order = available[np.argsort(uniform_hash(EVALUATION_SEED, available), kind="stable")]
        chosen = order[: -(-corpora.config.evaluation.documents // len(corpora.caches))]
        rows.append(packed_rows(corpora, cache, condition, chosen, "best_fit"))  # best_fit cuts only documents longer than a row
        documents += len(chosen)
        tokens += int(np.asarray(cache.lengths)[chosen].sum())
        size += int(np.asarray(cache.bytes)[chosen].sum())
    problem = f"the validation documents of {', '.join(data.sources)} have no text"
    require(min(tokens, size) > 0, f"{problem}; set data.min_bytes=1, which leaves empty ones out")
    return rows, documents, size


def check_validation(corpora: Corpora) -> None:
    """Raise UserError now, not after training, if validation documents cannot be shown under all `evaluation.conditions`."""
    evaluation = corpora.config.evaluation
    if evaluation.documents:
        for condition in (*evaluation.conditions, *(["training"] if corpora.config.dpo is not None else [])):
            _validation_rows(corpora, condition)


def validation(corpora: Corpora, condition: str) -> Validation:
    """The validation rows with metadata "none", "right", "empty", "shuffled", or as in "training". All use the same documents."""
    config, vocabulary = corpora.config, corpora.tokenizer.vocabulary
    sources, documents, body_bytes = _validation_rows(corpora, condition)
    rows = [
        complete_row(source[n], np.random.default_rng([EVALUATION_SEED, i, n]), config=config, meta_id=vocabulary.meta)
        for i, source in enumerate(sources)
        for n in range(len(source))
    ]
    found = batches(rows, config.data.batch_size, vocabulary.pad)
    return Validation(found, documents, body_bytes, sum(int(batch["is_metadata"].sum()) for batch in found))


def totals(program: Program, data: Sequence[Row], sums_of: Callable[[Any], dict[str, jax.Array]]) -> dict[str, Any]:
    """The numbers of sums_of(batch on the devices), added up over all batches of `data`."""
    with jax.set_mesh(program.mesh):
        found = jax.device_get([sums_of(program.put(program.local_rows(batch))) for batch in data])
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
