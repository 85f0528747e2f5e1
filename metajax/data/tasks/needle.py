"""The needle: recall one item hidden in a long neutral text."""

from __future__ import annotations

import numpy as np

from metajax.config import Tasks
from metajax.data.tasks import task
from metajax.data.tasks.prompts import ASK, ITEMS, LISTS, NAMES, RECALL, Example, PromptTask


@task("needle")
class Needle(PromptTask):
    """A list of one item, at any depth of the neutral text (Hymba, arXiv 2411.13676, figure 10)."""

    stream = 4
    splits_by_filler = True  # without it there are only 48 examples

    @staticmethod
    def chance(sizes: Tasks) -> float:
        return 1 / len(LISTS[NAMES[0]])

    def write(self, rng: np.random.Generator, room: int) -> Example | None:
        [name] = self.pick(rng, NAMES, 1)
        [item] = self.pick(rng, ITEMS[name], 1)
        longest = self.costliest
        if room < self.costs(RECALL, ASK, " 1") + longest["head"] + longest["of"] + 2 * longest["item"]:
            return None
        return Example(((f"{name}:", item),), (RECALL, " 1", f" of {name}", ASK), (item,))
