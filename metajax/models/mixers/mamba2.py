"""Mamba-2: one decay per head, so that the recurrence inside a chunk is a matrix product.

Transformers are SSMs (Dao and Gu, arXiv 2405.21060): the parallel projections of figure 6 and the chunked algorithm of section 6,
in plain XLA. Segments (packed documents) are our addition: each starts from the state after the learned prefix.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metajax.config import Model
from metajax.core.errors import require
from metajax.models.layers import Linear, Norm
from metajax.models.mixers.base import Captures, LayerSpec, mixer
from metajax.models.mixers.ssm import StateSpace, hybrid_of

CHUNK = 64  # tokens of a chunk
HEAD = 64  # channels of a head


def chunked_scan(
    x: Float[Array, "B T H P"],
    dt: Float[Array, "B T H"],
    A: Float[Array, " H"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    segment_ids: Int[Array, "B T"],
    initial_state: Float[Array, "B H P N"],
    reset_state: Float[Array, "H P N"],
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
    """(y, last state) of h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t, y_t = h_t C_t, in float32.

    The row's first segment continues `initial_state`; every later segment starts from `reset_state`.
    """
    length, size = x.shape[1], min(CHUNK, x.shape[1])
    pad = -length % size  # a dt of 0 leaves the state unchanged
    arrays = (jnp.pad(z.astype(jnp.float32), ((0, 0), (0, pad), *((0, 0),) * (z.ndim - 2))) for z in (x, dt, b, c))
    tokens = (*arrays, jnp.pad(segment_ids, ((0, 0), (0, pad)), mode="edge"))
    chunks = jax.tree.map(lambda z: jnp.moveaxis(z.reshape(len(z), -1, size, *z.shape[2:]), 1, 0), tokens)

    @jax.checkpoint
    def step(carry: tuple[Array, Array], chunk: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        state, y = _chunk(*carry, reset_state.astype(jnp.float32), A, *chunk)
        return (state, chunk[-1][:, -1]), y

    (state, _), y = jax.lax.scan(step, (initial_state.astype(jnp.float32), segment_ids[:, 0]), chunks)
    return jnp.moveaxis(y, 0, 1).reshape(len(x), -1, *x.shape[2:])[:, :length], state


def _chunk(
    state: Array, before: Array, reset: Array, A: Array, x: Array, dt: Array, b: Array, c: Array, segment_ids: Array
) -> tuple[Array, Array]:
    """(state after a chunk, y of the chunk); `before` [B] is the segment id of the token before the chunk."""
    index = jnp.arange(x.shape[1])
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    past = same & (index[None, :] <= index[:, None])
    # Log decay since the start of the token's segment, or of the chunk if the segment began earlier. No sum crosses a document.
    decay = jnp.einsum("bij,bjh->bih", past.astype(jnp.float32), dt * A)
    left = jnp.exp(decay)

    gaps = jnp.where(past[..., None], decay[:, :, None] - decay[:, None, :], -jnp.inf)
    weights = jnp.einsum("bin,bjn->bij", c, b)[..., None] * jnp.exp(gaps) * dt[:, None]
    y = jnp.einsum("bijh,bjhp->bihp", weights, x)
    continues = (segment_ids == before[:, None])[..., None, None]
    carried = jnp.einsum("bin,bhpn->bihp", c, state), jnp.einsum("bin,hpn->bihp", c, reset)
    y = y + left[..., None] * jnp.where(continues, *carried)

    to_end = jnp.exp(gaps[:, -1]) * dt
    origin = jnp.where(continues[:, -1, None], state, reset)
    return jnp.einsum("bjh,bjhp,bjn->bhpn", to_end, x, b) + left[:, -1, :, None, None] * origin, y


@mixer("mamba2")
class Mamba2(StateSpace):
    """Mamba-2: one step size for each head of 64 channels, or a single head if there are fewer channels."""

    def __init__(self, cfg: Model, spec: LayerSpec, implementation: str, key: PRNGKeyArray):
        keys, channels, heads = jax.random.split(key, 5), cfg.ssm_width, heads_of(cfg)
        require(
            channels % heads == 0,
            f"model.hybrid.ssm = 'mamba2': {channels} channels (expand * width) are no whole number of heads of {HEAD}",
        )
        super().__init__(cfg, implementation, keys[0], keys[1], keys[3])
        self.splits = (channels, channels + hybrid_of(cfg).state)
        self.dt_proj = Linear(keys[2], (cfg.width, heads), std=cfg.init_std, bias=False, axes=("embed", "selection"))
        self.dt_bias = nnx.Param(jnp.zeros(heads, jnp.float32), axes=("norm",))
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(keys[4], (heads,), minval=1.0, maxval=16.0)), axes=("norm",))
        self.D = nnx.Param(jnp.ones(heads, jnp.float32), axes=("norm",))
        self.norm = Norm(cfg, width=channels)

    def scan(
        self, h: Array, x: Array, captures: Captures, *, initial_state: Array | None, reset_state: Array | None, **options: Any
    ) -> tuple[Array, Array]:
        x, b, c = jnp.split(x, self.splits, axis=-1)
        heads, rows, channels, numbers = len(self.D[...]), len(h), x.shape[-1], b.shape[-1]
        by_head = lambda s: s.reshape(*s.shape[:-2], heads, channels // heads, numbers)  # noqa: E731
        reset = jnp.zeros((channels, numbers)) if reset_state is None else reset_state
        begin = jnp.broadcast_to(reset, (rows, channels, numbers)) if initial_state is None else initial_state
        dt = jax.nn.softplus(self.dt_proj(h).astype(jnp.float32) + self.dt_bias[...])
        split, A = x.reshape(*x.shape[:2], heads, -1), -jnp.exp(self.A_log[...])
        y, last = chunked_scan(split, dt, A, b, c, options["segment_ids"], by_head(begin), by_head(reset))
        y = (y + self.D[...][:, None] * split).reshape(x.shape).astype(x.dtype)
        return self.norm(y * jax.nn.silu(self.gate_proj(h))), last.reshape(rows, channels, numbers)

    @staticmethod
    def convolved(cfg: Model) -> int:
        return cfg.ssm_width + 2 * hybrid_of(cfg).state  # B and C are convolved too

    @staticmethod
    def token_flops(cfg: Model, spec: LayerSpec) -> dict[str, int]:
        """The scan is counted from the recurrence, as for Mamba-1.

        Each state takes 5: decay h, (dt x) B, add, times C, add. Each channel takes 7: dt x, D x, add, silu of the gate, its
        product, and two for the norm. Each head takes 4: bias and softplus of dt, dt A, its exponential.
        """
        channels, hybrid, heads, convolved = cfg.ssm_width, hybrid_of(cfg), heads_of(cfg), Mamba2.convolved(cfg)
        return {
            "mamba2": 2 * cfg.width * (channels + convolved + heads),
            "conv": 2 * hybrid.d_conv * convolved,
            "scan": channels * (5 * hybrid.state + 7) + 4 * heads,
        }


def heads_of(cfg: Model) -> int:
    return max(1, cfg.ssm_width // HEAD)
