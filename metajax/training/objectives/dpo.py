"""Direct preference optimisation (DPO) on pairs of answers, which are segments of one row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metajax.config import Config
from metajax.core.errors import UserError
from metajax.models.cross_entropy import weighed
from metajax.training.losses import token_scores
from metajax.training.objectives import Batch, Means, objective

Tokens = Float[Array, "B T"]
METRICS = ("margin", "accuracy", "chosen_reward")  # of `preference_sums`, sums over pairs


@objective("dpo")
def dpo(config: Config, model: Any, batch: Batch, reference: Any) -> Means:
    """`preference_sums` per pair, against the frozen `reference`; nll and body_nll as in the objective "language_model"."""
    if config.dpo is None:
        raise UserError("training.objective = 'dpo' needs its settings and a reference: set dpo.beta and init.from instead")
    weights, is_body = batch["loss_weights"], batch["is_body"]
    nll, reference_nll = (token_scores(m, batch).nll for m in (model, reference))
    total, pairs = preference_sums(nll, reference_nll, weights, batch["segment_ids"], config.dpo.beta)
    return {
        "loss": (total, pairs["pairs"]),
        "nll": (jnp.sum(weighed(weights, nll)), jnp.sum(weights)),
        "body_nll": (jnp.sum(jnp.where(is_body, nll, 0.0)), jnp.sum(is_body)),
        **{name: (pairs[name], pairs["pairs"]) for name in METRICS},
    }


def preference_sums(
    nll: Tokens, reference_nll: Tokens, weights: Tokens, segment_ids: Int[Array, "B T"], beta: float
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(sum over pairs of -log sigmoid(margin), parts): Rafailov et al., arXiv 2305.18290, equation 7.

    Segments 2p - 1 and 2p of a row are the chosen and the rejected answer to one prompt. An answer's reward is beta times the
    sum over its weighted tokens of log p - log p_reference, in nats. A pair's margin is the chosen minus the rejected reward.
    Parts, as sums over the batch: "pairs", "margin", "accuracy" (margins above 0), "chosen_reward".
    """
    reward = weighed(beta * weights, reference_nll - nll)
    is_chosen, pair = segment_ids % 2 == 1, (segment_ids + 1) // 2  # pair 0 is padding
    most = segment_ids.shape[1] // 4  # the shortest pair is two answers of BOS and one token
    by_pair = jax.vmap(lambda x, pair: jax.ops.segment_sum(x, pair, most + 1)[1:])
    margins = by_pair(jnp.where(is_chosen, reward, -reward), pair)
    exists = by_pair(jnp.ones_like(pair), pair) > 0
    parts = {
        "pairs": jnp.sum(exists, dtype=jnp.float32),
        "margin": jnp.sum(margins),
        "accuracy": jnp.sum(margins > 0, dtype=jnp.float32),
        "chosen_reward": jnp.sum(jnp.where(is_chosen, reward, 0.0)),
    }
    return -jnp.sum(jnp.where(exists, jax.nn.log_sigmoid(margins), 0.0)), parts
