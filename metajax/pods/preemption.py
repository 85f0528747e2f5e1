"""SIGTERM, which announces that a machine is taken away: save, and end where all processes agree to."""

from __future__ import annotations

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Whether this run was asked to end. Several processes hear it through JAX, which names one step for all of them."""

    def __init__(self) -> None:
        self._asked, self._before = False, None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def reached(self, step: int) -> bool:
        """Whether to end after `step`; the same answer on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def close(self) -> None:
        """SIGTERM means again what it meant before."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
