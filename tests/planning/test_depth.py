"""Depth adds iterations of a loop, not compilation: the program of 32 layers equals that of 12 except for numbers.

12 layers, because a hybrid of 8 has runs of one group, whose loop is compiled differently.
"""

import re

import jax
import pytest

from metajax.config import Hybrid, MetaTokens
from metajax.planning.plan import whole_batch
from metajax.training.program import Program

VOCAB = 64


def instructions(config):
    """The operations of the lowered train step, in order, without names and numbers."""
    program = Program.build(config, VOCAB, jax.devices()[:1])
    text = program.lower_step(program.abstract_state(), program.abstract_batch(whole_batch(config))).as_text()
    return re.findall(r"(?:= |^ *)\"?((?:stablehlo|func|chlo|sdy)\.\w+|call\b)", text, re.MULTILINE)


def gpt(layers):
    return {"meta_tokens": MetaTokens(), "model.layers": layers}


def hymba(layers):
    """Full attention in the first, a middle and the last layer; the others share keys and values in pairs."""
    pairs = (layers - 4) // 4
    groups = (1, *[2] * pairs, 1, *[2] * pairs, 1, 1)
    mixers = Hybrid(prefix_tokens=4, full_layers=(0, 1 + 2 * pairs, layers - 1), kv_groups=groups, state=4)
    return {"model.layers": layers, "model.window": 8, "model.hybrid": mixers}


@pytest.mark.parametrize("family", [gpt, hymba])
def test_a_deeper_model_is_no_larger_a_program(family, tiny_config):
    how = {"runtime.unroll": 1, "runtime.remat": "full", "runtime.implementation": "reference"}
    shallow, deep = (instructions(tiny_config(**family(layers), **how)) for layers in (12, 32))
    assert len(shallow) > 500 and deep == shallow


def test_an_unrolled_model_is(tiny_config):
    how = {"runtime.unroll": 0, "runtime.implementation": "reference"}
    shallow, deep = (len(instructions(tiny_config(**gpt(layers), **how))) for layers in (2, 8))
    assert deep > 1.2 * shallow
