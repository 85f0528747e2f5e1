"""SIGTERM, sent before a machine is taken away, and Ctrl-C: save, and end after a step that all processes agree on."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from metajax.core.errors import Stopped
from metajax.core.interrupts import Interrupted


class Preemption:
    """Whether this run was asked to end. Several processes hear it through JAX, which names one step for all of them."""

    def __init__(self) -> None:
        self._asked: int | None = None  # the signal
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            alone = jax.process_count() == 1  # with several processes, JAX handles SIGTERM
            numbers = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)
            heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._ask) for number in heard}

    def _ask(self, number: int, _: Any) -> None:
        self._asked = number
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether to end after `step`; the same answer on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked is not None

    def end(self, state: str) -> Stopped:
        """The exception to raise, with the state of the run; after Ctrl-C no launcher repeats the command."""
        kind, why = (Interrupted, "Ctrl-C") if self._asked == signal.SIGINT else (Stopped, "SIGTERM")
        return kind(f"asked to end ({why}): {state}; the same command continues from there")

    def close(self) -> None:
        """Restore the signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
