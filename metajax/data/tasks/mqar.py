"""Multi-query associative recall: pairs of a key and its value, then every key once more among noise, asking for its value.

Source: Zoology (Arora et al., arXiv 2312.04927), the task on which attention and recurrences come apart: keys and values from disjoint
halves of the vocabulary, queries after the pairs at gaps that follow a power law of exponent 0.01, all other positions random. Nothing
here is text: keys are the lower half of a tokenizer's ordinary ids and values the upper half.
"""

from __future__ import annotations

import numpy as np

from metajax.config import Tasks
from metajax.data.tasks import Encoded, SyntheticTask, is_test, task

POWER = 0.01
SHARE = (
    4  # positions of a row for each pair: the pair, and a query with one of noise; all the published sizes have at least so many
)


@task("mqar")
class Mqar(SyntheticTask):
    """Test rows have the length of their bin and as many pairs as fit; training rows any number of both."""

    stream = 5

    @staticmethod
    def chance(sizes: Tasks) -> float:
        return 0.0  # all values of a row at once

    shortest = SHARE

    def draw(self, rng: np.random.Generator, split: str, lengths: tuple[int, int]) -> Encoded | None:
        low, high = lengths
        length = high if split == "test" else int(rng.integers(low, high + 1))
        most = min(self.sizes.pairs, length // SHARE)
        pairs = most if split == "test" else int(rng.integers(1, most + 1))
        half = self.tokenizer.vocabulary.base // 2
        keys, values = rng.choice(half, size=pairs, replace=False), half + rng.choice(half, size=pairs, replace=False)
        places = (length - 2 * pairs) // 2  # of two positions: a query and noise
        # The first arrivals of as many Poisson processes: a draw by weight without replacement, at a third of rng.choice's time.
        arrivals = rng.exponential(size=places) / np.arange(1, places + 1) ** (POWER - 1.0)
        at = 2 * pairs + 2 * np.argsort(arrivals)[:pairs]
        ids = rng.integers(2 * half, size=length)
        ids[: 2 * pairs] = np.stack([keys, values], axis=1).ravel()
        ids[at] = keys
        targets, asked = np.zeros(length, np.int32), np.zeros(length, bool)
        targets[at], asked[at] = values, True
        told = " ".join(map(str, ids[: 2 * pairs].tolist()))
        if is_test(told) != (split == "test"):
            return None
        return Encoded(ids.astype(np.int32), targets, asked, asked, told, f"{told} ...")
