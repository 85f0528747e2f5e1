"""AdamW with decay masks, clipping and the schedules."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from metajax.config import Config, Optimizer


def schedule(optimizer: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by step. Warm-up is peak * (step + 1) / (warmup + 1), as in nanoGPT.

    cosine and linear fall to final_fraction * peak at the horizon and stay there; wsd holds the peak and falls linearly
    over the last `decay_share` of the horizon; constant holds it.
    """
    peak, floor = optimizer.learning_rate, optimizer.learning_rate * optimizer.final_fraction
    warmup, horizon = optimizer.warmup_steps, optimizer.horizon or steps
    decay_from = (
        warmup if optimizer.schedule in ("cosine", "linear") else max(warmup, round(horizon * (1 - optimizer.decay_share)))
    )

    def rate(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - decay_from) / max(horizon - decay_from, 1), 0.0, 1.0)
        left = {
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
            "linear": 1.0 - progress,
            "wsd": 1.0 - progress,
            "constant": jnp.ones_like(progress),
        }[optimizer.schedule]
        return jnp.where(step < warmup, peak * (step + 1) / (warmup + 1), floor + (peak - floor) * left)

    return rate


def at_step(opt_state: Any, step: Any) -> Any:
    """The optimiser's state with its schedule at `step`. A step that is left out moves the schedule on, and not Adam's count of updates."""
    of_schedule = lambda path, _: getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"  # noqa: E731
    return optax.tree.set(opt_state, of_schedule, count=step)


def make_optimizer(config: Config, decay_mask: Any) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW whose weight decay reaches the leaves that `decay_mask` marks.

    Args:
      config: the experiment; `optimizer` and `training.steps` are read.
      decay_mask: pytree of bools with the structure of the parameters.
    """
    optimizer = config.optimizer
    b1, b2 = optimizer.betas
    adamw = optax.adamw(
        schedule(optimizer, config.training.steps),
        b1=b1,
        b2=b2,
        weight_decay=optimizer.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw) if optimizer.clip_norm > 0 else adamw
