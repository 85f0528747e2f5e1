"""The kernels of prefix-and-window attention compile for absent TPU chips, from the entry point in ops.py."""

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
PROGRAM = Path(__file__).with_name("compile_attention.py")


def compile_for(chip, *shapes):
    done = subprocess.run([sys.executable, str(PROGRAM), chip, *shapes], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [result["shape"] for result in results] == list(shapes)
    for result in results:
        assert result["forward"] == ["forward"], result
        assert result["both"] == ["backward", "forward"], result
    return results


def test_compiles_for_v5e():
    compile_for("v5e", "small")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_compiles_at_the_papers_shapes(chip):
    """Temporary memory holds copies of inputs and outputs, and nothing as large as the scores."""
    long = ("hymba_1.5b", "hymba_1.5b_full", "gpt2_8192")
    short = ("ablation_300m", "gpt2_1024", "meta_tokens", "odd_float32", "chunk")
    for result in compile_for(chip, *long, *short)[: len(long)]:
        assert result["temporary_bytes"] < result["scores_bytes"] / 16, result
