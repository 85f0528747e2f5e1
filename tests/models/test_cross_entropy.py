"""Cross-entropy in blocks, on eight virtual devices."""

import os
import subprocess
import sys
from pathlib import Path


def test_every_mesh():
    """The tests of `cross_entropy_cases.py`, in a process that has eight devices."""
    cases = Path(__file__).with_name("cross_entropy_cases.py")
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", str(cases)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **flags}, cwd=cases.parents[2])
    assert done.returncode == 0, done.stdout[-3000:]
