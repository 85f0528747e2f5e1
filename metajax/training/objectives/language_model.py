"""Next-token prediction."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from metajax.config import Config
from metajax.training.losses import weighted_sums
from metajax.training.objectives import Batch, Means, objective
from metajax.training.step import apply_model


@objective("language_model")
def language_model(config: Config, model: Any, batch: Batch) -> Means:
    """Cross-entropy per token in nats, weighted by `loss_weights`, plus `optimizer.z_loss`. nll and body_nll exclude z-loss."""
    logits, weights, is_body = apply_model(model, batch), batch["loss_weights"], batch["is_body"]
    total, parts = weighted_sums(logits, batch["targets"], weights, is_body, config.optimizer.z_loss)
    tokens = jnp.sum(weights)
    return {"loss": (total, tokens), "nll": (parts["nll"], tokens), "body_nll": (parts["body_nll"], jnp.sum(is_body))}
