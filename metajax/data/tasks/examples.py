"""Examples of the tasks as ids, and rows packed from them. Both are pure functions of their number.

Train and test are disjoint by construction. A hash of an example's core decides its side, whatever seed or phase draws it.
The core is the lists, bits or text to copy, with question and answer. Only for the needle it includes the neutral text.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from metajax.config import Config, Tasks
from metajax.core.errors import UserError, require
from metajax.data.encoding import Tokenizer
from metajax.data.rows import Row, finish, joined
from metajax.data.tasks import Encoded, SyntheticTask, task

ATTEMPTS = 2_000  # at drawing an example of one split and a requested length
MISSES = 4  # examples that may fail to fit before a row is closed
TRAIN_EXAMPLES = 90_000  # of each task, divided among the phases
PAUSES = 2  # meta-tokens per example, at most


@dataclass(frozen=True)
class Examples:
    """Example n of (task, seed, split, phase or bin), for every n."""

    tasks: Tasks
    tokenizer: Tokenizer
    seed: int

    def training(self, name: str, phase: int, n: int) -> Encoded:
        """Training example n of a phase of the curriculum."""
        return self._draw(name, "train", phase, n, (self.shortest(name), self.longest(name, phase)))

    def test(self, name: str, length: int, n: int) -> Encoded:
        """Test example n of the bin `length`: length / 2 < tokens <= length."""
        return self._draw(name, "test", length, n, (max(length // 2 + 1, self.shortest(name)), length))

    def shortest(self, name: str) -> int:
        """Tokens of the task's smallest example, including BOS."""
        return self._tasks[name].shortest

    def longest(self, name: str, phase: int) -> int:
        """Tokens of the longest training example of a phase: the phase's share of the way from `shortest` to tasks.train_length.
        It exceeds `shortest` by at least 1 if it can, because the pieces of no example might add up to one exact length."""
        way = self.tasks.train_length - self.shortest(name)
        return self.shortest(name) + min(way, max(1, round(self.tasks.phases[phase] * way)))

    def check(self) -> None:
        """Raise UserError if a task has no example of a length in the config."""
        lengths = [("train_length", self.tasks.train_length), *(("eval_lengths", n) for n in self.tasks.eval_lengths)]
        for name, shortest in ((name, self.shortest(name)) for name in self.tasks.names):
            for setting, length in lengths:
                takes = f"the shortest example of {name} takes {shortest} tokens with {self.tokenizer.spec}"
                require(shortest <= length, f"tasks.{setting} = {length}: {takes}; choose a greater length")

    def _draw(self, name: str, split: str, part: int, n: int, lengths: tuple[int, int]) -> Encoded:
        drawn, (low, high) = self._tasks[name], lengths
        stream = zlib.crc32(name.encode()) if drawn.stream is None else drawn.stream
        rng = np.random.default_rng([self.seed, stream, split == "test", part, n])
        for _ in range(ATTEMPTS):
            if (example := drawn.draw(rng, split, lengths)) is not None:
                return example
        raise UserError(f"{name} has no {split} example of {low} to {high} tokens; choose greater lengths or sizes in tasks")

    @cached_property
    def _tasks(self) -> dict[str, SyntheticTask]:
        return {name: task.find(name, "tasks.names")(self.tasks, self.tokenizer) for name in self.tasks.names}


def phase_of(step: int, steps: int, phases: int) -> int:
    """The curriculum's phase at a step. Phases are equal parts of the run; the last one never ends."""
    return min(phases - 1, step * phases // steps)


def assemble(examples: list[Encoded], length: int, tokenizer: Tokenizer, meta_positions: int | None) -> Row:
    """A finished row (see data/rows.py): one segment per example, loss on `asked` targets, only the answers are body.

    meta_positions: M, the number of meta-tokens that the row can list; unused entries are `length`. None: the row lists none.
    """
    pieces = [{"tokens": e.ids, "targets": e.targets, "loss_weights": e.asked, "is_body": e.answers} for e in examples]
    row = joined(pieces, length, tokenizer.vocabulary.pad)
    if meta_positions is not None:
        used = np.flatnonzero(row["tokens"] == tokenizer.vocabulary.meta)
        row["meta_positions"] = np.concatenate([used, np.full(meta_positions - len(used), length)]).astype(np.int32)
    return finish(row, attend_across_documents=False)


@dataclass(frozen=True)
class TaskRows:
    """Training row n of a run, for every n: examples of the curriculum's phase at its step, drawn until the row is full.

    The text of a row depends only on tokenizer, tasks, row length, step and seed, so models with and without meta-attention
    read the same text. An example that does not fit is left out; after MISSES of them the row is closed.
    """

    config: Config
    examples: Examples
    pools: dict[int, dict[tuple[str, int], Encoded]] = field(default_factory=dict, compare=False)  # drawn examples, by phase

    def __call__(self, n: int) -> Row:
        config, tasks, tokenizer = self.config, self.examples.tasks, self.examples.tokenizer
        left, pauses_left = config.data.sequence_length, tasks.pauses(config.data.sequence_length)
        phase = phase_of(n // config.data.batch_size, config.training.steps, len(tasks.phases))
        rng = np.random.default_rng([self.examples.seed, n])
        pool = -(-TRAIN_EXAMPLES // len(tasks.phases))
        packed, misses = [], 0
        while misses < MISSES:
            name = tasks.names[int(rng.integers(len(tasks.names)))]
            example = self._example(name, phase, int(rng.integers(pool)))
            pauses = np.count_nonzero(example.ids == tokenizer.vocabulary.meta)
            if len(example.ids) > left or pauses > pauses_left:
                misses += 1
                continue
            packed.append(example)
            left, pauses_left = left - len(example.ids), pauses_left - pauses
        meta_positions = config.row_meta_tokens if config.meta_tokens is not None else None
        return assemble(packed, config.data.sequence_length, tokenizer, meta_positions)

    def _example(self, name: str, phase: int, n: int) -> Encoded:
        """Training example n of a phase, drawn once and kept, because rows read the pool of their phase often."""
        pool = self.pools.setdefault(phase, {})
        if (name, n) not in pool:
            self.pools.pop(phase - 2, None)  # threads read ahead by less than a phase
            pool[name, n] = self.examples.training(name, phase, n)._replace(core="", text="")  # a row needs only the arrays
        return pool[name, n]
