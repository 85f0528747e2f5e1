"""What the loop of image runs needs to know of a run: its batches, what it trains and beside what, its loss and its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax

DETAILS = "analysis/delta_tokens.json"  # in a run's folder: what the figures of its delta tokens are drawn from
Losses = tuple[jax.Array, dict[str, jax.Array]]  # what is minimised, and what else is logged


@dataclass(frozen=True)
class Task:
    """A run's recipe. loss(trained, frozen, batch, choice, key) -> (loss, metrics); `choice` is what may change between epochs."""

    steps: int
    epoch: int  # steps of one
    batches: Any  # of host arrays by step
    create: Callable[[jax.Array], Any]
    tx: optax.GradientTransformation
    rate: Callable[[Any], Any]  # step -> learning rate
    frozen: Any
    loss: Callable[..., Losses]
    evaluate: Callable[[Any], dict[str, Any]]  # trained -> results for the report; arrays of a figure under "details"
    images: str  # fingerprint of what is seen
    tokenizer: Any
    manifest: list[Mapping[str, Any]] = field(default_factory=list)
    choose: Callable[[Any], np.ndarray] | None = None  # trained -> the next epoch's `choice`
    choice: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # of the first epoch
