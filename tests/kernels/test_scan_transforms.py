"""The kernel under vmap, lax.scan, jax.checkpoint and jax.shard_map, as in a model."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scan_cases import IMPLEMENTATIONS, Shape, cotangents, error, make_inputs, run

from kernels_pallas.selective_scan.tpu import selective_scan_tpu

SHAPE = Shape(2, 40, 5, 4)
scan = functools.partial(selective_scan_tpu, chunk=32, interpret=True)


def reference(arrays, reset, weights):
    return run("reference", arrays, reset, weights)


def close(ours, exact):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        assert error(x, y) <= 1e-5


def test_vmap_with_shared_and_mapped_operands():
    """Two layers' worth of parameters over one sequence; B and C are shared by both."""
    many = [make_inputs(SHAPE, seed)[0] for seed in (0, 1)]
    _, reset = make_inputs(SHAPE, 2)
    weights = cotangents(SHAPE, 2)
    for arrays in many:
        arrays.update({key: many[0][key] for key in ("B", "C")})
    stacked = {key: many[0][key] if key in "BC" else jnp.stack([x[key] for x in many]) for key in many[0]}
    axes = {key: None if key in "BC" else 0 for key in stacked}

    def loss(arrays):
        y, state = jax.vmap(lambda x: scan(**x, reset=reset), in_axes=(axes,))(arrays)
        return jnp.sum(y * weights[0]) + jnp.sum(state * weights[1]), (y, state)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(stacked)
    exact = [reference(arrays, reset, weights) for arrays in many]
    for i, (y, state, exact_gradients) in enumerate(exact):
        close((outputs[0][i], outputs[1][i]), (y, state))
        close(
            {k: gradients[k][i] for k in gradients if k not in "BC"}, {k: x for k, x in exact_gradients.items() if k not in "BC"}
        )
    for key in "BC":
        assert error(gradients[key], sum(x[2][key] for x in exact)) <= 1e-5


def test_inside_a_scan_over_layers_with_remat():
    """y of one layer is u of the next, as in a stack of blocks; the backward pass runs the forward kernel again."""
    arrays, reset = make_inputs(SHAPE, 3)
    layers = {key: jnp.stack([arrays[key], arrays[key] * 0.5]) for key in ("A", "D", "dt_bias", "reset_state")}
    tokens = {key: arrays[key] for key in ("dt", "B", "C", "z")}

    def stack(scan, u, layers):
        @jax.checkpoint
        def layer(u, weights):
            y, state = scan(u, **tokens, **weights, reset=reset)
            return y, state

        return jax.lax.scan(layer, u, layers)

    def with_gradients(scan):
        outputs, pull = jax.vjp(functools.partial(stack, scan), arrays["u"], layers)
        return outputs, pull(jax.tree.map(jnp.ones_like, outputs))

    close(
        jax.jit(functools.partial(with_gradients, scan))(),
        jax.jit(functools.partial(with_gradients, IMPLEMENTATIONS["reference"]))(),
    )


SHARDED = """
import functools, json, sys
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from scan_cases import Shape, cotangents, error, make_inputs, run
from kernels_pallas.selective_scan.tpu import selective_scan_tpu

shape = Shape(4, 20, 5, 4)
arrays, reset = make_inputs(shape, 4)
weights = tuple(map(jnp.asarray, cotangents(shape, 4)))
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
batched = ("u", "dt", "B", "C", "z", "initial_state")
specs = {key: P("data") if key in batched else P() for key in arrays}
scan = functools.partial(selective_scan_tpu, chunk=32, interpret=True)
sharded = jax.shard_map(
    lambda arrays, reset: scan(**arrays, reset=reset), mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"), check_vma=False
)

@jax.jit
def with_gradients(arrays):
    outputs, pull = jax.vjp(lambda arrays: sharded(arrays, reset), arrays)
    return *outputs, pull(weights)[0]

exact = run("reference", arrays, reset, weights)
ours = with_gradients(arrays)
errors = {jax.tree_util.keystr(path): float(error(x, y)) for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(exact), strict=True)}
print(json.dumps({"devices": len(ours[0].sharding.device_set), "errors": errors}))
"""


def test_inside_shard_map_over_two_devices():
    """Gradients of the replicated parameters are summed over devices."""
    here = Path(__file__).parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
    }
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["devices"] == 2
    assert len(result["errors"]) == 12 and max(result["errors"].values()) <= 1e-5, result
    assert np.isfinite(list(result["errors"].values())).all()
