"""Multi-query associative recall: pairs of key and value, then every key once more among noise; its value is the target.

Source: Zoology (Arora et al., arXiv 2312.04927), a task that separates attention from recurrences. Keys and values are from
disjoint halves of the vocabulary. Queries follow the pairs at gaps from a power law with exponent 0.01; all other positions are
random. Nothing here is text: keys are from the lower half of a tokenizer's ordinary ids, values from the upper half.
"""

from __future__ import annotations

import numpy as np

from metajax.config import Tasks
from metajax.data.tasks import Encoded, SyntheticTask, is_test, task

POWER = 0.01
SHARE = 4  # least positions of a row per pair: the pair, and a query with one position of noise; published sizes have enough


@task("mqar")
class Mqar(SyntheticTask):
    """Test rows have the length of their bin and as many pairs as fit; training rows have a random length and number of pairs."""

    stream = 5
    shortest = SHARE

    @staticmethod
    def chance(sizes: Tasks) -> float:
        return 0.0  # all values of a row have to be right

    def draw(self, rng: np.random.Generator, split: str, lengths: tuple[int, int]) -> Encoded | None:
        low, high = lengths
        length = high if split == "test" else int(rng.integers(low, high + 1))
        most = min(self.sizes.pairs, length // SHARE)
        pairs = most if split == "test" else int(rng.integers(1, most + 1))
        half = self.tokenizer.vocabulary.base // 2
        keys, values = rng.choice(half, size=pairs, replace=False), half + rng.choice(half, size=pairs, replace=False)
        places = (length - 2 * pairs) // 2  # of two positions each: a query and noise
        # The first arrivals of as many Poisson processes: a weighted draw without replacement, in a third of rng.choice's time.
        arrivals = rng.exponential(size=places) / np.arange(1, places + 1) ** (POWER - 1.0)
        at = 2 * pairs + 2 * np.argsort(arrivals)[:pairs]
        ids = rng.integers(2 * half, size=length)
        ids[: 2 * pairs] = np.stack([keys, values], axis=1).ravel()
        ids[at] = keys
        targets, asked = np.zeros(length, np.int32), np.zeros(length, bool)
        targets[at], asked[at] = values, True
        core = " ".join(map(str, ids[: 2 * pairs].tolist()))
        if is_test(core) != (split == "test"):
            return None
        return Encoded(ids.astype(np.int32), targets, asked, asked, core, f"{core} ...")
