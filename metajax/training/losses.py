"""Token losses as sums over a batch, not means, so that micro-batches and hosts add up exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_nll(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """(negative log-likelihood in nats, log of the partition sum) of each target, in float32."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


def weighed(weights: Float[Array, "*B"], nll: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """weights * nll, but 0 where the weight is 0. An unweighted target may be missing from the softmax, with infinite loss."""
    return jnp.where(weights == 0, 0.0, weights * nll)


def weighted_sums(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], weights: Float[Array, "B T"], is_body: Array, z_loss: float
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(sum of weighted losses, parts). A step minimises this sum divided by the sum of weights.

    `z_loss` adds z_loss * log(Z)^2 at every weighted token. Parts: "nll" without it, and "body_nll" over body tokens.
    """
    nll, log_z = token_nll(logits, targets)
    parts = {"nll": jnp.sum(weighed(weights, nll)), "body_nll": jnp.sum(jnp.where(is_body, nll, 0.0))}
    return parts["nll"] + z_loss * jnp.sum(weights * log_z**2), parts
