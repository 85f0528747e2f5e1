"""Prints the size of the house and fails when a file or a function has outgrown it."""

import ast
import subprocess
import sys
from pathlib import Path

FILE_LINES, FUNCTION_LINES = 500, 60
CORE = ("config", "model_config", "fields", "registry", "ops", "models", "training", "parallel", "data")
NOT_CORE = ("metajax/vision/clip/", "metajax/data/tasks/", "metajax/vision/data", "metajax/data/sources/")
LIMITS = {"core": 7_360, "metajax": 27_110, "kernels_pallas": 3_370}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def is_core(path: str) -> bool:
    return path.removeprefix("metajax/").split("/")[0].removesuffix(".py") in CORE and not path.startswith(NOT_CORE)


def main() -> int:
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"], capture_output=True, text=True
    )
    files = {name: Path(name) for name in names.stdout.split() if Path(name).exists()}
    counts = {
        "core": sum(lines(p) for name, p in files.items() if name.startswith("metajax/") and is_core(name)),
        "metajax": sum(lines(p) for name, p in files.items() if name.startswith("metajax/")),
        "kernels_pallas": sum(lines(p) for name, p in files.items() if name.startswith("kernels_pallas/")),
    }
    problems = [f"{name}: {counts[name]} lines, limit {limit}" for name, limit in LIMITS.items() if counts[name] > limit]
    for name, path in files.items():
        if lines(path) > FILE_LINES:
            problems.append(f"{name}: {lines(path)} lines, limit {FILE_LINES}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
                problems.append(
                    f"{name}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines, limit {FUNCTION_LINES}"
                )
    print("lines: " + ", ".join(f"{name} {count} of {LIMITS[name]}" for name, count in counts.items()))
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
