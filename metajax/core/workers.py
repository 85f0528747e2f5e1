"""Several processes or runs at a time on this machine, each with a share of the cores and of the GPU memory.

A small model does not keep many cores or a large GPU busy: two parallel runs take less time than two sequential ones.
Sums are taken in another order than on all cores, so numbers may differ from those of a single run in their last digits.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any

from metajax.core.errors import require
from metajax.core.interrupts import deaf_children, start_tracker

ASK_AGAIN_SECONDS = 1.0  # between two SIGTERMs: a run saves on the first, its process ends on the next
_GPU_MEMORY = 0.9  # the share of a GPU's memory that the runs take; the rest is for its libraries


class Inline(Executor):
    """Runs calls one at a time in this process: a call is done when `submit` returns."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


@contextlib.contextmanager
def process_pool(count: int, begin: Callable[..., None] | None = None, *arguments: Any) -> Iterator[Executor]:
    """A pool of `count` processes, each started with begin(*arguments). Only the parent receives Ctrl-C. Then, or when it has
    ended, the workers get SIGTERM, on which runs save. After an error they finish the work that they have started."""
    context = multiprocessing.get_context("spawn")  # a fork of a process that has threads may hang
    start_tracker()
    executor = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(begin, *arguments))
    with executor:
        try:
            with deaf_children():
                for _ in range(count):
                    executor.submit(int)  # each starts a process
            yield executor
        except BaseException as error:
            executor.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
            while not isinstance(error, Exception) and (children := multiprocessing.active_children()):
                for child in children:
                    child.terminate()
                wait([child.sentinel for child in children], ASK_AGAIN_SECONDS)
            raise


def _begin(begin: Callable[..., None] | None, *arguments: Any) -> None:
    threading.Thread(target=_outlive, daemon=True).start()
    if begin is not None:
        begin(*arguments)


def _outlive() -> None:
    multiprocessing.parent_process().join()
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ASK_AGAIN_SECONDS)


def workers(count: int, start: Callable[[], None]) -> contextlib.AbstractContextManager[Executor]:
    """A pool of `count` processes, each on every `count`-th core and with 1/`count` of a GPU's memory. Each calls `start` first.

    Raises UserError if the machine has fewer cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    require(1 <= count <= len(cores), f"--jobs {count}: between 1 and the {len(cores)} cores of this machine")
    start_tracker()
    shares = multiprocessing.get_context("spawn").SimpleQueue()
    for i in range(count):
        shares.put((cores[i::count], _GPU_MEMORY / count))
    return process_pool(count, _share, shares, start)


def _share(shares: Any, start: Callable[[], None]) -> None:
    cores, memory = shares.get()
    os.sched_setaffinity(0, cores)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{memory:.3f}")  # read when the GPU is first used
    start()
