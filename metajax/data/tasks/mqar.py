"""Multi-query associative recall: pairs of a key and its value, then every key once more among noise, asking for its value.

Source: Zoology (Arora et al., arXiv 2312.04927), the task on which attention and recurrences come apart: keys and values from disjoint
halves of the vocabulary, queries behind the pairs at gaps that follow a power law of exponent 0.01, all other slots random. Nothing
here is text: keys are the lower half of a tokenizer's ordinary ids and values the upper half, whatever they stand for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from metajax.config import Tasks

POWER = 0.01
SLOTS = 4  # of a row for each pair: the pair, and a query with a slot of noise; all the published sizes have at least so many
SHORTEST = SLOTS


class Associations(NamedTuple):
    """ids, values: int32 [n], what is read and what each slot is asked for; asked: bool [n], the queries."""

    ids: np.ndarray
    values: np.ndarray
    asked: np.ndarray


def most_pairs(tasks: Tasks, length: int) -> int:
    """Pairs of a row of `length` slots, at most."""
    return min(tasks.pairs, length // SLOTS)


def recall_row(rng: np.random.Generator, length: int, pairs: int, vocabulary: int) -> Associations:
    """A row of `length` slots with `pairs` pairs, each queried once; needs length >= 4 pairs and vocabulary >= 2 pairs."""
    half = vocabulary // 2
    keys, values = rng.choice(half, size=pairs, replace=False), half + rng.choice(half, size=pairs, replace=False)
    places = (length - 2 * pairs) // 2  # of two slots: a query and noise
    # The first arrivals of as many Poisson processes: a draw by weight without replacement, at a third of rng.choice's time.
    arrivals = rng.exponential(size=places) / np.arange(1, places + 1) ** (POWER - 1.0)
    chosen = np.argsort(arrivals)[:pairs]
    ids = rng.integers(2 * half, size=length)
    ids[: 2 * pairs] = np.stack([keys, values], axis=1).ravel()
    at = 2 * pairs + 2 * chosen
    ids[at] = keys
    targets, asked = np.zeros(length, np.int32), np.zeros(length, bool)
    targets[at], asked[at] = values, True
    return Associations(ids.astype(np.int32), targets, asked)
