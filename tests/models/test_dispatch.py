"""Dispatch of operations to implementations, and refusals with a reason."""

import jax
import jax.numpy as jnp
import pytest

from metajax.core.errors import UserError
from metajax.models.ops.dispatch import dispatch


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
