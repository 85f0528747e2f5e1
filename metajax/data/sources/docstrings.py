"""Docstrings of Python files, by parsing only. This module imports nothing heavy, so worker processes start fast."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

Name = tuple[str, str]  # module, name in it


class Docstring(NamedTuple):
    """One docstring. `name` is qualified within the module, and '' for the module itself."""

    module: str
    name: str
    kind: str  # module, class or function
    text: str
    local: bool = False  # defined inside a function, so it has no address


class Module(NamedTuple):
    """The docstrings of one file, and (source module, name or '*', alias) of each `from ... import`."""

    name: str
    docstrings: list[Docstring]
    imports: list[tuple[str, str, str]]


def read_module(path: str, name: str, is_package: bool) -> Module:
    """Parse a file. A file that is not valid Python of this version (templates, old code) gives an empty module."""
    with open(path, "rb") as file:
        source = file.read()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return Module(name, [], [])
    found = [Docstring(name, "", "module", ast.get_docstring(tree) or ""), *_definitions(tree, name)]
    return Module(name, [docstring for docstring in found if docstring.text], list(_imports(tree, name, is_package)))


def _definitions(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, module: str, prefix: str = "", local: bool = False
) -> Iterator[Docstring]:
    """Definitions directly in a body. Those under `if` and `try` are skipped: they are variants of the same name."""
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            kind, name = "class" if isinstance(child, ast.ClassDef) else "function", f"{prefix}{child.name}"
            yield Docstring(module, name, kind, ast.get_docstring(child) or "", local)
            yield from _definitions(child, module, f"{name}.", local or kind == "function")


def _imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[str, str, str]]:
    parts = module.split(".")
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield source, alias.name, alias.asname or alias.name


def public_names(modules: Iterable[Module]) -> dict[Name, str]:
    """(module, top-level name) -> its shortest address through public modules only, found by following re-exports.

    `jax._src.numpy.lax_numpy.add` becomes `jax.numpy.add`. Names that no public module exports are absent.
    """
    modules = list(modules)
    onward: dict[Name, list[Name]] = defaultdict(list)
    for module in modules:
        for source, name, alias in module.imports:
            onward[source, name].append((module.name, alias))
    names = {(d.module, d.name.split(".")[0]) for m in modules for d in m.docstrings if d.name}
    return {name: address for name in names if (address := _shortest(name, onward))}


def _shortest(start: Name, onward: dict[Name, list[Name]]) -> str:
    reached, waiting = {start}, [start]
    while waiting:
        module, name = waiting.pop()
        steps = list(onward.get((module, name), ()))
        if not name.startswith("_"):
            steps += [(importer, name) for importer, _ in onward.get((module, "*"), ())]
        fresh = set(steps) - reached
        reached |= fresh
        waiting += fresh
    package = start[0].split(".")[0]
    public = [f"{module}.{name}" for module, name in reached if module.split(".")[0] == package and is_public(f"{module}.{name}")]
    return min(public, key=lambda address: (address.count("."), address), default="")


def is_public(address: str) -> bool:
    """Whether no part of the address starts with an underscore."""
    return not any(part.startswith("_") for part in address.split("."))
