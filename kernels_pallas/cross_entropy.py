"""Cross-entropy of the product of two matrices in blocks of positions, on one device or on its part inside `jax.shard_map`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

BLOCK = 1 << 27  # logits of a block on one device, 512 MiB in float32

Hidden = Float[Array, "B T width"]
Matrix = Float[Array, "vocab width"]
Absent = Bool[Array, " vocab"]  # ids that are left out of the softmax
PerToken = Float[Array, "B T"]
Slopes = Callable[..., tuple[Array, Array]]  # (log_z, *arrays) -> derivatives of the loss by nll and by log_z, of each token


class TokenScores(NamedTuple):
    """Of each target: its negative log-likelihood in nats, log of the partition sum, whether it is the most likely id."""

    nll: PerToken
    log_z: PerToken
    is_top: Bool[Array, "B T"]


class Axes(NamedTuple):
    """Mesh axes over which positions and vocabulary are sharded, and those that the matrix is spread over, by dimension."""

    rows: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    spread: tuple[tuple[str, ...], ...] = ((), ())


def cross_entropy_blocks(
    axes: Axes, x: Hidden, matrix: Matrix, targets: Array, absent: Absent | None, *arrays: PerToken, slopes: Slopes | None
) -> tuple[TokenScores, tuple[Array, Array] | None]:
    """`_blockwise` for the positions and the vocabulary of one device; the gradient by the matrix is spread as the matrix."""
    positions = targets.size
    blocks = -(-positions * len(matrix) // BLOCK)
    size = positions if blocks == 1 else -(-positions // blocks // 128) * 128
    blocks = -(-positions // size)

    def split(a: Array) -> Array:
        flat = a.reshape(positions, *a.shape[2:])
        return jnp.pad(flat, ((0, blocks * size - positions), *((0, 0),) * (flat.ndim - 1))).reshape(
            blocks, size, *flat.shape[1:]
        )

    def one(total: Matrix | None, piece: tuple[Array, ...]) -> tuple[Matrix | None, tuple[TokenScores, Array | None]]:
        scores, gradients = _block(axes, matrix, absent, slopes, *piece)
        if total is None or gradients is None:
            return None, (scores, None)
        return total + gradients[1], (scores, gradients[0])

    total = None if slopes is None else jnp.zeros(matrix.shape, jnp.float32)
    total, made = jax.lax.scan(one, total, tuple(map(split, (x, targets, *arrays))), unroll=blocks == 1)
    scores, dx = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:positions].reshape(*targets.shape, *a.shape[2:]), made)
    if total is None:
        return scores, None
    total, reduced = total.astype(x.dtype), axes.rows
    for dimension, names in enumerate(axes.spread):
        if names:
            total = jax.lax.psum_scatter(total, names, scatter_dimension=dimension, tiled=True)
            reduced = tuple(name for name in reduced if name not in names)
    return scores, (dx, jax.lax.psum(total, reduced) if reduced else total)


def _block(
    axes: Axes, matrix: Matrix, absent: Absent | None, slopes: Slopes | None, x: Array, targets: Array, *arrays: Array
) -> tuple[TokenScores, tuple[Array, Array] | None]:
    """Scores of a block of N positions, and with `slopes` the gradient by x [N, width] and by the matrix in float32."""
    across = lambda reduce, value: reduce(value, axes.vocab) if axes.vocab else value  # noqa: E731
    logits = jnp.einsum("nd,vd->nv", x, matrix, preferred_element_type=jnp.float32)
    if absent is not None:
        logits = jnp.where(absent, -jnp.inf, logits)
    first = jax.lax.axis_index(axes.vocab) * len(matrix) if axes.vocab else 0
    ids = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    is_target = ids == targets[:, None]
    top = across(jax.lax.pmax, jnp.max(logits, axis=1))
    log_z = top + jnp.log(across(jax.lax.psum, jnp.sum(jnp.exp(logits - top[:, None]), axis=1)))
    picked = across(jax.lax.psum, jnp.sum(jnp.where(is_target, logits, 0.0), axis=1))
    ahead = (logits > picked[:, None]) | ((logits == picked[:, None]) & (ids < targets[:, None]))
    is_top = across(jax.lax.psum, jnp.sum(ahead, axis=1)) == 0
    scores = TokenScores(log_z - picked, log_z, is_top)
    if slopes is None:
        return scores, None
    by_nll, by_log_z = (slope[:, None] for slope in slopes(log_z, *arrays))
    by_logits = (by_nll + by_log_z) * jnp.exp(logits - log_z[:, None]) - jnp.where(is_target, by_nll, 0.0)
    by_logits = by_logits.astype(x.dtype)
    dx = across(jax.lax.psum, jnp.einsum("nv,vd->nd", by_logits, matrix, preferred_element_type=jnp.float32))
    return scores, (dx.astype(x.dtype), jnp.einsum("nv,nd->vd", by_logits, x, preferred_element_type=jnp.float32))
