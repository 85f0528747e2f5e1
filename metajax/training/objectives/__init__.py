"""Training objectives, one file each, registered by `@objective(NAME)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from metajax.core.registries import Registry

Batch = dict[str, jax.Array]
Means = dict[str, tuple[jax.Array, jax.Array]]  # {metric: (sum, weight)}, added over micro-batches; the metric is their ratio
Loss = Callable[..., Means]


class Objective(NamedTuple):
    """What a train step minimises.

    loss(config, model, batch, *frozen): the metrics as `Means`; the one named "loss" is minimised. `frozen` are inputs besides
    the state and the batch that never change, such as a reference model.
    prepare(config, batch, step, *frozen): transforms the whole batch before it is split into micro-batches. Random draws belong
    here, so that `training.accumulation_steps` does not affect the results.
    """

    loss: Loss
    prepare: Callable[..., Batch] | None = None


objectives: Registry[Objective] = Registry("objective", __name__)


def objective(name: str, *, prepare: Callable[..., Batch] | None = None) -> Callable[[Loss], Loss]:
    """Decorator: register a loss under a name for `training.objective`."""

    def register(loss: Loss) -> Loss:
        objectives.add(name, Objective(loss, prepare), loss.__module__)
        return loss

    return register
