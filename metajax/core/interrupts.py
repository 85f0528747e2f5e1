"""Ctrl-C: the first one ends the command cleanly, the second one ends the process at once, whatever it is doing."""

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
from typing import NoReturn

from metajax.core.errors import Stopped

HINT_SECONDS = 2.0  # after the first Ctrl-C, until a line explains what a second one does


class Interrupted(Stopped, KeyboardInterrupt):
    """Ctrl-C ended a run cleanly. The message gives the step from which the same command continues."""

    EXIT_CODE = 130


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """In this context Ctrl-C raises KeyboardInterrupt; the second one ends the process with 130 and prints no traceback.

    Python runs signal handlers only in its main thread, which may be compiling or waiting for a collective.
    So a thread counts the signals. A process that ignores SIGINT, such as a background job of a script, still ignores it.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)  # required by set_wakeup_fd
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    wakeup = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_count, args=(heard,), name="interrupts", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, handler)
        os.close(told)  # which ends the thread


def _count(heard: int) -> None:
    """Read the numbers of the signals that arrive; end the process at the second SIGINT."""
    count, hinted = 0, False
    while True:
        if count == 1 and not hinted and not select.select([heard], [], [], HINT_SECONDS)[0]:
            os.write(2, b"ending cleanly; a second Ctrl-C ends at once\n")
            hinted = True
        numbers = os.read(heard, 64)
        if not numbers:
            os.close(heard)
            return
        count += numbers.count(signal.SIGINT)
        if count > 1:
            _kill_children()
            # Unbuffered, because interrupted code may hold a buffer's lock. The escape shows a cursor that a progress bar hid.
            os.write(2, b"\x1b[?25h\n" * os.isatty(2) + b"ended at once; what was not yet saved is lost\n")
            os._exit(Interrupted.EXIT_CODE)


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()


def leave(code: int) -> NoReturn:
    """End the process with the exit code of a command.

    After Ctrl-C it waits for nothing, such as threads that save. The processes of a distributed run still disconnect first.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a later Ctrl-C prints no traceback
    jax = sys.modules.get("jax")
    if code == Interrupted.EXIT_CODE and not (jax and jax.distributed.is_initialized()):
        _kill_children()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started in this context ignore Ctrl-C, which a terminal sends to all processes. Their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def be_deaf(*_: int) -> None:
    """Ignore Ctrl-C in this process, which another library has started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def start_tracker() -> None:
    """Start the resource tracker, which cleans up after killed processes, with its warnings off."""
    given, sys.warnoptions = sys.warnoptions, [*sys.warnoptions, "ignore:resource_tracker:UserWarning"]
    resource_tracker.ensure_running()
    sys.warnoptions = given
