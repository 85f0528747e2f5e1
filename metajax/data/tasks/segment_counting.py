"""Segment counting: how often does an item occur between two pauses?"""

from __future__ import annotations

import numpy as np

from metajax.config import Tasks
from metajax.data.tasks import task
from metajax.data.tasks.prompts import BETWEEN, COUNT, ITEMS, PAUSE, Example, PromptTask

CLASSES = 4  # answers: 0 .. CLASSES - 1, equally likely
LEAST = CLASSES - 1  # fewest items of a list
OUTSIDE = 0.25  # probability of the counted item at each position of its list outside the pauses


@task("segment_counting")
class SegmentCounting(PromptTask):
    """How often an item occurs between the two pauses of its list; it occurs outside of them too."""

    stream = 1

    @staticmethod
    def chance(sizes: Tasks) -> float:
        return 1 / CLASSES

    def write(self, rng: np.random.Generator, room: int) -> Example | None:
        fixed = self.costs(COUNT, BETWEEN, PAUSE, PAUSE) + self.costliest["item"] + self.costliest["number"]
        lists = self.named_lists(rng, room - fixed, LEAST)
        if lists is None:
            return None
        chosen = int(rng.integers(len(lists)))
        name, size = lists[chosen][0], len(lists[chosen][1])
        count = int(rng.integers(CLASSES))
        length = int(rng.integers(LEAST, size + 1))
        start = int(rng.integers(size - length + 1))
        item, *others = rng.permutation(ITEMS[name]).tolist()
        inside = [item] * count + self.pick(rng, others, length - count)
        outside = [item if u < OUTSIDE else word for u, word in zip(rng.random(size), self.pick(rng, others, size), strict=True)]
        segment = [inside[i] for i in rng.permutation(length)]
        line = (f"{name}:", *outside[:start], PAUSE, *segment, PAUSE, *outside[start + length :])
        lines = [line if i == chosen else (f"{n}:", *words) for i, (n, words) in enumerate(lists)]
        return Example(tuple(lines), (COUNT, item, BETWEEN), (f" {count}",))
