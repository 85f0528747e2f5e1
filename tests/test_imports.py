"""Imports point in one direction: a unit of metajax imports only the units below it."""

import ast
from pathlib import Path

METAJAX = Path(__file__).parents[1] / "metajax"
# From top to bottom; `inference` is below `evaluation` because answers to questions are generated.
UNITS = [
    "__main__",
    "cli",
    "experiment",
    "tables",
    "vision",
    "planning",
    "analysis",
    "reporting",
    "interop",
    "evaluation",
    "inference",
    "training",
    "runs",
    "models",
    "data",
    "distributed",
    "registry",
    "config",
    "core",
    "__init__",
]


def imported(path):
    """Units that a file imports, inside functions and `TYPE_CHECKING` too, by line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "metajax":
            names = [node.module] if "." in node.module else [f"metajax.{alias.name}" for alias in node.names]
        else:
            names = (
                [alias.name for alias in node.names if alias.name.startswith("metajax.")] if isinstance(node, ast.Import) else []
            )
        yield from ((name.split(".")[1], node.lineno) for name in names)


def test_imports_point_down():
    upward = [
        f"{path.relative_to(METAJAX)}:{line} imports {unit}"
        for path in sorted(METAJAX.rglob("*.py"))
        for unit, line in imported(path)
        if UNITS.index(path.relative_to(METAJAX).parts[0].removesuffix(".py")) > UNITS.index(unit)
    ]
    assert not upward
