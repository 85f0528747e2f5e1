"""Registries: objects of one kind by name, each registered by a decorator in a separate file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from metajax.core.errors import nearest, require

T = TypeVar("T")
Decorated = TypeVar("Decorated")


class Registry(Generic[T]):
    """Objects of one kind by name, mostly classes or functions. An instance is also the decorator: `@source("jsonl")`.

    Modules of `package` are imported only when a name is looked up. A module elsewhere, such as a file of `experiments/`,
    registers its objects when it is imported.
    """

    def __init__(self, kind: str, package: str):
        self.kind, self.package = kind, package
        self._known: dict[str, T] = {}
        self._modules_of: dict[str, str] = {}

    def __call__(self, name: str) -> Callable[[Decorated], Decorated]:
        """The decorator for a name; see `add`."""

        def register(made: Decorated) -> Decorated:
            self.add(name, made, made.__module__)
            return made

        return register

    def add(self, name: str, made: Any, module: str) -> None:
        """Register an object of a module; raises UserError if another module has registered that name."""
        first = self._modules_of.setdefault(name, module)
        require(first == module, f"{self.kind} {name!r} is registered twice, in {first} and in {module}")
        self._known[name] = made

    def __getitem__(self, name: str) -> T:
        return self.find(name, self.kind)

    def names(self) -> list[str]:
        """All names, sorted; imports the whole package."""
        for module in self._modules():
            importlib.import_module(module)
        return sorted(self._known)

    def find(self, name: str, where: str) -> T:
        """The object of a name. For an unknown name, raises UserError that begins with `where` and gives the nearest name."""
        if name not in self._known and f"{self.package}.{name}" in self._modules():
            importlib.import_module(f"{self.package}.{name}")
        if name not in self._known:
            names = self.names()
            require(name in names, f"{where}: unknown {self.kind} {name!r}{nearest(name, names)}; known: {', '.join(names)}")
        return self._known[name]

    def _modules(self) -> list[str]:
        path = importlib.import_module(self.package).__path__
        return [f"{self.package}.{info.name}" for info in pkgutil.iter_modules(path)]
