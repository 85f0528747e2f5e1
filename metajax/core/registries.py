"""Registries: things of one kind by name, each registered by a decorator in a file of its own."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from metajax.core.errors import nearest, require

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one kind by name, mostly classes or functions. An instance is also the decorator that registers one: `@source("jsonl")`.

    Modules of `package` are imported when a name is looked up, and not before. Another module registers its own by being imported, as
    the files of `experiments/` are.
    """

    def __init__(self, kind: str, package: str):
        self.kind, self.package = kind, package
        self._known: dict[str, T] = {}
        self._modules_of: dict[str, str] = {}

    def __call__(self, name: str) -> Callable[[T], T]:
        """The decorator for a name; UserError where another module has registered that name."""

        def register(made: T) -> T:
            self.add(name, made, made.__module__)
            return made

        return register

    def add(self, name: str, made: T, module: str) -> None:
        """Register what a module has made; UserError where another module has registered that name."""
        first = self._modules_of.setdefault(name, module)
        require(first == module, f"{self.kind} {name!r} is registered twice, in {first} and in {module}")
        self._known[name] = made

    def __getitem__(self, name: str) -> T:
        return self.find(name, self.kind)

    def names(self) -> list[str]:
        """Every name, sorted; imports the whole package."""
        for module in self._modules():
            importlib.import_module(module)
        return sorted(self._known)

    def find(self, name: str, where: str) -> T:
        """What is registered under a name; UserError that begins with `where` and has the nearest name otherwise."""
        if name not in self._known and f"{self.package}.{name}" in self._modules():
            importlib.import_module(f"{self.package}.{name}")
        if name not in self._known:
            names = self.names()
            require(name in names, f"{where}: unknown {self.kind} {name!r}{nearest(name, names)}; known: {', '.join(names)}")
        return self._known[name]

    def _modules(self) -> list[str]:
        path = importlib.import_module(self.package).__path__
        return [f"{self.package}.{info.name}" for info in pkgutil.iter_modules(path)]
