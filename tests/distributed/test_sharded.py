"""Rows, heads, channels and long rows sharded over eight (virtual) devices: values and gradients equal those of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from metajax.models.ops.sharded import parts_of

KERNELS = Path(__file__).parents[1] / "kernels"

PROGRAM = """
import functools, json, sys
import jax, jax.numpy as jnp
from attention_cases import BLOCK, IMPLEMENTATIONS, error
from kernels_pallas.selective_scan.conv import causal_conv_tpu
from kernels_pallas.selective_scan.tpu import selective_scan_tpu
from metajax.models import ops
from metajax.models.masks import Mask
from metajax.distributed.mesh import make_mesh

LENGTH = 32
# Segments that start inside a part, with a part, three tokens before its end, and twice in a part; one is longer than a part.
starts = [[0, 5, 8, 21, 30], [0, 13, 14, 16, 31], [0], [0, 24]]
ids = jnp.stack([sum((jnp.arange(LENGTH) >= s).astype(jnp.int32) for s in row) for row in starts])
meta_positions = jnp.stack([jnp.array([*range(1, 30, 2), LENGTH])] * 4)
metas = {"prefix_k": (3, 2, 8), "prefix_v": (3, 2, 6)}
heads = {"q": (4, LENGTH, 4, 8), "k": (4, LENGTH, 2, 8), "v": (4, LENGTH, 2, 6)}
gathered = {name: (4, 16, *shape[2:]) for name, shape in heads.items()}
channels, states = (4, LENGTH, 6), (6, 4)
scan = {
    "u": channels, "dt": channels, "B": (4, LENGTH, 4), "C": (4, LENGTH, 4), "D": (6,), "dt_bias": (6,), "z": channels,
    "initial_state": (4, *states), "reset_state": states, "A": states,
}
conv = {"x": channels, "w": (6, 4), "b": (6,), "initial_tail": (4, 3, 6), "reset_tail": (3, 6)}

def attention(window, implementation, **arrays):
    return ops.attention(**arrays, mask=Mask(window=window), segment_ids=ids, implementation=implementation)

def three_rows(**arrays):
    return ops.attention(**arrays, mask=Mask(window=3), segment_ids=ids[:3], implementation="xla")

def meta_attention(**arrays):
    return ops.meta_attention(**arrays, meta_positions=meta_positions, segment_ids=ids, implementation="xla")

def selective_scan(implementation, A, **arrays):
    return ops.selective_scan(**arrays, A=-jnp.exp(A), segment_ids=ids, implementation=implementation)

def causal_conv(implementation, **arrays):
    return ops.causal_conv(**arrays, segment_ids=ids, implementation=implementation)

ops.ATTENTION["interpreted"] = functools.partial(IMPLEMENTATIONS["tpu"], block_q=BLOCK, block_k=BLOCK)
ops.SELECTIVE_SCAN["interpreted"] = functools.partial(selective_scan_tpu, interpret=True)
ops.CAUSAL_CONV["interpreted"] = functools.partial(causal_conv_tpu, interpret=True)
xla = {
    "window in the part before": (functools.partial(attention, 3, "xla"), heads | metas),
    "window of itself": (functools.partial(attention, 0, "xla"), heads),
    "window over several parts": (functools.partial(attention, 19, "xla"), heads),
    "all": (functools.partial(attention, None, "xla"), heads | metas),
    "one head of keys": (functools.partial(attention, 3, "xla"), heads | {"k": (4, LENGTH, 1, 8), "v": (4, LENGTH, 1, 6)}),
    "meta": (meta_attention, gathered),
    "scan": (functools.partial(selective_scan, "reference"), scan),
    "scan from zeros": (functools.partial(selective_scan, "reference"), {n: s for n, s in scan.items() if "state" not in n and n != "z"}),
    "conv": (functools.partial(causal_conv, "xla"), conv),
    "conv from zeros": (functools.partial(causal_conv, "xla"), {n: s for n, s in conv.items() if "tail" not in n}),
}
pallas = {
    "window": (functools.partial(attention, 5, "interpreted"), heads | metas),
    "all": (functools.partial(attention, None, "interpreted"), heads | metas),
    "scan": (functools.partial(selective_scan, "interpreted"), scan),
    "conv": (functools.partial(causal_conv, "interpreted"), conv),
    "three rows, which data does not divide": (three_rows, {name: (3, *shape[1:]) for name, shape in heads.items()}),
}

def with_gradients(op, arrays):
    outputs, pull = jax.vjp(lambda arrays: op(**arrays), arrays)
    return outputs, pull(jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), outputs))[0]

def draw(shapes, key):
    return {name: jax.random.normal(jax.random.fold_in(key, i), shape) for i, (name, shape) in enumerate(sorted(shapes.items()))}

found = {}
for name, (op, shapes) in {"xla": xla, "pallas": pallas}[sys.argv[1]].items():
    arrays = draw(shapes, jax.random.key(1))
    exact = jax.jit(functools.partial(with_gradients, op))(arrays)
    with jax.set_mesh(make_mesh(sys.argv[2])):
        ours = jax.jit(functools.partial(with_gradients, op))(arrays)
    spread = len(ours[0][0].sharding.device_set) * (not ours[0][0].sharding.is_fully_replicated)
    paths = jax.tree_util.tree_flatten_with_path(exact)[0]
    errors = {jax.tree_util.keystr(path): error(a, b) for (path, b), a in zip(paths, jax.tree.leaves(ours), strict=True)}
    found[name] = {"devices": spread, "errors": errors}
print(json.dumps(found))
"""


@pytest.mark.parametrize(("kind", "mesh"), [("xla", "context=4,tensor=2"), ("pallas", "data=2,context=2,tensor=2")])
def test_eight_devices_equal_one_device(kind, mesh):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(KERNELS), str(KERNELS.parents[1])]),
    }
    command = [sys.executable, "-c", PROGRAM, kind, mesh]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, result in json.loads(done.stdout.splitlines()[-1]).items():
        assert result["devices"] == 8, f"{name}: its output is spread over the mesh"
        assert len(result["errors"]) > 4
        for path, error in result["errors"].items():
            assert error <= 1e-5, f"{name} {path}: {error}"


def test_a_row_is_spread_only_where_every_part_has_tokens_to_pass_on():
    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 4), ("data", "context"))):
        assert parts_of(32, 32) == 4 and parts_of(16) == 4
        assert parts_of(30) == 1, "4 does not divide 30"
        assert parts_of(12) == 1, "3 tokens are fewer than the convolution's taps"
        assert parts_of(1, 32) == 1, "each token follows the earlier ones"
    assert parts_of(32) == 1
