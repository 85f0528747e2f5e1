"""The list of faults and its tests, and a short form of `make test-faults` with a few kills."""

import re
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).parents[1]


def test_every_fault_has_a_test():
    listed = [int(n) for n in re.findall(r"^\| (\d+) \|", (HOME / "docs/faults.md").read_text(), re.MULTILINE)]
    tests = "\n".join(path.read_text() for path in (HOME / "tests").rglob("test_*.py"))
    marked = {int(n) for numbers in re.findall(r"mark\.fault\(([\d, ]+)\)", tests) for n in numbers.split(",")}
    assert listed == list(range(1, len(listed) + 1)) and marked == set(listed)


def test_faults_are_survived():
    command = [sys.executable, "-m", "tests.faults", "--kills", "3", "--only", "kills"]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "faults injected 3, survived 3"
