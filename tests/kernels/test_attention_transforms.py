"""The attention kernel under vmap, lax.scan and jax.checkpoint, as in a model."""

import functools

import jax
import jax.numpy as jnp
from attention_cases import BLOCK, IMPLEMENTATIONS, SCALE, Shape, cotangents, error, make_arrays, oracle

SHAPE = Shape(2, 20, 20, 2, 1, (8, 8), 3)
EXPIRY = jnp.minimum(jnp.arange(20) + 8, 20) * jnp.ones((2, 1), jnp.int32)
attend = functools.partial(IMPLEMENTATIONS["tpu"], scale=SCALE, block_q=BLOCK, block_k=BLOCK)


def test_vmap_with_mapped_lifetimes_and_shared_meta_keys():
    """The mask, and so the list of blocks to visit, differs between the mapped calls."""
    many = [make_arrays(SHAPE, seed) for seed in (0, 1)]
    weights = [cotangents(SHAPE, seed) for seed in (0, 1)]
    expiries = jnp.stack([EXPIRY, jnp.minimum(EXPIRY, 11)])
    metas = {key: many[0][key] for key in ("prefix_k", "prefix_v")}
    stacked = {key: metas[key] if key in metas else jnp.stack([x[key] for x in many]) for key in many[0]}
    axes = {key: None if key in metas else 0 for key in stacked}

    @jax.jit
    def outputs(arrays):
        mapped = jax.vmap(lambda x, e: attend(**x, expiry=e), in_axes=(axes, 0))
        (out, lse), pull = jax.vjp(lambda arrays: mapped(arrays, expiries), arrays)
        return out, lse, pull(tuple(jnp.stack(w) for w in zip(*weights, strict=True)))[0]

    out, lse, gradients = outputs(stacked)
    exact = [oracle(x | metas, e, 0, w) for x, e, w in zip(many, expiries, weights, strict=True)]
    for i in (0, 1):
        assert max(error(out[i], exact[i][0]), error(lse[i], exact[i][1])) <= 1e-6
        assert max(error(gradients[key][i], exact[i][2][key]) for key in "qkv") <= 1e-5
    for key in metas:
        assert error(gradients[key], sum(x[2][key] for x in exact)) <= 1e-5


def test_inside_a_scan_over_layers_with_remat():
    """Queries of one layer are the output of the one before; the backward pass runs the forward kernel again."""
    arrays = make_arrays(SHAPE, 3)
    layers = {key: jnp.stack([arrays[key], arrays[key] * 0.5]) for key in ("k", "v", "prefix_k", "prefix_v")}

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(attend, q, layers):
        @jax.checkpoint
        def layer(q, x):
            return attend(q, **x, expiry=EXPIRY)

        outputs, pull = jax.vjp(lambda q, layers: jax.lax.scan(layer, q, layers), q, layers)
        return outputs, pull(jax.tree.map(jnp.ones_like, outputs))

    reference = functools.partial(IMPLEMENTATIONS["reference"], scale=SCALE)
    ours, exact = (with_gradients(f, arrays["q"], layers) for f in (attend, reference))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        assert error(a, b) <= 1e-5
