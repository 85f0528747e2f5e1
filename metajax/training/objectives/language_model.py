"""Next-token prediction."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from metajax.config import Config
from metajax.models.cross_entropy import weighed
from metajax.training.losses import weighted_loss
from metajax.training.objectives import Batch, Means, objective


@objective("language_model")
def language_model(config: Config, model: Any, batch: Batch) -> Means:
    """Cross-entropy per token in nats, weighted by `loss_weights`, plus `optimizer.z_loss`. nll and body_nll exclude z-loss."""
    weights, is_body = batch["loss_weights"], batch["is_body"]
    total, (nll, *_) = weighted_loss(model, batch, config.optimizer.z_loss)
    tokens, of_body = jnp.sum(weights), jnp.sum(jnp.where(is_body, nll, 0.0))
    return {"loss": (total, tokens), "nll": (jnp.sum(weighed(weights, nll)), tokens), "body_nll": (of_body, jnp.sum(is_body))}
