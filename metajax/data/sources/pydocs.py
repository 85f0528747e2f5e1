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
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.machinery import PathFinder
from typing import Any, NamedTuple

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
_LEFT_OUT = ("site-packages", "dist-packages", "idle_test", "lib2to3")  # Python 3.13 removed lib2to3


class File(NamedTuple):
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
    return open_or_build(request.spec, "pydocs", key, request.cache_dir, lambda: build_documents(files, versions))


def python_files(part: str) -> list[File]:
    """The .py files of a part in path order, without test folders; raises UserError if the part is not installed."""
    library = sysconfig.get_path("stdlib")
    if part == STDLIB:
        return _walk(part, library, library)
    found = PathFinder.find_spec(part) if part.isidentifier() else None
    origin = str(found.origin) if found is not None else ""
    if part in sys.builtin_module_names or origin.endswith((".so", ".pyd")):
        raise UserError(f"pydocs: {part!r} is compiled, so its docstrings cannot be read without importing it; leave it out")
    if found is None:
        hint = nearest(part, [*sorted(sys.stdlib_module_names), *DEFAULT_PARTS])
        raise UserError(f"pydocs: {part!r} is not an installed top-level module{hint}; install it or leave it out")
    if found.submodule_search_locations:
        root = next(iter(found.submodule_search_locations))
        return _walk(part, root, os.path.dirname(root))
    return [File(part, origin, part, False)]


def _walk(part: str, root: str, base: str) -> list[File]:
    files = []
    for folder, folders, names in os.walk(root):
        # Tests are left out, but numpy.testing is public.
        folders[:] = [f for f in folders if f not in _LEFT_OUT and (f == "testing" or not f.startswith("test"))]
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                module = os.path.relpath(path, base).removesuffix(".py").split(os.sep)
                is_package = module[-1] == "__init__"
                files.append(File(part, path, ".".join(module[:-1] if is_package else module), is_package))
    return sorted(files, key=lambda file: file.path)


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


def _read_all(files: Sequence[File]) -> list[Module]:
    if len(files) < _FILES_FOR_POOL:
        return [read_module(*file[1:]) for file in files]
    say(f"pydocs: reading docstrings of {len(files)} Python files (once)")
    _, *columns = zip(*files, strict=True)
    modules = []
    with process_pool(os.cpu_count() or 1) as pool, progress("pydocs", len(files), plain_lines=False) as advance:
        for module in pool.map(read_module, *columns, chunksize=32):
            modules.append(module)
            advance(1)
    return modules


def build_documents(files: Sequence[File], versions: Mapping[str, str]) -> tuple[list[Document], dict[str, Any]]:
    """Documents in order, each text once, and the manifest's versions, recipe and counts by part."""
    modules = _read_all(files)
    addresses = public_names(modules)
    documents, seen, parts = [], set(), {file.part: {"documents": 0, "words": 0} for file in files}
    for file, module in zip(files, modules, strict=True):
        for docstring in module.docstrings:
            words = len(docstring.text.split())
            if words < MIN_WORDS or docstring.text in seen:
                continue
            seen.add(docstring.text)
            parts[file.part]["documents"] += 1
            parts[file.part]["words"] += words
            documents.append(_document(docstring, derived_url(docstring, addresses, versions)))
    return documents, {"versions": versions, "recipe": RECIPE, "parts": parts}


def _document(docstring: Docstring, url: str) -> Document:
    module, path = docstring.module, docstring.module.split(".")
    name = f"{module}.{docstring.name}" if docstring.name else module
    fields = {
        "package": path[0],
        "module": module,
        "topic": ".".join(path[:2]),
        "name": name,
        "kind": docstring.kind,
        "visibility": "public" if is_public(name) else "private",
        "url": url,
    }
    return Document(docstring.text, {k: v for k, v in fields.items() if v}, module)


def derived_url(docstring: Docstring, addresses: Mapping[tuple[str, str], str], versions: Mapping[str, str]) -> str:
    """The address of the documentation page; '' if none can be derived.

    It follows the naming rules of the sites, from the shortest public name. Nothing checks that the page exists.
    """
    module, name = docstring.module, docstring.name
    top, package = name.split(".")[0], module.split(".")[0]
    if docstring.local or not is_public(name):
        return ""
    if package in sys.stdlib_module_names:
        page = f"https://docs.python.org/{_series(versions['python'])}/library/{module}.html"
        return "" if not is_public(module) else f"{page}#{module}.{name}" if name else page
    pages = {
        "numpy": f"https://numpy.org/doc/{_series(versions.get('numpy', ''))}/reference/generated/",
        "scipy": f"https://docs.scipy.org/doc/scipy-{versions.get('scipy')}/reference/generated/",
        "jax": "https://docs.jax.dev/en/latest/_autosummary/",
    }
    address = addresses.get((module, top), "") + name.removeprefix(top)
    return f"{pages[package]}{address}.html" if name and package in pages and address.startswith(package) else ""


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])
