"""Training objectives, one file each, registered by `@objective(NAME)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from metajax.core.registries import Registry

Batch = dict[str, jax.Array]
Means = dict[str, tuple[jax.Array, jax.Array]]  # {metric: (sum, weight)}, added over micro-batches; the metric is their ratio


def _unchanged(config: Any, batch: Batch, step: jax.Array, *frozen: Any) -> Batch:
    return batch


class Objective(NamedTuple):
    """What a train step minimises.

    loss(config, model, batch, *frozen): the metrics as `Means`; the one named "loss" is minimised. `frozen` are inputs besides
    the state and the batch that never change, such as a reference model.
    prepare(config, batch, step, *frozen): transforms the whole batch before it is split into micro-batches. Random draws belong
    here, so that `training.accumulation_steps` does not affect the results.
    """

    loss: Callable[..., Means]
    prepare: Callable[..., Batch] = _unchanged


objectives: Registry[Objective] = Registry("objective", __name__)


def objective(name: str, *, prepare: Callable[..., Batch] = _unchanged) -> Callable[[Callable[..., Means]], Callable[..., Means]]:
    """Decorator: register a loss under a name for `training.objective`."""

    def register(loss: Callable[..., Means]) -> Callable[..., Means]:
        objectives.add(name, Objective(loss, prepare), loss.__module__)
        return loss

    return register
