"""Several runs at a time: each in a process of its own, on its share of this machine's cores.

A small model does not keep many cores busy: two runs side by side on one core each take less time than one after the other on both.
Sums are taken in another order than on all cores, so that numbers may differ from those of a run alone in their last digits.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any

from metajax.config import require


class Inline(Executor):
    """One at a time, here: what is submitted has been done when `submit` returns."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


def workers(count: int, start: Callable[[], None]) -> Executor:
    """`count` processes, each on every `count`-th core; `start` is called in each before its first work.

    Raises UserError when there are fewer cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    require(1 <= count <= len(cores), f"--jobs {count}: between 1 and the {len(cores)} cores of this machine")
    context = multiprocessing.get_context("spawn")  # a fork of a process that has threads may hang
    shares = context.SimpleQueue()
    for i in range(count):
        shares.put(cores[i::count])
    return ProcessPoolExecutor(count, context, initializer=_begin, initargs=(shares, start))


def _begin(shares: Any, start: Callable[[], None]) -> None:
    os.sched_setaffinity(0, shares.get())
    start()
