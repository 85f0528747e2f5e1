"""Cross-entropy of the output matrix in blocks of positions, so that the logits of a batch never exist as one array.

On a mesh each device takes its own positions and its part of the vocabulary. The gradient with respect to the matrix is
added up on each device over its blocks, and over the devices once. XLA would do so in every block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from metajax.distributed.rules import SPREAD, constrain, partition_spec

BLOCK = 1 << 27  # logits of a block on one device, 512 MiB in float32
MATRIX_AXES = ("vocab", "embed")

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


@jax.custom_vjp
def token_scores(x: Hidden, matrix: Matrix, targets: Int[Array, "B T"], absent: Absent | None = None) -> TokenScores:
    """The scores of `targets` in softmax(x matrix^T), in float32. The gradient computes the logits again.

    x: in the compute dtype, to which the float32 matrix is cast. Of ids with equal logits the first is the most likely.
    """
    return _blockwise(x, matrix, targets, absent)[0]


def _scores_forward(x: Hidden, matrix: Matrix, targets: Array, absent: Absent | None) -> tuple[TokenScores, Any]:
    return token_scores(x, matrix, targets, absent), (x, matrix, targets, absent)


def _scores_backward(saved: Any, cotangents: TokenScores) -> tuple[Array | None, ...]:
    slopes = lambda _, by_nll, by_log_z: (by_nll, by_log_z)  # noqa: E731
    gradients = _blockwise(*saved, cotangents.nll, cotangents.log_z, slopes=slopes)[1]
    assert gradients is not None
    return *gradients, None, None


token_scores.defvjp(_scores_forward, _scores_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def weighted_loss(
    x: Hidden, matrix: Matrix, targets: Int[Array, "B T"], weights: PerToken, absent: Absent | None, z_loss: float
) -> tuple[Float[Array, ""], TokenScores]:
    """(sum of weights * (nll + z_loss * log_z^2), scores of the targets). A target without weight may be absent.

    The gradient by `x` and `matrix` is made along with the loss, from the same logits. Only the sum has a gradient.
    """
    scores = _blockwise(x, matrix, targets, absent)[0]
    return _weighted_sum(scores, weights, z_loss), scores


def _weighted_sum(scores: TokenScores, weights: PerToken, z_loss: float) -> Float[Array, ""]:
    return jnp.sum(weighed(weights, scores.nll)) + z_loss * jnp.sum(weights * scores.log_z**2)


def _loss_forward(x: Hidden, matrix: Matrix, targets: Array, weights: PerToken, absent: Absent | None, z_loss: float) -> Any:
    slopes = lambda log_z, weights: (weights, 2 * z_loss * weights * log_z)  # noqa: E731
    scores, gradients = _blockwise(x, matrix, targets, absent, weights, slopes=slopes)
    return (_weighted_sum(scores, weights, z_loss), scores), gradients


def _loss_backward(
    z_loss: float, gradients: tuple[Array, Array], cotangents: tuple[Array, TokenScores]
) -> tuple[Array | None, ...]:
    dx, dmatrix = gradients
    by_sum = cotangents[0]
    return (by_sum * dx).astype(dx.dtype), by_sum * dmatrix, None, None, None


weighted_loss.defvjp(_loss_forward, _loss_backward)


def weighed(weights: Float[Array, "*B"], nll: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """weights * nll, but 0 where the weight is 0. An unweighted target may be missing from the softmax, with infinite loss."""
    return jnp.where(weights == 0, 0.0, weights * nll)


# ------------------------------------------------------------------------------------------------ blocks and devices


class _Axes(NamedTuple):
    """Mesh axes over which positions and vocabulary are sharded, and those that the matrix is spread over, by dimension."""

    rows: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    spread: tuple[tuple[str, ...], ...] = ((), ())


def _blockwise(
    x: Hidden, matrix: Matrix, targets: Array, absent: Absent | None, *arrays: PerToken, slopes: Slopes | None = None
) -> tuple[TokenScores, tuple[Hidden, Matrix] | None]:
    """(scores, gradient by x and matrix, or None without `slopes`), computed on the devices that hold the positions."""
    mesh, cast = jax.sharding.get_abstract_mesh(), matrix.astype(x.dtype)
    local = functools.partial(_on_device, slopes=slopes)
    if mesh.size <= 1 or AxisType.Manual in mesh.axis_types:
        scores, gradients = local(_Axes(), x, cast, targets, absent, *arrays)
        return scores, gradients and (gradients[0], gradients[1].astype(matrix.dtype))
    rows, whole = partition_spec(("batch", "length"), targets.shape, mesh), partition_spec(("vocab", None), matrix.shape, mesh)
    own = partition_spec(MATRIX_AXES, matrix.shape, mesh)
    over = tuple(name for entry in rows for name in _names(entry))
    spread = tuple(tuple(name for name in _names(entry) if name in SPREAD) for entry in own)
    scatters = set(over).issuperset(name for names in spread for name in names)
    axes = _Axes(over, _names(whole[0]), spread if scatters else ((), ()))
    of_x, of_ids = PartitionSpec(*rows, None), PartitionSpec(whole[0])
    gradients = None if slopes is None else (of_x, own if scatters else whole)
    scores, gradients = jax.shard_map(
        functools.partial(local, axes),
        mesh=mesh,
        in_specs=(of_x, whole, rows, None if absent is None else of_ids, *(rows for _ in arrays)),
        out_specs=(TokenScores._make([rows] * 3), gradients),
        check_vma=False,
    )(x, constrain(cast, ("vocab", None)), targets, absent, *arrays)
    return scores, gradients and (gradients[0], gradients[1].astype(matrix.dtype))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _on_device(
    axes: _Axes, x: Hidden, matrix: Matrix, targets: Array, absent: Absent | None, *arrays: PerToken, slopes: Slopes | None
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
    axes: _Axes, matrix: Matrix, absent: Absent | None, slopes: Slopes | None, x: Array, targets: Array, *arrays: Array
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
