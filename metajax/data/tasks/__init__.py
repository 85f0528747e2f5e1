"""Synthetic tasks as training and evaluation rows (Learned Meta-Tokens, arXiv 2509.16278, section 4; needle, mqar: Hymba).

A module with `@task(NAME)` defines one task. To add a task, do the same in a file of `experiments/`.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np

from metajax.config import Tasks
from metajax.core.registries import Registry
from metajax.data.encoding import Tokenizer

task: Registry[type[SyntheticTask]] = Registry("task", __name__)
TEST_SHARE = 10  # one in ten is a test example, as in the paper (90,000 and 10,000)


class Encoded(NamedTuple):
    """An example as ids: input tokens, targets, the targets that carry loss, and those that are the answer.

    ids, targets: int32 [n]; asked (carries loss), answers: bool [n], `answers` without the end of the text; core: the content
    that decides between train and test, a text or an object with a `text`; text: the whole example.
    """

    ids: np.ndarray
    targets: np.ndarray
    asked: np.ndarray
    answers: np.ndarray
    core: Any
    text: str


class SyntheticTask(ABC):
    """One task with the sizes of a config, for one tokenizer."""

    stream: ClassVar[int | None] = None  # number of its random stream; None: a hash of its name
    shortest: int  # tokens of the smallest example, including BOS

    def __init__(self, sizes: Tasks, tokenizer: Tokenizer):
        self.sizes, self.tokenizer = sizes, tokenizer

    @staticmethod
    @abstractmethod
    def chance(sizes: Tasks) -> float:
        """Exact-match accuracy of the best guess from the question only."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, split: str, lengths: tuple[int, int]) -> Encoded | None:
        """Try once to draw an example of `split`, "train" or "test", with lengths[0] to lengths[1] tokens; None if it fails."""


def check_tasks(tasks: Tasks | None) -> None:
    """Raise UserError for an unknown task."""
    for name in tasks.names if tasks is not None else ():
        task.find(name, "tasks.names")


def is_test(core: Any) -> bool:
    """Whether an example is a test example, by a hash of only the text of `core`."""
    return zlib.crc32((core if isinstance(core, str) else core.text).encode()) % TEST_SHARE == 0
