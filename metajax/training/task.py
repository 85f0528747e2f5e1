"""The interface between a family of runs and the Trainer."""

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
    """What is trained, on which batches, and how it is reported. Each family of runs is a subclass; `Trainer` does the rest.

    `__init__` opens the data and sets the attributes. It raises UserError before the first step if the run cannot be evaluated.
    """

    config: AnyConfig
    program: Program
    steps: int
    batches: Any  # a grain MapDataset; index s is this host's rows of the batch of step s
    data: str  # identifies the data
    tokenizer: Any
    unit: str  # unit of the speed
    counted: str  # the name of that unit in `count`
    evaluates_every: int = 0  # steps between two calls of `score`; 0: none
    notes: tuple[str, ...] = ()  # warnings of the data, for the report

    def save_inputs(self, folder: Path) -> None:
        """Write what is needed to read a checkpoint, such as the tokenizer, into the run's folder."""
        self.tokenizer.save(folder)

    def start(self, model: Any, meta: Mapping[str, Any] | None) -> tuple[Any, tuple[Any, ...]]:
        """(parameters before the first step, frozen inputs of the step), on the devices. `model` has fresh parameters, or those of
        the restored checkpoint, whose metadata is `meta` with what `meta()` returned at the save; None at a fresh start."""
        return model, ()

    def meta(self) -> dict[str, Any]:
        """JSON-ready values to store in every checkpoint along with the state."""
        return {}

    def ends_epoch(self, step: int) -> bool:
        """Whether `next_epoch` is called after this step, when its metrics have been read."""
        return False

    def next_epoch(self, model: Any, frozen: tuple[Any, ...]) -> tuple[Any, ...]:
        """The frozen inputs for the steps of the next epoch."""
        return frozen

    def score(self, model: Any) -> tuple[float, dict[str, float]]:
        """Validate during training: (score, lower is better; values for the metrics)."""
        raise NotImplementedError

    def count(self, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Counts of what a step on this host's rows reads, by name, including `counted` and "flops"."""
        raise NotImplementedError

    def record(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """A step's metrics in the form to write; UserError if they show that training is pointless."""
        return values

    def line(self, record: Mapping[str, float]) -> list[str]:
        """The parts of a log line that report the metrics of a step."""
        return [f"{name} {value:.4g}" for name, value in record.items()]

    def report(self, trained: Trained, run: RunDirectory) -> dict[str, Any]:
        """The family's part of the report: at least "eval", "parameters", "analyses", "sample" and "corpora"."""
        raise NotImplementedError
