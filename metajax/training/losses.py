"""Losses of a language model as sums over a batch, not means, so that micro-batches and hosts add up exactly."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from metajax.models import cross_entropy
from metajax.models.cross_entropy import TokenScores
from metajax.training.objectives import Batch

MODEL_INPUTS = ("tokens", "positions", "segment_ids", "meta_positions")


def apply_model(model: Any, batch: Batch) -> jax.Array:
    """Logits [B, T, V] of a batch of text. Training and evaluation do without them: see `token_scores`."""
    inputs = _inputs(batch)
    return model(inputs.pop("tokens"), **inputs)


def token_scores(model: Any, batch: Batch) -> TokenScores:
    """The scores of a batch's targets; an objective may differentiate `nll` and `log_z`."""
    return cross_entropy.token_scores(_hidden(model, batch), model.output_matrix, batch["targets"], model.absent_ids)


def weighted_loss(model: Any, batch: Batch, z_loss: float) -> tuple[Float[Array, ""], TokenScores]:
    """(sum of `loss_weights` * (nll + z_loss * log_z^2), scores of the targets); only the sum has a gradient."""
    head = model.output_matrix, batch["targets"], batch["loss_weights"], model.absent_ids
    return cross_entropy.weighted_loss(_hidden(model, batch), *head, z_loss)


def _hidden(model: Any, batch: Batch) -> Float[Array, "B T width"]:
    inputs = _inputs(batch)
    x = model.embed(inputs.pop("tokens"), inputs["positions"], inputs.get("meta_positions"))
    return model.decode(x, **inputs)[0]


def _inputs(batch: Batch) -> dict[str, jax.Array]:
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}
