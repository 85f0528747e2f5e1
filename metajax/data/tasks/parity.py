"""Parity: the exclusive or of the bits before a pause."""

from __future__ import annotations

import numpy as np

from metajax.config import Tasks
from metajax.data.tasks import task
from metajax.data.tasks.prompts import BITS, BITS_HEAD, PARITY, PAUSE, Example, PromptTask


@task("parity")
class Parity(PromptTask):
    """The exclusive or of all bits before the pause. Bits after the pause fill the rest of the line: with few of them, a model
    could memorise the training lines."""

    stream = 2

    @staticmethod
    def chance(sizes: Tasks) -> float:
        return 1 / 2

    def write(self, rng: np.random.Generator, room: int) -> Example | None:
        bit = self.costliest["bit"]
        free = (room - self.costs(BITS_HEAD, PAUSE, PARITY) - bit) // bit
        if free < 1:
            return None
        before = int(rng.integers(1, min(self.sizes.bits, free) + 1))
        bits = rng.integers(2, size=free).tolist()
        shown = [BITS[b] for b in bits]
        line = (BITS_HEAD, *shown[:before], PAUSE, *shown[before:])
        return Example((line,), (PARITY,), (BITS[sum(bits[:before]) % 2],))
