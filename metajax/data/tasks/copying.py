"""Copying: repeat the words between two pauses."""

from __future__ import annotations

import numpy as np

from metajax.config import Tasks
from metajax.data.tasks import task
from metajax.data.tasks.prompts import CLOSE, COPY, OPEN, PAUSE, TEXT, TEXT_HEAD, WORDS, Example, PromptTask


@task("copying")
class Copying(PromptTask):
    """The words between two pauses and brackets, inside a text."""

    stream = 3

    @staticmethod
    def chance(sizes: Tasks) -> float:
        return 1 / (sizes.span * len(TEXT))

    def write(self, rng: np.random.Generator, room: int) -> Example | None:
        left = room - self.costs(TEXT_HEAD, OPEN, PAUSE, PAUSE, CLOSE, COPY)
        free = left // (2 * self.costliest["word"])  # a word occurs in the text and in the answer
        if free < 1:
            return None
        span = self.pick(rng, WORDS, int(rng.integers(1, min(self.sizes.span, free) + 1)))
        text = self.words(rng, left - 2 * self.costs(*span), room)
        at = int(rng.integers(len(text) + 1))
        line = (TEXT_HEAD, *text[:at], OPEN, PAUSE, *span, PAUSE, CLOSE, *text[at:])
        return Example((line,), (COPY,), tuple(span))
