"""Position schemes: inverse frequencies of the rotary schemes, cosine and sine tables, and the rotation.

Frequencies depend only on the config. They are computed in float64 NumPy and rounded once to float32. The forward pass
makes the tables from the positions of the batch; a model never stores them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from metajax.config import Model
from metajax.core.errors import nearest, require

LOW_TURNS, HIGH_TURNS = 1.0, 4.0  # of "llama3": it blends between these numbers of turns over the original length
Table = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]  # (cosine, sine) of each position
Rotary = tuple[np.ndarray, float]  # (frequencies float64[head_dim / 2] in radians per position, factor of cosine and sine)
SCHEMES: dict[str, Callable[[Model], Rotary | None]] = {}


def position(name: str) -> Callable[[Callable], Callable]:
    """Register a function of the model's config as the position scheme `name`; it returns None if the scheme does not rotate."""

    def register(scheme: Callable[[Model], Rotary | None]) -> Callable[[Model], Rotary | None]:
        SCHEMES[name] = scheme
        return scheme

    return register


@position("none")
@position("learned")
def _not_rotary(cfg: Model) -> None:
    """Learned position vectors, added to the embeddings in `LM.embed`, or no positions."""


@position("rope")
def _rope(cfg: Model) -> Rotary:
    """theta^(-2i / head_dim) (RoFormer, arXiv 2104.09864, section 3.2.2)."""
    return _powers(cfg.head_dim, cfg.rope_theta), 1.0


@position("linear")
def _linear(cfg: Model) -> Rotary:
    """Positions divided by `rope_factor` (Chen et al., arXiv 2306.15595)."""
    return _powers(cfg.head_dim, cfg.rope_theta) / cfg.rope_factor, 1.0


@position("llama3")
def _llama3(cfg: Model) -> Rotary:
    """Llama 3.1's scaling (The Llama 3 Herd, arXiv 2407.21783).

    Frequencies above HIGH_TURNS turns over the original length are kept. Those below LOW_TURNS are divided by `rope_factor`.
    Between them the two are blended by the turns.
    """
    powers = _powers(cfg.head_dim, cfg.rope_theta)
    turns = cfg.rope_original_length * powers / (2 * math.pi)
    return _blend(powers, cfg.rope_factor, np.clip((turns - LOW_TURNS) / (HIGH_TURNS - LOW_TURNS), 0, 1)), 1.0


@position("ntk")
def _ntk(cfg: Model) -> Rotary:
    """theta times rope_factor^(head_dim / (head_dim - 2)) (NTK-aware; YaRN, arXiv 2309.00071, section 3.1); see `hymba_ntk_factor`."""
    dim = cfg.head_dim
    return _powers(dim, cfg.rope_theta * cfg.rope_factor ** (dim / (dim - 2))), 1.0


@position("yarn")
def _yarn(cfg: Model) -> Rotary:
    frequencies = yarn_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_original_length, cfg.rope_factor)
    return frequencies, yarn_magnitude(cfg.rope_factor)


def yarn_frequencies(
    dim: int,
    base: float,
    original_length: int,
    factor: float,
    *,
    extrapolation: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> np.ndarray:
    """float64[dim / 2]: fast frequencies kept, slow ones divided by `factor`, a ramp between (YaRN, arXiv 2309.00071, section 3.2)."""
    low, high = yarn_range(dim, base, original_length, beta_fast, beta_slow)
    width = high - low if high != low else 0.001  # for a range of one index the ramp is a step
    keep = (1 - np.clip((np.arange(dim // 2) - low) / width, 0, 1)) * extrapolation
    return _blend(_powers(dim, base), factor, keep)


def yarn_range(dim: int, base: float, original_length: int, beta_fast: float = 32.0, beta_slow: float = 1.0) -> tuple[int, int]:
    """(low, high), the frequency indices between which YaRN blends (arXiv 2309.00071, section 3.2, NTK-by-parts).

    Frequencies above `beta_fast` turns over the original length are kept; those below `beta_slow` are interpolated.
    """

    def index(turns: float) -> float:
        return dim * math.log(original_length / (2 * math.pi * turns)) / (2 * math.log(base))

    return max(math.floor(index(beta_fast)), 0), min(math.ceil(index(beta_slow)), dim - 1)


def yarn_magnitude(factor: float, attention_factor: float = 1.0) -> float:
    """Factor for cosine and sine: (0.1 ln(factor) + 1) * attention_factor (YaRN, arXiv 2309.00071, equation 22)."""
    return (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0) * attention_factor


def _powers(dim: int, base: float) -> np.ndarray:
    return base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def _blend(powers: np.ndarray, factor: float, keep: np.ndarray) -> np.ndarray:
    return powers * keep + powers / factor * (1 - keep)


def rotary_of(cfg: Model) -> Rotary | None:
    """The scheme `cfg.position`; None if it does not rotate. UserError for an unknown name or an odd head width."""
    where = f"model.position = {cfg.position!r}"
    known = f"expected one of {', '.join(SCHEMES)}{nearest(cfg.position, SCHEMES)}"
    require(cfg.position in SCHEMES, f"{where}: {known}")
    rotary, width = SCHEMES[cfg.position](cfg), cfg.head_dim
    even = rotary is None or width % 2 == 0
    require(even, f"{where} needs an even head width, but model.width / model.heads = {width}")
    return rotary


def rotary_table(cfg: Model, positions: Int[Array, "B T"]) -> Table | None:
    """(cos, sin) of the scheme `cfg.position`; None if it does not rotate. A negative position means none: angle 0."""
    rotary = rotary_of(cfg)
    return None if rotary is None else rotary_angles(rotary[0], jnp.maximum(positions, 0), rotary[1])


def rotary_angles(frequencies: np.ndarray, positions: Int[Array, "B T"], magnitude: float = 1.0) -> Table:
    """(cos, sin), float32[B, T, D / 2] each, multiplied by `magnitude`."""
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies.astype(np.float32))
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


@jax.custom_vjp
def apply_rotary(
    x: Float[Array, "B T H D"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T H D"]:
    """Rotate the pairs (x[i], x[i + D/2]) of each head by their angles, in float32, and return the dtype of `x`.

    The gradient is the rotation back; it is taken by `x` alone.
    """
    cos, sin = (jnp.concatenate([y, y], axis=-1)[:, :, None] for y in (cos, sin))
    partners = jax.lax.platform_dependent(x, tpu=_partners_by_product, default=_partners)
    return (x.astype(jnp.float32) * cos + partners * sin).astype(x.dtype)


def _partners(x: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
    """(-x[i + D/2], x[i]) of each pair, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


def _partners_by_product(x: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
    """The same, exactly, as a product with a permutation. It keeps the layout of `x`; a TPU would move the two halves several times."""
    turn = np.kron([[0.0, 1.0], [-1.0, 0.0]], np.eye(x.shape[-1] // 2))
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("bthd,de->bthe", x, jnp.asarray(turn, x.dtype), precision=precision, preferred_element_type=jnp.float32)


def _rotate(x: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return apply_rotary(x, cos, sin), (cos, sin)


def _rotate_back(angles: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None]:
    cos, sin = angles
    return apply_rotary(cotangent, cos, -sin), None, None


apply_rotary.defvjp(_rotate, _rotate_back)
