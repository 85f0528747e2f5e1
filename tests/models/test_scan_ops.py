"""The entry point to scan and convolution: names, platforms, and rows sharded over eight (virtual) devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.core.errors import UserError
from metajax.models import ops

ROWS, LENGTH, CHANNELS, STATES = 2, 9, 4, 3
SEGMENTS = jnp.array([[1] * 4 + [2] * 5, [1] * 7 + [0] * 2])


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


def scan(implementation, dtype=jnp.float32):
    x = [normal(i, ROWS, LENGTH, CHANNELS).astype(dtype) for i in range(3)]
    b, c = (normal(i, ROWS, LENGTH, STATES).astype(dtype) for i in (3, 4))
    tokens = {"u": x[0], "dt": x[1], "z": x[2], "B": b, "C": c}
    shared = {"initial_state": normal(8, ROWS, CHANNELS, STATES), "reset_state": normal(9, CHANNELS, STATES)}
    shared["A"], D, bias = -jnp.exp(normal(5, CHANNELS, STATES)), normal(6, CHANNELS), normal(7, CHANNELS)
    return ops.selective_scan(**tokens, **shared, D=D, dt_bias=bias, segment_ids=SEGMENTS, implementation=implementation)


def conv(implementation, dtype=jnp.float32):
    x, w, b = normal(0, ROWS, LENGTH, CHANNELS).astype(dtype), normal(1, CHANNELS, 4), normal(2, CHANNELS)
    tails = {"initial_tail": normal(3, ROWS, 3, CHANNELS), "reset_tail": normal(4, 3, CHANNELS)}
    return ops.causal_conv(x=x, w=w, b=b, segment_ids=SEGMENTS, **tails, implementation=implementation)


@pytest.mark.parametrize("op", [scan, conv])
def test_implementations_agree(op):
    exact = op("reference")
    for name in ("auto", "xla"):
        for ours, reference in zip(op(name), exact, strict=True):
            np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("op", "kernel"), [(scan, "selective_scan_forward"), (conv, "causal_conv_forward")])
def test_auto_is_the_kernel_only_on_a_tpu(op, kernel):
    traced = jax.jit(op, static_argnums=0).trace("auto")
    assert kernel in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("op", [scan, conv])
def test_unsupported_calls_name_the_reason(op):
    with pytest.raises(UserError, match="pallas_tpu runs on tpu only"):
        op("pallas_tpu")
    with pytest.raises(UserError, match="pallas_tpu takes bfloat16 or float32, not float16"):
        op("pallas_tpu", jnp.float16)
    with pytest.raises(UserError, match="did you mean 'reference'"):
        op("refrence")


SHARDED = """
import functools
import jax, jax.numpy as jnp
import numpy as np
from kernels_pallas.selective_scan.conv import causal_conv_tpu
from kernels_pallas.selective_scan.tpu import selective_scan_tpu
from metajax.models import ops
from metajax.distributed.mesh import make_mesh

B, T, C, N = 8, 12, 5, 3
shapes = dict(u=(B, T, C), dt=(B, T, C), A=(C, N), B=(B, T, N), C=(B, T, N), D=(C,), dt_bias=(C,), z=(B, T, C))
shapes |= dict(initial_state=(B, C, N), reset_state=(C, N))
arrays = {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(shapes.items())}
arrays["A"] = -jnp.exp(arrays["A"])
taps = dict(x=arrays["u"], w=jax.random.normal(jax.random.key(11), (C, 4)), b=arrays["D"])
taps |= dict(initial_tail=arrays["dt"][:, :3], reset_tail=arrays["dt"][0, 3:6])
segments = jnp.cumsum(jax.random.bernoulli(jax.random.key(12), 0.2, (B, T)), axis=1)

def loss(function, arrays):
    y, last = function(**arrays, segment_ids=segments)
    return jnp.sum(jnp.sin(y)) + jnp.sum(last ** 2)

for kernel, table, inputs in ((selective_scan_tpu, ops.SELECTIVE_SCAN, arrays), (causal_conv_tpu, ops.CAUSAL_CONV, taps)):
    interpreted = functools.partial(kernel, interpret=True)
    spread = functools.partial(table["pallas_tpu"], interpret=True)
    exact = jax.jit(jax.value_and_grad(functools.partial(loss, interpreted)))(inputs)
    with jax.set_mesh(make_mesh("data=2,fsdp=4")):
        ours = jax.jit(jax.value_and_grad(functools.partial(loss, spread)))(inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, exact)
    rows = next(x for name, x in ours[1].items() if name in ("u", "x"))
    print(len(rows.sharding.device_set))
"""


def test_rows_spread_over_a_mesh_give_the_same_gradients():
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    environment = os.environ | flags | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["8", "8"]
