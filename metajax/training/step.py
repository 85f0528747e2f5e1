"""The one train step of all families, and the evaluation step of language models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from metajax.config import AnyConfig
from metajax.training.losses import MODEL_INPUTS, token_scores
from metajax.training.objectives import Batch, Means, Objective
from metajax.training.optimizers import at_step
from metajax.training.state import State

DEVICE_FIELDS = (*MODEL_INPUTS, "targets", "loss_weights", "is_body", "asks_metadata")  # of a text batch, copied to the devices
Metrics = dict[str, jax.Array]
Transformation = optax.GradientTransformation


def _means_and_grads(loss: Any, model: Any, batch: Batch, pieces: int) -> tuple[Means, Any]:
    """The metrics over a batch, and the gradient of the sum of losses, accumulated over `pieces` micro-batches."""

    def total(model: Any, micro: Batch) -> tuple[jax.Array, Means]:
        means = loss(model, micro)
        return means["loss"][0], means

    grad = jax.grad(total, has_aux=True)
    if pieces == 1:
        grads, means = grad(model, batch)
        return means, grads
    # Rows are assigned to micro-batches with a stride, so that each micro-batch keeps the sharding of the batch.
    micro_batches = jax.tree.map(lambda x: x.reshape(len(x) // pieces, pieces, *x.shape[1:]).swapaxes(0, 1), batch)
    one = jax.tree.map(lambda x: x[0], micro_batches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad, model, one))
    add = lambda sums, micro: (jax.tree.map(jnp.add, sums, grad(model, micro)), None)  # noqa: E731
    (grads, means), _ = jax.lax.scan(add, zeros, micro_batches)
    return means, grads


def train_step(
    state: State, batch: Batch, *frozen: Any, config: AnyConfig, tx: Transformation, rate: optax.Schedule, objective: Objective
) -> tuple[State, Metrics]:
    """One optimizer step on the gradient of the objective's mean loss over the whole batch.

    Metrics: those of the objective, grad_norm before clipping, learning_rate, finite, kept. A bad step (not finite, or gradient
    norm above `runtime.max_grad_norm`) changes neither parameters nor optimizer. It sets `halted`, which keeps the state until
    the host notices, one step later. With `runtime.on_bad_step` "skip", training continues at the learning rate of the step.

    Args:
      frozen: further inputs of the objective, such as a reference model.
      rate: the learning rate by step, which is logged; `tx` applies its own schedule.
    """
    if objective.prepare is not None:
        batch = objective.prepare(config, batch, state.step, *frozen)
    loss = lambda model, micro: objective.loss(config, model, micro, *frozen)  # noqa: E731
    means, grads = _means_and_grads(loss, state.model, batch, config.training.accumulation_steps)
    weights = {name: jnp.maximum(weight, 1) for name, (_, weight) in means.items()}
    grads = jax.tree.map(lambda g: g / weights["loss"], grads)
    metrics = {name: total / weights[name] for name, (total, _) in means.items()}
    grad_norm, runtime = jnp.asarray(optax.tree.norm(grads)), config.runtime
    metrics |= {"grad_norm": grad_norm, "learning_rate": jnp.asarray(rate(state.step))}
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    good = finite & (grad_norm <= (runtime.max_grad_norm or jnp.inf))
    keep, skips = good & ~state.halted, runtime.on_bad_step == "skip"
    before = state.model, state.opt_state

    def update() -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, at_step(state.opt_state, state.step), state.model)
        return optax.apply_updates(state.model, updates), opt_state

    model, opt_state = jax.lax.platform_dependent(
        cpu=lambda: jax.lax.cond(keep, update, lambda: before),  # a select writes the whole state once more
        default=lambda: jax.tree.map(lambda a, b: jnp.where(keep, a, b), update(), before),  # fused with the update
    )
    step, halted = (state.step + 1, state.halted) if skips else (state.step + keep, ~keep)
    return State(model, opt_state, step, halted), metrics | {"finite": finite, "kept": keep}


def eval_step(model: Any, batch: Batch) -> Metrics:
    """Sums over a validation batch: nats over body tokens and over metadata tokens, and the number of each."""
    nll = token_scores(model, batch).nll
    sums = {}
    for name, asked in (("body", batch["is_body"]), ("metadata", batch["asks_metadata"])):
        sums |= {f"{name}_nll": jnp.sum(jnp.where(asked, nll, 0.0)), f"{name}_tokens": jnp.sum(asked)}
    return sums
