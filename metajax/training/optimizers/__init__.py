"""Optimizers, one file each, registered by `@optimizer(NAME)`, and the learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from metajax.config import AnyConfig, Optimizer
from metajax.core.errors import require
from metajax.core.fields import changed
from metajax.core.registries import Registry

Make = Callable[[Optimizer, optax.Schedule, Any], optax.GradientTransformation]
optimizers: Registry[tuple[Make, tuple[str, ...]]] = Registry("optimizer", __name__)


def optimizer(name: str, *, ignores: tuple[str, ...] = ()) -> Callable[[Make], Make]:
    """Decorator: register (config, schedule, model) -> optax transformation under a name for `optimizer.name`.

    `ignores` names the fields of `optimizer` that it does not read; setting one is an error.
    """

    def register(make: Make) -> Make:
        optimizers.add(name, (make, ignores), make.__module__)
        return make

    return register


def unread_by_optimizer(config: AnyConfig) -> list[str]:
    """Dotted fields that the optimizer of a config ignores; UserError if one is not at its default, or for an unknown name."""
    name = config.optimizer.name
    _, ignores = optimizers.find(name, "optimizer.name")
    for field in ignores:
        is_default = field not in changed(config.optimizer)
        require(is_default, f"{config.name} would ignore optimizer.{field}: {name} does not read it; leave it out")
    return [f"optimizer.{field}" for field in ignores]


def schedule(optimizer: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by step. Warm-up is peak * (step + 1) / (warmup + 1), as in nanoGPT.

    cosine and linear fall to final_fraction * peak at the horizon and stay there. wsd holds the peak and falls linearly
    over the last `decay_share` of the horizon. constant holds the peak.
    """
    peak, floor = optimizer.learning_rate, optimizer.learning_rate * optimizer.final_fraction
    warmup, horizon, name = optimizer.warmup_steps, optimizer.horizon or steps, optimizer.schedule
    decay_from = max(warmup, round(horizon * (1 - optimizer.decay_share))) if name in ("wsd", "constant") else warmup

    def rate(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - decay_from) / max(horizon - decay_from, 1), 0.0, 1.0)
        cosine, linear = 0.5 * (1.0 + jnp.cos(jnp.pi * progress)), 1.0 - progress
        left = {"cosine": cosine, "linear": linear, "wsd": linear, "constant": jnp.ones_like(progress)}[name]
        return jnp.where(step < warmup, peak * (step + 1) / (warmup + 1), floor + (peak - floor) * left)

    return rate


def at_step(opt_state: Any, step: Any) -> Any:
    """The optimizer state with its schedule at `step`. A skipped step advances the schedule but not the update counts."""
    of_schedule = lambda path, _: getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"  # noqa: E731
    return optax.tree.set(opt_state, of_schedule, count=step)


def make_optimizer(config: AnyConfig, model: Any) -> optax.GradientTransformation:
    """The optimizer of a config, after clipping by the global norm. `model`, maybe abstract, has the parameters' logical axes.
    UserError for an unknown `optimizer.name`, or a field that this optimizer ignores."""
    unread_by_optimizer(config)
    cfg = config.optimizer
    make, _ = optimizers[cfg.name]
    tx = make(cfg, schedule(cfg, config.training.steps), model)
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), tx) if cfg.clip_norm > 0 else tx
