"""The short form of `make test-faults`: a few kills."""

import subprocess
import sys
from pathlib import Path


def test_faults_are_survived():
    command = [sys.executable, "-m", "tests.faults", "--kills", "3", "--only", "kills"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "faults injected 3, survived 3"
