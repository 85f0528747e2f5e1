"""Examples of the tasks as ids, and rows packed from them: both pure functions of their number.

Train and test are disjoint by construction: a hash of what an example is about (its lists, its bits, its text to copy, with
question and answer, neutral text apart but for the needle's) says which of the two it belongs to, whatever seed or phase draws it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from metajax.config import TASKS, Config, Tasks
from metajax.core.errors import require
from metajax.data.encoding import Tokenizer
from metajax.data.rows import Row, finish
from metajax.data.tasks.mqar import SHORTEST, most_pairs, recall_row
from metajax.data.tasks.prompts import MARK, PAUSE, Example, Writer

TEST_SHARE = 10  # one in ten is a test example, as 90,000 and 10,000 in the paper
ATTEMPTS = 2_000  # to draw an example of one split and of a wanted length
MISSES = 4  # examples that may fail to fit before a row is closed
PAUSES = 2  # meta-tokens of an example, at most
KINDS = TASKS


@dataclass(frozen=True)
class Encoded:
    """An example as ids: what is read, what each slot is asked for, where a question counts, and where its answer is.

    ids, targets: int32 [n]; asked, answers: bool [n], the second without the end of the text; core: what it is about; text: all of it.
    """

    ids: np.ndarray
    targets: np.ndarray
    asked: np.ndarray
    answers: np.ndarray
    core: Example | str
    text: str


def prompted(ids: list[int], answer: int, end: int, core: Example, text: str) -> Encoded:
    """BOS, prompt and answer, of which the last `answer` ids are asked for, and `end` behind them."""
    index = np.arange(len(ids))
    asked = index >= len(ids) - answer - 1  # the last token of the prompt asks for the answer's first
    targets = np.array([*ids[1:], end], np.int32)
    return Encoded(np.array(ids, np.int32), targets, asked, asked & (index < len(ids) - 1), core, text)


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
        """Tokens of the longest training example of a phase: its share of the way from the shortest to tasks.train_length, and not of one
        length alone, which the pieces of no example might add up to."""
        way = self.tasks.train_length - self.shortest(task)
        return self.shortest(task) + min(way, max(1, round(self.tasks.phases[phase] * way)))

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
        rng = np.random.default_rng([self.seed, KINDS.index(task), split == "test", part, n])
        draw = self._recall_row if task == "mqar" else self._prompt
        for _ in range(ATTEMPTS):
            example = draw(task, rng, split, lengths)
            if example is not None:
                return example
        low, high = lengths
        require(False, f"{task} has no {split} example of {low} to {high} tokens; choose greater lengths or sizes in tasks")

    def _prompt(self, task: str, rng: np.random.Generator, split: str, lengths: tuple[int, int]) -> Encoded | None:
        """One draw of a task in words; None where it is of the other split or has not the wanted length."""
        low, high = lengths
        room = int(rng.integers(low, high + 1)) - 1  # BOS has its own
        core = self._writer.write(task, rng, room)
        if core is not None and task == "needle":  # there are 48 of them: what is held out is the text that they lie in
            core = self._writer.fill(core, rng, room)
        if core is None or is_test(core) != (split == "test"):
            return None
        example = self._writer.fill(core, rng, room)
        pieces = [*self._placed(example, rng), *example.answer]
        ids = [self.tokenizer.vocabulary.bos, *(i for piece in pieces for i in self._ids(piece))]
        if not low <= len(ids) <= high:
            return None
        answer = sum(map(self._cost, example.answer))
        return prompted(ids, answer, self.tokenizer.vocabulary.eos, core, example.text)

    def _recall_row(self, task: str, rng: np.random.Generator, split: str, lengths: tuple[int, int]) -> Encoded | None:
        """One draw of mqar; test rows have the length of their bin and as many pairs as fit, training rows any number of both."""
        low, high = lengths
        length = high if split == "test" else int(rng.integers(low, high + 1))
        most = most_pairs(self.tasks, length)
        pairs = most if split == "test" else int(rng.integers(1, most + 1))
        row = recall_row(rng, length, pairs, self.tokenizer.vocabulary.base)
        told = " ".join(map(str, row.ids[: 2 * pairs].tolist()))
        if is_test(told) != (split == "test"):
            return None
        return Encoded(row.ids, row.values, row.asked, row.asked, told, f"{told} ...")

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
            while task != "mqar" and self._writer.write(task, np.random.default_rng(0), room) is None:
                room += 1
            found[task] = SHORTEST if task == "mqar" else room + 1
        return found


def is_test(core: Example | str) -> bool:
    """The side of the split, from the text alone."""
    return zlib.crc32((core if isinstance(core, str) else core.text).encode()) % TEST_SHARE == 0


# ---------------------------------------------------------------------------------------------------------- rows


def phase_of(step: int, steps: int, phases: int) -> int:
    """The curriculum's phase at a step: equal parts of the run; the last one goes on."""
    return min(phases - 1, step * phases // steps)


def assemble(examples: list[Encoded], length: int, tokenizer: Tokenizer, meta_slots: int | None) -> Row:
    """A finished row (see data/rows.py): one segment an example, loss on what it asks for, body = the answers alone.

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
        row["tokens"][at:end], row["targets"][at:end] = example.ids, example.targets
        row["loss_weights"][at:end] = example.asked
        row["is_body"][at:end] = example.answers
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
            example, pauses = self._example(task, phase, int(rng.integers(pool)))
            if len(example.ids) > left or pauses > pauses_left:
                misses += 1
                continue
            packed.append(example)
            left, pauses_left = left - len(example.ids), pauses_left - pauses
        meta_slots = config.row_meta_tokens if config.meta_tokens is not None else None
        return assemble(packed, length, self.examples.tokenizer, meta_slots)

    def _example(self, task: str, phase: int, n: int) -> tuple[Encoded, int]:
        """Training example n of a phase and its pauses: drawn once, since rows read the pool of their phase again and again."""
        pool = self._pools.setdefault(phase, {})
        if (task, n) not in pool:
            self._pools.pop(phase - 2, None)  # threads read ahead by less than a phase
            drawn = self.examples.training(task, phase, n)
            pauses = int((drawn.ids == self.examples.tokenizer.vocabulary.meta).sum())
            pool[task, n] = replace(drawn, core="", text=""), pauses  # a row needs the arrays alone
        return pool[task, n]

    @cached_property
    def _pools(self) -> dict[int, dict[tuple[str, int], tuple[Encoded, int]]]:
        return {}
