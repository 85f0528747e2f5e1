"""What a family of runs gives to the Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metajax.config import AnyConfig
from metajax.training.program import Program

if TYPE_CHECKING:
    from metajax.runs.directory import RunDirectory
    from metajax.training.trainer import Trained


class Task:
    """What is trained, on which batches, and how it is told. A family of runs is a subclass; `Trainer` does all the rest.

    The attributes are set by `__init__`, which opens the data and raises UserError, before the first step, for what could not be evaluated.
    """

    config: AnyConfig
    program: Program
    steps: int
    batches: Any  # a grain MapDataset: this host's rows of the batch of step s at index s
    data: str  # identifies what is read
    tokenizer: Any
    unit: str  # of the speed
    counted: str  # the name of that unit in `count`
    evaluates_every: int = 0  # steps between two calls of `score`; 0: none
    notes: tuple[str, ...] = ()  # warnings of the data, for the report

    def save_inputs(self, folder: Path) -> None:
        """Write what a checkpoint cannot be read without, such as the tokenizer, into the folder of the run."""
        self.tokenizer.save(folder)

    def start(self, model: Any, meta: Mapping[str, Any] | None) -> tuple[Any, tuple[Any, ...]]:
        """(parameters before the first step, what the step reads besides), on the devices.

        Args:
          model: fresh parameters, or those of the restored checkpoint.
          meta: of that checkpoint, with what `meta` returned when it was saved; None at a fresh start.
        """
        return model, ()

    def meta(self) -> dict[str, Any]:
        """JSON-ready values that every checkpoint holds besides the state."""
        return {}

    def ends_epoch(self, step: int) -> bool:
        """Whether `next_epoch` is called after this step, once its metrics have been read."""
        return False

    def next_epoch(self, model: Any, frozen: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the steps of the next epoch read besides state and batch."""
        return frozen

    def score(self, model: Any) -> tuple[float, dict[str, float]]:
        """(score, lower is better; numbers for the metrics) while training."""
        raise NotImplementedError

    def count(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """What a step on this host's rows has read, by name: `counted` and "flops" among them."""
        raise NotImplementedError

    def record(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """A step's metrics as they are written; UserError where they show that training is pointless."""
        return values

    def line(self, record: Mapping[str, float]) -> list[str]:
        """The parts of a line of the log that tell the metrics of a step."""
        return [f"{name} {value:.4g}" for name, value in record.items()]

    def report(self, trained: Trained, run: RunDirectory) -> dict[str, Any]:
        """The part of the report that the family knows: "eval", "parameters", "analyses", "sample" and "corpora" at least."""
        raise NotImplementedError
