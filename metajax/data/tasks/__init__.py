"""Synthetic tasks as training and evaluation rows (Language Modeling with Learned Meta-Tokens, section 4; needle and mqar for Hymba).

Each module with `@task(NAME)` is one task. A task of your own is the same in a file of `experiments/`.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from metajax.config import Tasks
from metajax.core.registries import Registry
from metajax.data.encoding import Tokenizer

task: Registry[type[SyntheticTask]] = Registry("task", __name__)
TEST_SHARE = 10  # one in ten is a test example, as 90,000 and 10,000 in the paper


@dataclass(frozen=True)
class Encoded:
    """An example as ids: the tokens that are read, the targets, which targets are asked for, and which of them are the answer.

    ids, targets: int32 [n]; asked, answers: bool [n], `answers` without the end of the text; core: what it is about,
    text or with a `text`, which decides between train and test; text: all of it.
    """

    ids: np.ndarray
    targets: np.ndarray
    asked: np.ndarray
    answers: np.ndarray
    core: Any
    text: str


class SyntheticTask(ABC):
    """One task with the sizes of a config, for one tokenizer."""

    stream: ClassVar[int | None] = None  # number of its random stream; None: one made from its name

    def __init__(self, sizes: Tasks, tokenizer: Tokenizer):
        self.sizes, self.tokenizer = sizes, tokenizer

    @staticmethod
    @abstractmethod
    def chance(sizes: Tasks) -> float:
        """Exact-match accuracy of the best guess that ignores everything but the question."""

    @cached_property
    @abstractmethod
    def shortest(self) -> int:
        """Tokens of the smallest example, BOS included."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, split: str, lengths: tuple[int, int]) -> Encoded | None:
        """One try at an example of `split`, "train" or "test", and of lengths[0] to lengths[1] tokens; None where it fails."""


def is_test(core: Any) -> bool:
    """The side of the split, by a hash of the text of `core` alone."""
    return zlib.crc32((core if isinstance(core, str) else core.text).encode()) % TEST_SHARE == 0
