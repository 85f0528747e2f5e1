"""Ctrl-C: the first one ends the command in good order, the second one ends the process at once, whatever it is doing."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import NoReturn

from metajax.core.errors import Stopped

HINT_SECONDS = 2.0  # after the first Ctrl-C, before a line says what the second one would do


class Interrupted(Stopped, KeyboardInterrupt):
    """Ctrl-C ended a run in good order; the message says from which step the same command goes on."""

    EXIT_CODE = 130


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt in here; the second one ends the process with 130, without a word from Python or its libraries.

    Python runs signal handlers in its main thread alone, which may be inside a compilation or waiting for a collective. So a thread counts
    the signals. A process that ignores SIGINT, such as one in a script's background, goes on ignoring it.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)  # as set_wakeup_fd asks for
    handler, wakeup = signal.signal(signal.SIGINT, _interrupt), signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_count, args=(heard,), name="interrupts", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, handler)
        os.close(told)  # which ends the thread


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _count(heard: int) -> None:
    """Read the numbers of the signals that arrive; end the process at the second SIGINT."""
    count, hinted = 0, False
    while True:
        if count == 1 and not hinted and not select.select([heard], [], [], HINT_SECONDS)[0]:
            os.write(2, b"ending in good order; Ctrl-C again ends at once\n")
            hinted = True
        numbers = os.read(heard, 64)
        if not numbers:
            os.close(heard)
            return
        count += numbers.count(signal.SIGINT)
        if count > 1:
            _kill_children()
            # Straight to the terminal: a buffer may be locked by what is being left. A progress bar has hidden the cursor.
            os.write(2, b"\x1b[?25h\n" * os.isatty(2) + b"ended at once; what was not yet saved is lost\n")
            os._exit(Interrupted.EXIT_CODE)


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()


def leave(code: int) -> NoReturn:
    """End the process with the exit code of a command.

    After Ctrl-C nothing is waited for, such as threads that save. Several processes of one run still part from each other.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C from here on prints no traceback
    jax = sys.modules.get("jax")
    if code == Interrupted.EXIT_CODE and not (jax and jax.distributed.is_initialized()):
        _kill_children()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started in here do not hear Ctrl-C, which a terminal sends to all of a command's: who started them ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def be_deaf(*_: int) -> None:
    """The same for this process, which another library has started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def start_tracker() -> None:
    """The process that clears up what a killed one leaves does so without a warning."""
    given, sys.warnoptions = sys.warnoptions, [*sys.warnoptions, "ignore:resource_tracker:UserWarning"]
    resource_tracker.ensure_running()
    sys.warnoptions = given
