"""List recall: which item is at a position of a named list?"""

from __future__ import annotations

import numpy as np

from metajax.config import Tasks
from metajax.data.tasks import task
from metajax.data.tasks.prompts import ASK, LISTS, NAMES, PAUSE, RECALL, Example, PromptTask


@task("list_recall")
class ListRecall(PromptTask):
    """Recall item j of one of several named lists; the pause follows the list that the question names."""

    stream = 0

    @staticmethod
    def chance(sizes: Tasks) -> float:
        return 1 / len(LISTS[NAMES[0]])

    def write(self, rng: np.random.Generator, room: int) -> Example | None:
        costliest = self.costliest
        fixed = self.costs(RECALL, ASK, PAUSE) + costliest["number"] + costliest["of"] + costliest["item"]
        lists = self.named_lists(rng, room - fixed, 2)
        if lists is None:
            return None
        name, items = lists[int(rng.integers(len(lists)))]
        at = int(rng.integers(len(items)))
        lines = [(f"{n}:", *words, *([PAUSE] if n == name else [])) for n, words in lists]
        return Example(tuple(lines), (RECALL, f" {at + 1}", f" of {name}", ASK), (items[at],))
