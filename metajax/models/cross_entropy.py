"""Cross-entropy of the output matrix in blocks of positions, so that the logits of a batch never exist as one array.

On a mesh each device takes its own positions and its part of the vocabulary. The gradient with respect to the matrix is
added up on each device over its blocks, and over the devices once. XLA would do so in every block.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas.cross_entropy import Absent, Axes, Hidden, Matrix, PerToken, Slopes, TokenScores, cross_entropy_blocks
from metajax.distributed.rules import SPREAD, constrain, partition_spec

MATRIX_AXES = ("vocab", "embed")


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


def _blockwise(
    x: Hidden, matrix: Matrix, targets: Array, absent: Absent | None, *arrays: PerToken, slopes: Slopes | None = None
) -> tuple[TokenScores, tuple[Hidden, Matrix] | None]:
    """(scores, gradient by x and matrix, or None without `slopes`), computed on the devices that hold the positions."""
    mesh, cast = jax.sharding.get_abstract_mesh(), matrix.astype(x.dtype)
    local = functools.partial(cross_entropy_blocks, slopes=slopes)
    if mesh.size <= 1 or AxisType.Manual in mesh.axis_types:
        scores, gradients = local(Axes(), x, cast, targets, absent, *arrays)
        return scores, gradients and (gradients[0], gradients[1].astype(matrix.dtype))
    rows, whole = partition_spec(("batch", "length"), targets.shape, mesh), partition_spec(("vocab", None), matrix.shape, mesh)
    own = partition_spec(MATRIX_AXES, matrix.shape, mesh)
    over = tuple(name for entry in rows for name in _names(entry))
    spread = tuple(tuple(name for name in _names(entry) if name in SPREAD) for entry in own)
    scatters = set(over).issuperset(name for names in spread for name in names)
    axes = Axes(over, _names(whole[0]), spread if scatters else ((), ()))
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
