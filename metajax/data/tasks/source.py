"""Examples of the tasks as ids, and rows packed from them: both pure functions of their number.

Train and test are disjoint by construction: a hash of what an example is about (its lists, its bits, its text to copy, with
question and answer, neutral text apart) says which of the two it belongs to, whatever seed or phase draws it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from metajax.config import Config, Tasks, require
from metajax.data.rows import Row, finish
from metajax.data.tasks.prompts import MARK, PAUSE, Example, Writer
from metajax.data.tokenizers import Tokenizer

TEST_SHARE = 10  # one in ten is a test example, as 90,000 and 10,000 in the paper
ATTEMPTS = 2_000  # to draw an example of one split and of a wanted length
MISSES = 4  # examples that may fail to fit before a row is closed
PAUSES = 2  # meta-tokens of an example, at most
KINDS = Tasks.names


@dataclass(frozen=True)
class Encoded:
    """ids: int32 [n], BOS, prompt and answer; answer: how many of them are the answer; core: without neutral text; text: all of it."""

    ids: np.ndarray
    answer: int
    core: Example
    text: str


@dataclass(frozen=True)
class Examples:
    """Example n of (task, seed, split, phase or bin), for every n."""

    tasks: Tasks
    tokenizer: Tokenizer
    seed: int

    def training(self, task: str, phase: int, n: int) -> Encoded:
        """Training example n of a phase of the curriculum."""
        return self._draw(task, "train", phase, n, (self.shortest(task), self.longest(task, phase)))

    def test(self, task: str, length: int, n: int) -> Encoded:
        """Test example n of the bin of that length: length / 2 < tokens <= length."""
        return self._draw(task, "test", length, n, (max(length // 2 + 1, self.shortest(task)), length))

    def shortest(self, task: str) -> int:
        """Tokens of the task's smallest example, BOS included."""
        return self._shortest[task]

    def longest(self, task: str, phase: int) -> int:
        """Tokens of the longest training example of a phase: its share of the way from the shortest to tasks.train_length."""
        shortest = self.shortest(task)
        return shortest + round(self.tasks.phases[phase] * (self.tasks.train_length - shortest))

    def check(self) -> None:
        """UserError where a task has no example of the lengths that the config asks for."""
        for task in self.tasks.names:
            for name, length in (
                ("train_length", self.tasks.train_length),
                *(("eval_lengths", n) for n in self.tasks.eval_lengths),
            ):
                require(
                    self.shortest(task) <= length,
                    f"tasks.{name} = {length}: the shortest example of {task} takes {self.shortest(task)} tokens with "
                    f"{self.tokenizer.spec}; choose a greater length",
                )

    def _draw(self, task: str, split: str, part: int, n: int, lengths: tuple[int, int]) -> Encoded:
        low, high = lengths
        rng = np.random.default_rng([self.seed, KINDS.index(task), split == "test", part, n])
        for _ in range(ATTEMPTS):
            room = int(rng.integers(low, high + 1)) - 1  # BOS has its own
            core = self._writer.write(task, rng, room)
            if core is None or is_test(core) != (split == "test"):
                continue
            example = self._writer.fill(core, rng, room)
            pieces = [*self._placed(example, rng), *example.answer]
            ids = [self.tokenizer.vocabulary.bos, *(i for piece in pieces for i in self._ids(piece))]
            if low <= len(ids) <= high:
                return Encoded(np.array(ids, np.int32), sum(map(self._cost, example.answer)), core, example.text)
        require(False, f"{task} has no {split} example of {low} to {high} tokens; choose greater lengths or sizes in tasks")

    def _placed(self, example: Example, rng: np.random.Generator) -> list[str]:
        """The prompt with its pauses where `tasks.placement` has them; random ones stand neither first nor last."""
        prompt = list(example.prompt)
        if self.tasks.placement == "deliberate":
            return prompt
        marked = [MARK if piece == PAUSE else piece for piece in prompt]
        if self.tasks.placement == "random":
            for at in sorted(rng.integers(1, len(marked), size=prompt.count(PAUSE)).tolist(), reverse=True):
                marked.insert(at, PAUSE)
        return marked

    # ------------------------------------------------------------------------------------------------------ tokens

    @cached_property
    def _writer(self) -> Writer:
        return Writer(self.tasks, self._cost)

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        return {PAUSE: [self.tokenizer.vocabulary.meta]}

    def _ids(self, piece: str) -> list[int]:
        if piece not in self._known:
            self._known[piece] = self.tokenizer.encode(piece)
        return self._known[piece]

    def _cost(self, piece: str) -> int:
        if piece == PAUSE and self.tasks.placement != "deliberate":
            return len(self._ids(MARK)) + (self.tasks.placement == "random")
        return len(self._ids(piece))

    @cached_property
    def _shortest(self) -> dict[str, int]:
        """What fits does not depend on what is drawn (see Writer), so that the first room with an example is the least."""
        found = {}
        for task in self.tasks.names:
            room = 1
            while self._writer.write(task, np.random.default_rng(0), room) is None:
                room += 1
            found[task] = room + 1
        return found


