"""The one jitted train step, and the evaluation step beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from metajax.config import Config
from metajax.distributed.rules import batch_sharding
from metajax.training.dpo import METRICS, preference_sums
from metajax.training.losses import token_nll, weighted_sums
from metajax.training.optimizers import at_step, schedule
from metajax.training.state import State

MODEL_INPUTS = ("tokens", "positions", "segment_ids", "meta_slots")
DEVICE_FIELDS = (*MODEL_INPUTS, "targets", "loss_weights", "is_body", "asks_metadata")  # what of a batch travels to the devices
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def apply_model(model: Any, batch: Batch) -> jax.Array:
    """Logits [B, T, V] of a batch."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    return model(inputs.pop("tokens"), **inputs)


def _loss_and_grad(model: Any, batch: Batch, config: Config, reference: Any) -> tuple[Metrics, Any]:
    """Sums over the batch, and the gradient of the loss sum, accumulated over micro-batches."""
    names = ("nll", "body_nll", "loss", *(("pairs", *METRICS) if config.dpo is not None else ()))

    def loss_sum(model: Any, micro: Batch) -> tuple[jax.Array, Metrics]:
        logits = apply_model(model, micro)
        total, parts = weighted_sums(logits, micro["targets"], micro["loss_weights"], micro["is_body"], config.optimizer.z_loss)
        if config.dpo is not None:
            nll, reference_nll = (token_nll(scores, micro["targets"])[0] for scores in (logits, apply_model(reference, micro)))
            total, pairs = preference_sums(nll, reference_nll, micro["loss_weights"], micro["segment_ids"], config.dpo.beta)
            parts |= pairs
        return total, parts | {"loss": total}

    value_and_grad = jax.value_and_grad(loss_sum, has_aux=True)
    pieces = config.training.accumulate
    if pieces == 1:
        (_, sums), grads = value_and_grad(model, batch)
        return sums, grads
    # Rows go to micro-batches in strides, so that each micro-batch keeps the batch's spread over the devices.
    micro_batches = jax.tree.map(lambda x: x.reshape(len(x) // pieces, pieces, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(carry: Any, micro: Batch) -> tuple[Any, None]:
        (_, sums), grads = value_and_grad(model, micro)
        return jax.tree.map(jnp.add, carry, (sums, grads)), None

    zero = dict.fromkeys(names, jnp.zeros(())), jax.tree.map(jnp.zeros_like, model)
    (sums, grads), _ = jax.lax.scan(add, zero, micro_batches)
    return sums, grads


def train_step(
    state: State, batch: Batch, reference: Any = None, *, config: Config, tx: optax.GradientTransformation
) -> tuple[State, Metrics]:
    """One optimiser step: gradient of the token-weighted mean loss over the whole batch, with `config.dpo` of the mean over its pairs.

    Metrics: loss (what is minimised), nll (nats a weighted token), body_nll (nats a body token), grad_norm before
    clipping, learning_rate, finite, kept, of pairs METRICS. A bad step (not finite, or its gradient norm above `runtime.max_grad_norm`)
    leaves parameters and optimiser untouched and sets `halted`, so the state that led to it is still there when the host, one step behind,
    notices; with `runtime.on_bad_step` "skip" the next step goes on from it, at the learning rate of its own number. `reference` is the
    frozen model of `config.dpo`.
    """
    sums, grads = _loss_and_grad(state.model, batch, config, reference)
    tokens = jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0)
    weight = jnp.maximum(sums["pairs"], 1.0) if config.dpo is not None else tokens
    grads = jax.tree.map(lambda g: g / weight, grads)
    updates, opt_state = tx.update(grads, at_step(state.opt_state, state.step), state.model)
    model = optax.apply_updates(state.model, updates)
    metrics = {
        "loss": sums["loss"] / weight,
        "nll": sums["nll"] / tokens,
        "body_nll": sums["body_nll"] / jnp.maximum(jnp.sum(batch["is_body"]), 1),
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": schedule(config.optimizer, config.training.steps)(state.step),
    } | {name: sums[name] / weight for name in METRICS if name in sums}
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    runtime = config.runtime
    good = finite & (metrics["grad_norm"] <= (runtime.max_grad_norm or jnp.inf))
    keep, skips = good & ~state.halted, runtime.on_bad_step == "skip"
    model, opt_state = jax.tree.map(lambda a, b: jnp.where(keep, a, b), (model, opt_state), (state.model, state.opt_state))
    step, halted = (state.step + 1, state.halted) if skips else (state.step + keep, ~keep)
    return State(model, opt_state, step, halted), metrics | {"finite": finite, "kept": keep}


def compile_train_step(
    config: Config, tx: optax.GradientTransformation, shardings: State, mesh: Mesh
) -> Callable[..., tuple[State, Metrics]]:
    """The jitted step with donated state; parameters in and out keep their shardings, metrics are replicated."""

    def step(state: State, batch: Batch, *frozen: Any) -> tuple[State, Metrics]:
        return train_step(state, batch, *frozen, config=config, tx=tx)

    places = (shardings, batch_sharding(mesh), *((shardings.model,) if config.dpo is not None else ()))
    return jax.jit(step, donate_argnums=0, in_shardings=places, out_shardings=(shardings, None))


def eval_step(model: Any, batch: Batch) -> Metrics:
    """Sums over a held-out batch: nats over body tokens and over metadata tokens, and how many there are of each."""
    nll, _ = token_nll(apply_model(model, batch), batch["targets"])
    sums = {}
    for name, asked in (("body", batch["is_body"]), ("metadata", batch["asks_metadata"])):
        sums |= {f"{name}_nll": jnp.sum(jnp.where(asked, nll, 0.0)), f"{name}_tokens": jnp.sum(asked)}
    return sums
