"""The kernels of scan and convolution compile for absent TPU chips."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.libtpu,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: the TPU compiler is not here"),
]
PROGRAM = Path(__file__).with_name("compile_scan.py")


def compile_for(chip, *shapes):
    done = subprocess.run([sys.executable, str(PROGRAM), chip, *shapes], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [result["shape"] for result in results] == list(shapes)
    for result in results:
        assert result["forward"] == ["selective_scan_forward"], result
        assert result["convolution"] == ["causal_conv_backward", "causal_conv_forward"], result
        assert result["both"] == ["selective_scan_backward", "selective_scan_forward"], result
    return results


def test_compiles_for_v5e():
    compile_for("v5e", "small", "short_float32")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_compiles_at_the_papers_shapes(chip):
    """Besides inputs and outputs, memory holds one state per chunk (1/128 of all states) and copies of the inputs."""
    for result in compile_for(chip, "hymba_1.5b", "ablation_300m", "odd_float32")[:2]:
        assert result["temporary_bytes"] < result["all_states_bytes"] / 16, result
