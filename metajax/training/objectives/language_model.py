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
    fields = (batch[name] for name in ("targets", "loss_weights", "is_body"))
    total, parts = weighted_sums(apply_model(model, batch), *fields, config.optimizer.z_loss)
    tokens = jnp.sum(batch["loss_weights"])
    return {"loss": (total, tokens), "nll": (parts["nll"], tokens), "body_nll": (parts["body_nll"], jnp.sum(batch["is_body"]))}
