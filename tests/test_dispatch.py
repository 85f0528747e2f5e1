"""How operations find implementations: refusals that say why, and rows spread over a mesh of eight (virtual) devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from metajax.config import UserError
from metajax.dispatch import dispatch


def double(x, *, shift=0.0):
    return 2 * x + shift


def triple(x, *, shift=0.0):
    return 3 * x + shift


TABLE = {"xla": double, "pallas_tpu": triple}
AUTO = {"tpu": "pallas_tpu"}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: jax.jit(jax.value_and_grad(f)), jax.checkpoint])
def test_a_kernel_of_another_platform_is_refused_when_lowered(wrap):
    run = wrap(lambda x: dispatch(TABLE, AUTO, "pallas_tpu", x, shift=jnp.float32(1)))
    with pytest.raises(UserError, match="pallas_tpu runs on tpu only; choose xla or auto"):
        run(jnp.float32(1))
    assert "3." in jax.jit(run).trace(jnp.float32(1)).lower(lowering_platforms=("tpu",)).as_text()


def test_auto_takes_a_kernel_only_for_its_dtypes():
    texts = {}
    for dtype in (jnp.bfloat16, jnp.float16):
        traced = jax.jit(lambda x: dispatch(TABLE, AUTO, "auto", x, shift=1.0)).trace(jnp.ones((), dtype))
        texts[dtype] = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "3.0" in texts[jnp.bfloat16] and "3.0" not in texts[jnp.float16]
    with pytest.raises(UserError, match="pallas_tpu takes bfloat16 or float32, not float16"):
        dispatch(TABLE, AUTO, "pallas_tpu", jnp.ones((), jnp.float16))


SHARDED = """
import jax, jax.numpy as jnp
import numpy as np
from metajax.dispatch import over_rows
from metajax.parallel.mesh import make_mesh

def kernel(x, w, *, shift=0, factor=None):
    assert x.shape[0] == expected
    return jnp.cumsum(x * w, axis=1) + shift, x[:, 0] * factor

spread = over_rows(kernel, rows=("x", "shift"))

def loss(f, x, w, shift, factor):
    y, z = f(x, w, shift=shift, factor=factor)
    return jnp.sum(jnp.sin(y)) + jnp.sum(z ** 2)

with jax.set_mesh(make_mesh("data=2,fsdp=4")):
    for rows, expected_rows in ((16, 2), (3, 3)):
        expected = expected_rows
        arrays = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(rows, 5), (5,), (rows, 1), ()])]
        ours = jax.jit(jax.value_and_grad(lambda *a: loss(spread, *a), argnums=(0, 1, 2, 3)))(*arrays)
        expected = rows
        exact = jax.jit(jax.value_and_grad(lambda *a: loss(kernel, *a), argnums=(0, 1, 2, 3)))(*arrays)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, exact)
        print(len(ours[1][0].sharding.device_set))
"""


def test_rows_spread_over_the_mesh_and_gradients_of_shared_arrays_are_summed():
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    environment = os.environ | flags | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["8", "8"]
