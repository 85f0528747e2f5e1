"""Several runs at a time: each in a process of its own, on its share of this machine's cores, and of the memory of its GPU.

A small model does not keep many cores or a large GPU busy: two runs side by side take less time than one after the other.
Sums are taken in another order than on all cores, so that numbers may differ from those of a run alone in their last digits.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any

from metajax.config import require

_GPU_MEMORY = 0.9  # the share of a GPU's memory that is taken; the rest is for its libraries


class Inline(Executor):
    """One at a time, here: what is submitted has been done when `submit` returns."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


def workers(count: int, start: Callable[[], None]) -> Executor:
    """`count` processes, each on every `count`-th core and one `count`-th of a GPU; `start` is called in each before its first work.

    Raises UserError when there are fewer cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    require(1 <= count <= len(cores), f"--jobs {count}: between 1 and the {len(cores)} cores of this machine")
    context = multiprocessing.get_context("spawn")  # a fork of a process that has threads may hang
    shares = context.SimpleQueue()
    for i in range(count):
        shares.put((cores[i::count], _GPU_MEMORY / count))
    return ProcessPoolExecutor(count, context, initializer=_begin, initargs=(shares, start))


def _begin(shares: Any, start: Callable[[], None]) -> None:
    cores, memory = shares.get()
    os.sched_setaffinity(0, cores)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{memory:.3f}")  # read when the GPU is first used
    start()
