"""Docstrings of Python files, by parsing only. This module imports nothing heavy, so worker processes start fast."""

from __future__ import annotations

import ast
import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Docstring:
    """One docstring. `name` is qualified within the module, and '' for the module itself."""

    module: str
    name: str
    kind: str  # module, class or function
    text: str
    local: bool = False  # defined inside a function, so it has no address


@dataclass(frozen=True)
class Module:
    """The docstrings of one file, and (source module, name or '*', alias) of each `from ... import`."""

    name: str
    docstrings: tuple[Docstring, ...]
    imports: tuple[tuple[str, str, str], ...]


def read_module(path: str, name: str, is_package: bool) -> Module:
    """Parse a file. A file that is not valid Python of this version (templates, old code) gives an empty module."""
    with open(path, "rb") as file:
        source = file.read()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return Module(name, (), ())
    found = [Docstring(name, "", "module", ast.get_docstring(tree) or "")]
    _visit(tree, name, "", False, found)
    return Module(name, tuple(d for d in found if d.text), tuple(_imports(tree, name, is_package)))


def _visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, module, prefix, local, found) -> None:
    """Collect definitions directly in a body. Those under `if` and `try` are skipped: they are variants of the same name."""
    for child in node.body:
        if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        is_class = isinstance(child, ast.ClassDef)
        name = f"{prefix}{child.name}"
        kind = "class" if is_class else "function"
        found.append(Docstring(module, name, kind, ast.get_docstring(child) or "", local))
        _visit(child, module, f"{name}.", local or not is_class, found)


def _imports(tree: ast.Module, module: str, is_package: bool) -> Iterable[tuple[str, str, str]]:
    parts = module.split(".")
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            up = node.level - is_package
            base = parts[: len(parts) - up] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield source, alias.name, alias.asname or alias.name


def public_names(modules: Iterable[Module]) -> dict[tuple[str, str], str]:
    """(module, top-level name) -> its shortest address through public modules only, found by following re-exports.

    `jax._src.numpy.lax_numpy.add` becomes `jax.numpy.add`. Names that no public module exports are absent.
    """
    modules = list(modules)
    onward: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for module in modules:
        for source, name, alias in module.imports:
            onward[source, name].append((module.name, alias))
    found = {}
    for module, name in {(d.module, d.name.split(".")[0]) for m in modules for d in m.docstrings if d.name}:
        if address := _shortest(module, name, onward):
            found[module, name] = address
    return found


def _shortest(module: str, name: str, onward: dict[tuple[str, str], list[tuple[str, str]]]) -> str:
    reached, waiting = {(module, name)}, [(module, name)]
    while waiting:
        here, known_as = waiting.pop()
        starred = [(there, known_as) for there, _ in onward.get((here, "*"), ()) if not known_as.startswith("_")]
        for step in itertools.chain(onward.get((here, known_as), ()), starred):
            if step not in reached:
                reached.add(step)
                waiting.append(step)
    public = [f"{m}.{n}" for m, n in reached if is_public(f"{m}.{n}") and m.split(".")[0] == module.split(".")[0]]
    return min(public, key=lambda address: (address.count("."), address), default="")


def is_public(address: str) -> bool:
    """Whether no part of the address starts with an underscore."""
    return not any(part.startswith("_") for part in address.split("."))
