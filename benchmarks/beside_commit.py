"""The train steps of this tree beside those of another commit: time of a step and of its compilation, run by run in turn.

    python -m benchmarks.beside_commit COMMIT [--rounds 5] [--only quickstart/plain,...]

Both trees run the same command in turn, as whole processes; the numbers come from their `report.json`. The ratio of a round is
this tree over the commit; its median, minimum and maximum over the rounds are printed. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# {experiment: changes that make it short}; the CLIP that AAPL starts from is made once in each tree.
TEXT = {
    "training.steps": 60,
    "evaluation.documents": 4,
    "evaluation.sample_tokens": 4,
    "evaluation.conditions": "none",
    "runtime.save_every": 1000,
}
CASES = {
    "quickstart/plain": TEXT,
    "quickstart/meta_tokens": TEXT,
    "quickstart/metadata": TEXT,
    "hymba/components/whole/text": TEXT,
    "prompt_learning/base_to_new/aapl/digits": {"training.steps": 60},  # of the CLIP that it starts from
}


def run(tree: Path, home: Path, name: str, changes: dict, number: int) -> dict[str, float]:
    """Milliseconds per step and seconds of compilation of one run in a tree."""
    workdir = home / "runs" / name.replace("/", "-") / str(number)
    words = [word for field, value in changes.items() for word in ("--set", f"{field}={value}")]
    places = ["--runs-dir", str(home / "runs"), "--cache-dir", str(home / "cache"), "--workdir", str(workdir)]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "run.py", name, *words, *places], cwd=tree, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{name} in {tree}: {done.stderr[-2000:]}")
    report = json.loads((workdir / "report.json").read_text())
    return {"step": 1e3 * report["time"]["train_seconds"] / report["time"]["steps_here"], "compile": report["startup"]["compile"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(CASES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="beside-") as folder:
        other = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(other), options.commit], cwd=ROOT, check=True)
        try:
            for name in options.only.split(","):
                ratios: dict[str, list[float]] = {"step": [], "compile": []}
                for number in range(options.rounds + 1):  # the first round fills the caches
                    then = run(other, Path(folder) / "then", name, CASES[name], number)
                    now = run(ROOT, Path(folder) / "now", name, CASES[name], number)
                    if number:
                        for key, found in ratios.items():
                            found.append(now[key] / then[key])
                told = ", ".join(f"{key} {statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f})" for key, r in ratios.items())
                print(f"{name}: {told}; step {now['step']:.2f} ms", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
