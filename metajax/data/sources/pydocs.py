"""The corpus that needs no download: docstrings of the installed standard library, numpy, scipy and jax.

Files are parsed, never imported. Docstrings of at least 20 words are kept, each text once, in the order standard library,
numpy, scipy, jax, then path, then line. The corpus depends on the installed versions, which its manifest names. Losses on
different versions are not comparable.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from typing import Any

from metajax.core.errors import UserError, nearest
from metajax.core.progress import progress, say
from metajax.core.sealed import FORMAT
from metajax.core.workers import process_pool
from metajax.data.documents import Document
from metajax.data.sources import Request, source
from metajax.data.sources.built import BuiltCorpus, open_or_build
from metajax.data.sources.docstrings import Docstring, Module, is_public, public_names, read_module
from metajax.data.sources.files import file_entry

STDLIB = "stdlib"
DEFAULT_PARTS = (STDLIB, "numpy", "scipy", "jax")
RECIPE = 1  # raise when a change below changes the documents
MIN_WORDS = 20
_FILES_FOR_POOL = 400  # below this, starting processes costs more than it saves
_SITE_FOLDERS = ("site-packages", "dist-packages")
_LEFT_OUT = ("idle_test", "lib2to3")  # besides test*: the tests of IDLE, and a parser that Python 3.13 removed


@dataclass(frozen=True)
class File:
    """A Python file of a part, and its module."""

    part: str
    path: str
    module: str
    is_package: bool


@source("pydocs")
def open_pydocs(request: Request) -> BuiltCorpus:
    """pydocs[:PART+PART...]; without parts, all four default ones. Built on first use and cached.

    A part is `stdlib` or any top-level module or package. Raises UserError if one is not installed.
    """
    request.refuse_options()
    parts = tuple(dict.fromkeys(p.strip() for p in request.path.split("+") if p.strip())) or DEFAULT_PARTS
    files = [file for part in parts for file in python_files(part)]
    versions = {"python": platform.python_version(), **_versions(parts, files)}
    key = hashlib.sha256(json.dumps([FORMAT, RECIPE, parts, versions]).encode()).hexdigest()

    def build() -> tuple[list[Document], dict[str, Any]]:
        return build_documents(files, versions)

    return open_or_build(request.spec, "pydocs", key, request.cache_dir, build)


def python_files(part: str) -> list[File]:
    """The .py files of a part in path order, without test folders; raises UserError if the part is not installed."""
    library = sysconfig.get_path("stdlib")
    if part == STDLIB:
        return sorted(_walk(part, library, library), key=lambda file: file.path)
    found = PathFinder.find_spec(part) if part.isidentifier() else None
    compiled = part in sys.builtin_module_names or (found is not None and str(found.origin).endswith((".so", ".pyd")))
    if compiled:
        raise UserError(f"pydocs: {part!r} is compiled, so its docstrings cannot be read without importing it; leave it out")
    if found is None:
        known = sorted(sys.stdlib_module_names) + list(DEFAULT_PARTS)
        raise UserError(
            f"pydocs: {part!r} is not an installed top-level module{nearest(part, known)}; install it or leave it out"
        )
    if found.submodule_search_locations:
        root = next(iter(found.submodule_search_locations))
        return sorted(_walk(part, root, os.path.dirname(root)), key=lambda file: file.path)
    return [File(part, found.origin, part, False)]


def _walk(part: str, root: str, base: str) -> Iterator[File]:
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not _left_out(f) and f not in _SITE_FOLDERS]
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                relative = os.path.relpath(path, base).removesuffix(".py").split(os.sep)
                is_package = relative[-1] == "__init__"
                yield File(part, path, ".".join(relative[:-1] if is_package else relative), is_package)


def _left_out(folder: str) -> bool:
    """Whether a folder is left out: mostly tests. `testing` is a public module of numpy, so it stays."""
    return (folder.startswith("test") and folder != "testing") or folder in _LEFT_OUT


def _versions(parts: Sequence[str], files: Sequence[File]) -> dict[str, str]:
    """The version of each part outside the standard library. Packages other than the default ones also have a digest of their
    files, because a package that is installed for development changes under the same version."""
    distributions = metadata.packages_distributions()
    versions = {}
    for part in parts:
        named = metadata.version(distributions[part][0]) if part in distributions else "unversioned"
        if part in DEFAULT_PARTS[1:]:
            versions[part] = named
        elif part != STDLIB and part not in sys.stdlib_module_names:
            content = [(file.module, file_entry(file.path)["sha256"]) for file in files if file.part == part]
            versions[part] = f"{named} {hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}"
    return versions


def _read(file: File) -> Module:
    return read_module(file.path, file.module, file.is_package)


def _read_all(files: Sequence[File]) -> list[Module]:
    if len(files) < _FILES_FOR_POOL:
        return [_read(file) for file in files]
    title = f"pydocs: reading docstrings of {len(files)} Python files (once)"
    say(title)
    with process_pool(os.cpu_count() or 1) as pool:
        results = []
        with progress("pydocs", len(files), plain_lines=False) as advance:
            for module in pool.map(_read, files, chunksize=32):
                results.append(module)
                advance(1)
        return results


def build_documents(files: Sequence[File], versions: dict[str, str]) -> tuple[list[Document], dict[str, Any]]:
    """Documents in order, each text once, and the manifest's versions, recipe and counts by part."""
    modules = _read_all(files)
    addresses = public_names(modules)
    seen: set[str] = set()
    documents, parts = [], {file.part: {"documents": 0, "words": 0} for file in files}
    for file, module in zip(files, modules, strict=True):
        for docstring in module.docstrings:
            words = len(docstring.text.split())
            if words < MIN_WORDS or docstring.text in seen:
                continue
            seen.add(docstring.text)
            parts[file.part]["documents"] += 1
            parts[file.part]["words"] += words
            documents.append(_document(docstring, addresses, versions))
    return documents, {"versions": versions, "recipe": RECIPE, "parts": parts}


