"""The verbs of the command line, registered by a decorator."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from metajax.core.registries import Registry

Add = Callable[[argparse.ArgumentParser], None]
Act = Callable[[argparse.Namespace, float], int | None]  # (parsed options, start time of the command) -> exit code
_verbs: Registry[tuple[Act, tuple[Add, ...]]] = Registry("verb", "metajax.cli.verbs")


def verb(name: str, *add: Add) -> Callable[[Act], Act]:
    """Register a function of a module of `metajax.cli.verbs` as a verb. `add` adds its arguments to a parser.

    `--help` shows the function's docstring: a summary, then examples.
    """

    def register(act: Act) -> Act:
        _verbs.add(name, (act, add), act.__module__)
        return act

    return register


def verbs() -> dict[str, tuple[Act, tuple[Add, ...]]]:
    """{name: (function, functions that add its arguments)} of all verbs."""
    return {name: _verbs[name] for name in _verbs.names()}
