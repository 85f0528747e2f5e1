"""Optimizers, registered by `@optimizer(NAME)`, their schedule, and which parameters each part of them reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from metajax.config import AnyConfig, Optimizer
from metajax.core.errors import nearest, require
from metajax.models.lm import decay_mask

# Logical axes of matrices that are not between hidden units: embeddings, heads, learned tokens, convolutions, rates.
NOT_HIDDEN = frozenset({"vocab", "positions", "classes", "features", "meta", "norm", "rate", "taps", "inputs"})
Make = Callable[[Optimizer, optax.Schedule, Any], optax.GradientTransformation]
OPTIMIZERS: dict[str, tuple[Make, tuple[str, ...]]] = {}


def optimizer(name: str, *, ignores: tuple[str, ...] = ()) -> Callable[[Make], Make]:
    """Decorator: register (config, schedule, model) -> optax transformation under a name for `optimizer.name`.

    Args:
      ignores: fields of `optimizer` that it does not read; a run that sets one is refused.
    """

    def register(make: Make) -> Make:
        OPTIMIZERS[name] = (make, ignores)
        return make

    return register


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
    """The optimizer's state with its schedule at `step`. A step that is left out advances the schedule, not the counts of updates."""
    of_schedule = lambda path, _: getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"  # noqa: E731
    return optax.tree.set(opt_state, of_schedule, count=step)


def make_optimizer(config: AnyConfig, model: Any) -> optax.GradientTransformation:
    """The optimizer of a config, after clipping by the global norm.

    Args:
      config: the experiment; `optimizer` and `training.steps` are read.
      model: the parameters with their logical axes; may be abstract.

    Raises:
      UserError: an unknown `optimizer.name`, or a field that this optimizer ignores.
    """
    cfg, default = config.optimizer, Optimizer()
    known = f"{nearest(cfg.name, OPTIMIZERS)}; known: {', '.join(sorted(OPTIMIZERS))}"
    require(cfg.name in OPTIMIZERS, f"optimizer.name: unknown {cfg.name!r}{known}")
    make, ignores = OPTIMIZERS[cfg.name]
    for field in ignores:
        same = getattr(cfg, field) == getattr(default, field)
        require(same, f"{config.name} would ignore optimizer.{field}: {cfg.name} does not read it; leave it out")
    tx = make(cfg, schedule(cfg, config.training.steps), model)
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), tx) if cfg.clip_norm > 0 else tx


@optimizer("adamw", ignores=("momentum", "ns_steps", "nesterov"))
def adamw(cfg: Optimizer, rate: optax.Schedule, model: Any) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101); weight decay leaves out norms, biases and rates (`decay_mask`)."""
    b1, b2 = cfg.betas
    return optax.adamw(rate, b1=b1, b2=b2, weight_decay=cfg.weight_decay, mask=decay_mask(model))


def hidden_matrices(model: Any) -> Any:
    """The model's pytree with a bool for each parameter: it is a matrix between hidden units, by its logical axes.

    Layers may be stacked, which adds leading axes that the metadata does not name.
    """

    def is_hidden(param: nnx.Variable) -> bool:
        axes = param.get_metadata()["axes"]
        return len(axes) == 2 and not NOT_HIDDEN & set(axes)

    return jax.tree.map(lambda p: p.replace(is_hidden(p)), model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


@optimizer("muon")
def muon_with_adamw(cfg: Optimizer, rate: optax.Schedule, model: Any) -> optax.GradientTransformation:
    """Muon (Jordan, 2024) on the matrices between hidden units, each layer of a stack by itself; AdamW on all other parameters."""
    each_matrix = lambda params: jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), params)  # noqa: E731
    matrices = muon(
        rate, ns_steps=cfg.ns_steps, beta=cfg.momentum, nesterov=cfg.nesterov, weight_decay=cfg.weight_decay,
        muon_weight_dimension_numbers=each_matrix,
    )  # fmt: skip
    labels = jax.tree.map(lambda hidden: "muon" if hidden else "adamw", hidden_matrices(model))
    # A function, because optax calls labels that can be called, and a model can.
    return optax.partition({"muon": matrices, "adamw": adamw(cfg, rate, model)}, lambda _: labels)
