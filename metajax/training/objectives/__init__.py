"""Objectives: what a train step minimises. One file each, registered by `@objective(NAME)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from metajax.core.registries import Registry

Batch = dict[str, jax.Array]
Means = dict[str, tuple[jax.Array, jax.Array]]  # {metric: (sum, weight)}; micro-batches add both, the metric is their ratio


def _unchanged(config: Any, batch: Batch, step: jax.Array, *frozen: Any) -> Batch:
    return batch


class Objective(NamedTuple):
    """What a train step minimises.

    loss(config, model, batch, *frozen): the metrics as `Means`; the one called "loss" is minimised. `frozen` is what the step reads besides
    the state and the batch and never changes, such as a reference model.
    prepare(config, batch, step, *frozen): the whole batch before it is cut into micro-batches; random draws belong here, so that
    `training.accumulate` changes no number.
    """

    loss: Callable[..., Means]
    prepare: Callable[..., Batch] = _unchanged


objectives: Registry[Objective] = Registry("objective", __name__)


def objective(name: str, *, prepare: Callable[..., Batch] = _unchanged) -> Callable[[Callable[..., Means]], Callable[..., Means]]:
    """Decorator: register a loss under the name that `training.objective` takes."""

    def register(loss: Callable[..., Means]) -> Callable[..., Means]:
        objectives.add(name, Objective(loss, prepare), loss.__module__)
        return loss

    return register
