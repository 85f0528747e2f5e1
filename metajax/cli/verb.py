"""The verbs of the command line, registered by a decorator."""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable
from typing import NamedTuple

Add = Callable[[argparse.ArgumentParser], None]
Act = Callable[[argparse.Namespace, float], int | None]  # (parsed options, start time of the command) -> exit code


class Verb(NamedTuple):
    """A verb: its function, and the function that adds its arguments. `--help` shows the docstring: a summary, then examples."""

    act: Act
    add: tuple[Add, ...]

    @property
    def summary(self) -> str:
        """The first line of the docstring, which `--help` lists."""
        line = inspect.getdoc(self.act).partition("\n")[0].rstrip(".")
        return line[0].lower() + line[1:]

    @property
    def examples(self) -> str:
        """The rest of the docstring."""
        return "examples:\n" + textwrap.indent(inspect.getdoc(self.act).partition("\n\n")[2], "  ")


_verbs: dict[str, Verb] = {}


def verb(name: str, *add: Add) -> Callable[[Act], Act]:
    """Register a function of a module of `metajax.cli.verbs` as a verb."""

    def register(act: Act) -> Act:
        _verbs[name] = Verb(act, add)
        return act

    return register


def verbs() -> dict[str, Verb]:
    """All verbs by name."""
    from metajax.cli import verbs as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_verbs.items()))