def is_test(core: Example) -> bool:
    """The side of the split, from the text alone."""
    return zlib.crc32(core.text.encode()) % TEST_SHARE == 0


# ---------------------------------------------------------------------------------------------------------- rows


def phase_of(step: int, steps: int, phases: int) -> int:
    """The curriculum's phase at a step: equal parts of the run; the last one goes on."""
    return min(phases - 1, step * phases // steps)


def assemble(examples: list[Encoded], length: int, tokenizer: Tokenizer, meta_slots: int | None) -> Row:
    """A finished row (see data/rows.py): one segment an example, loss on the answer and the end behind it, body = the answer alone.

    meta_slots: M, how many meta-tokens the row has room for; unused ones point at `length`. None: the row does not list them.
    """
    vocabulary = tokenizer.vocabulary
    row: Row = {
        "tokens": np.full(length, vocabulary.pad, np.int32),
        "targets": np.full(length, vocabulary.pad, np.int32),
        "loss_weights": np.zeros(length, np.float32),
        "is_body": np.zeros(length, bool),
        "is_metadata": np.zeros(length, bool),
        "asks_metadata": np.zeros(length, bool),
        "segment_ids": np.zeros(length, np.int32),
    }
    at = 0
    for segment, example in enumerate(examples, 1):
        end = at + len(example.ids)
        asked = end - example.answer - 1  # the last token of the prompt asks for the answer's first
        row["tokens"][at:end] = example.ids
        row["targets"][at:end] = np.append(example.ids[1:], vocabulary.eos)
        row["loss_weights"][asked:end] = 1.0
        row["is_body"][asked : end - 1] = True
        row["segment_ids"][at:end] = segment
        at = end
    if meta_slots is not None:
        used = np.flatnonzero(row["tokens"] == vocabulary.meta)
        row["meta_slots"] = np.concatenate([used, np.full(meta_slots - len(used), length)]).astype(np.int32)
    return finish(row, attend_across_documents=False)


@dataclass(frozen=True)
class TaskRows:
    """Training row n of a run, for every n: examples of the curriculum's phase at its step, drawn until the row is full.

    The strings of a row depend on nothing but tokenizer, tasks, row length, step and seed: models with and without meta-attention
    read the same. An example that does not fit is left out, and after MISSES of them the row is closed.
    """

    config: Config
    examples: Examples

    def __call__(self, n: int) -> Row:
        config, tasks = self.config, self.config.tasks
        length, pauses_left = config.data.row_length, tasks.pauses(config.data.row_length)
        phase = phase_of(n // config.data.batch_rows, config.training.steps, len(tasks.phases))
        rng = np.random.default_rng([self.examples.seed, n])
        pool = -(-tasks.train_examples // len(tasks.phases))
        packed, left, misses = [], length, 0
        while misses < MISSES:
            task = tasks.names[int(rng.integers(len(tasks.names)))]
            example = self.examples.training(task, phase, int(rng.integers(pool)))
            pauses = int((example.ids == self.examples.tokenizer.vocabulary.meta).sum())
            if len(example.ids) > left or pauses > pauses_left:
                misses += 1
                continue
            packed.append(example)
            left, pauses_left = left - len(example.ids), pauses_left - pauses
        meta_slots = config.row_meta_tokens if config.meta_tokens is not None else None
        return assemble(packed, length, self.examples.tokenizer, meta_slots)
