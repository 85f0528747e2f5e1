"""The entry point to kernels: names, dispatch, and the code lowered for each platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.core.errors import UserError
from metajax.models import ops
from metajax.models.masks import Mask, meta_dense

Q = jax.random.normal(jax.random.key(0), (2, 12, 4, 8))
K, V = jax.random.normal(jax.random.key(1), (2, 2, 12, 2, 8))
SEGMENTS = jnp.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])
META_POSITIONS = jnp.array([[1, 4, 6, 12], [0, 3, 12, 13]])


def test_implementations_agree():
    outs = [
        ops.attention(Q, K, V, mask=Mask(window=3), segment_ids=SEGMENTS, implementation=name)
        for name in ("auto", "xla", "reference")
    ]
    for out, lse in outs[1:]:
        np.testing.assert_allclose(out, outs[0][0], atol=1e-6)
        np.testing.assert_allclose(lse, outs[0][1], atol=1e-6)
    assert outs[0][0].shape == (2, 12, 4, 8)
    assert outs[0][1].dtype == jnp.float32


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_meta_attention_stays_in_the_segment_and_skips_unused_positions(implementation):
    take = lambda x: x[jnp.arange(2)[:, None], jnp.minimum(META_POSITIONS, 11)]  # noqa: E731
    out, lse = ops.meta_attention(
        take(Q), take(K), take(V), meta_positions=META_POSITIONS, segment_ids=SEGMENTS, implementation=implementation
    )
    used = np.asarray(META_POSITIONS) < 12
    assert not np.asarray(out)[~used].any()
    assert np.all(np.asarray(lse)[~used] == -np.inf)
    np.testing.assert_allclose(out[0, 2], jnp.repeat(V[0, 6], 2, axis=0), atol=1e-6)  # the only meta-token of its segment
    allowed = np.asarray(meta_dense(SEGMENTS, META_POSITIONS))
    assert allowed[0, 4, 1]
    assert not allowed[0, 6, 4]


def test_unknown_implementation_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'reference'"):
        ops.attention(Q, K, V, mask=Mask(), segment_ids=SEGMENTS, implementation="refrence")


def test_a_tpu_kernel_is_refused_on_other_platforms():
    with pytest.raises(UserError, match="pallas_tpu runs on tpu only; choose xla or auto"):
        ops.attention(Q, K, V, mask=Mask(), segment_ids=SEGMENTS, implementation="pallas_tpu")


def test_auto_is_chosen_for_the_lowered_platform(monkeypatch):
    """A kernel registered for another platform appears in a program lowered for it, and not in this machine's."""

    def marked(*args, **kwargs):
        out, lse = ops.ATTENTION["reference"](*args, **kwargs)
        return jnp.cbrt(out), lse

    monkeypatch.setitem(ops.ATTENTION, "marked", marked)
    monkeypatch.setitem(ops.AUTO, "tpu", "marked")

    def lowered(length, platform):
        q, k, ids = jnp.zeros((1, length, 4, 8)), jnp.zeros((1, length, 2, 8)), jnp.ones((1, length), jnp.int32)
        traced = jax.jit(lambda q: ops.attention(q, k, k, mask=Mask(), segment_ids=ids)[0]).trace(q)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "cbrt" in lowered(257, "tpu")
    assert "cbrt" not in lowered(257, "cpu")
    assert "cbrt" not in lowered(256, "tpu")  # one tile: XLA costs less there
