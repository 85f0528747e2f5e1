"""Prints the size of the house and fails when a part, a file or a function has outgrown it.

The limits may only fall from one commit to the next.
"""

import ast
import subprocess
import sys
from pathlib import Path

FILE_LINES, FUNCTION_LINES = 500, 60
# {part: (what belongs to it, what does not, most lines)}
PARTS = {
    "core": (
        (
            "metajax/config/",
            "metajax/registry.py",
            "metajax/models/",
            "metajax/training/",
            "metajax/distributed/",
            "metajax/data/",
        ),
        ("metajax/data/sources/", "metajax/data/tasks/"),
        8_160,
    ),
    "metajax without vision": (("metajax/",), ("metajax/vision/",), 23_600),
    "vision": (("metajax/vision/",), (), 3_410),
    "kernels_pallas": (("kernels_pallas/",), (), 3_980),
}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def main() -> int:
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"], capture_output=True, text=True
    )
    files = {name: Path(name) for name in sorted(names.stdout.split()) if Path(name).exists()}
    problems, shown = [], []
    for part, (inside, outside, limit) in PARTS.items():
        count = sum(lines(path) for name, path in files.items() if name.startswith(inside) and not name.startswith(outside))
        shown.append(f"{part} {count:,} of {limit:,}")
        if count > limit:
            problems.append(f"{part}: {count:,} lines, limit {limit:,}")
    for name, path in files.items():
        if lines(path) > FILE_LINES:
            problems.append(f"{name}: {lines(path)} lines, limit {FILE_LINES}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
                problems.append(
                    f"{name}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines, limit {FUNCTION_LINES}"
                )
    print("lines: " + ", ".join(shown))
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