def _document(docstring: Docstring, addresses: dict[tuple[str, str], str], versions: dict[str, str]) -> Document:
    module, name = docstring.module, docstring.name
    fields = {
        "package": module.split(".")[0],
        "module": module,
        "topic": ".".join(module.split(".")[:2]),
        "name": f"{module}.{name}" if name else module,
        "kind": docstring.kind,
        "visibility": "public" if is_public(f"{module}.{name}" if name else module) else "private",
        "url": derived_url(docstring, addresses, versions),
    }
    return Document(docstring.text, {k: v for k, v in fields.items() if v}, module)


def derived_url(docstring: Docstring, addresses: dict[tuple[str, str], str], versions: dict[str, str]) -> str:
    """The address of the documentation page; '' if none can be derived.

    It follows the naming rules of the sites, from the shortest public name. Nothing checks that the page exists.
    """
    module, name = docstring.module, docstring.name
    top, package = name.split(".")[0], module.split(".")[0]
    if docstring.local or not is_public(name):
        return ""
    if package in sys.stdlib_module_names:
        page = f"https://docs.python.org/{'.'.join(versions['python'].split('.')[:2])}/library/{module}.html"
        return "" if not is_public(module) else f"{page}#{module}.{name}" if name else page
    address = addresses.get((module, top), "") + name.removeprefix(top)
    if not name or not address.startswith(package):
        return ""
    numpy_series = ".".join(versions.get("numpy", "").split(".")[:2])
    pages = {
        "numpy": f"https://numpy.org/doc/{numpy_series}/reference/generated/",
        "scipy": f"https://docs.scipy.org/doc/scipy-{versions.get('scipy')}/reference/generated/",
        "jax": "https://docs.jax.dev/en/latest/_autosummary/",
    }
    return f"{pages[package]}{address}.html" if package in pages else ""
