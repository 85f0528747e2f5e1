"""A disk that becomes full during a run: one line and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.suite import command, write_corpus

ROOT = Path(__file__).parents[2]
FILLS_UP = """
import resource, sys
from metajax.cli.main import main
from metajax.training import trainer
original = trainer.Trainer._log
def log(*arguments):  # no file grows beyond 16 kB from here on, a limit that the system keeps as it does that of a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
    original(*arguments)
trainer.Trainer._log = log
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.fault(35)
def test_a_full_disk_is_one_line(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    small = ("model.layers=1", "training.steps=8", "runtime.save_every=3", "runtime.log_every=100")
    words = command(tmp_path, tmp_path / "run", *small)
    done = subprocess.run([sys.executable, "-c", FILLS_UP, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
    assert str(tmp_path / "run") in lines[-1] and "make room" in lines[-1]
    assert not [line for line in lines[:-1] if not line.startswith(("--set ", "quickstart/", "tokenising", "compil", "step "))], (
        lines
    )
