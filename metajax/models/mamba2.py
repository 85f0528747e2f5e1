"""Mamba-2 as a branch of a layer: one decay for each head, which makes the recurrence a product of matrices inside a chunk.

Transformers are SSMs (Dao and Gu, arXiv 2405.21060): the parallel projections of figure 6, and the chunked algorithm of section 6 in plain
XLA. Segments (packed documents) are an addition: each starts from one given state, the one that the meta tokens leave.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metajax.config import Model
from metajax.models import ops
from metajax.models.attention import Taps
from metajax.models.layers import Linear, Norm, normal_param

CHUNK = 64  # tokens of a chunk


def chunked_scan(
    x: Float[Array, "B T H P"],
    steps: Float[Array, "B T H"],
    rates: Float[Array, " H"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    segment_ids: Int[Array, "B T"],
    initial_state: Float[Array, "B H P N"],
    reset_state: Float[Array, "H P N"],
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
    """(y, last state) of h_t = exp(step_t rate) h_(t-1) + step_t x_t B_t, y_t = h_t C_t, in float32.

    The row's first segment goes on from `initial_state`, every later one starts from `reset_state`.
    """
    length, size = x.shape[1], min(CHUNK, x.shape[1])
    pad = -length % size  # steps of 0 leave the state as it is
    arrays = (jnp.pad(z.astype(jnp.float32), ((0, 0), (0, pad), *((0, 0),) * (z.ndim - 2))) for z in (x, steps, b, c))
    tokens = (*arrays, jnp.pad(segment_ids, ((0, 0), (0, pad)), mode="edge"))
    chunks = jax.tree.map(lambda z: jnp.moveaxis(z.reshape(len(z), -1, size, *z.shape[2:]), 1, 0), tokens)

    @jax.checkpoint
    def step(carry: tuple[Array, Array], chunk: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        state, y = _chunk(*carry, reset_state.astype(jnp.float32), rates, *chunk)
        return (state, chunk[-1][:, -1]), y

    (state, _), y = jax.lax.scan(step, (initial_state.astype(jnp.float32), segment_ids[:, 0]), chunks)
    return jnp.moveaxis(y, 0, 1).reshape(len(x), -1, *x.shape[2:])[:, :length], state


def _chunk(
    state: Array, before: Array, reset: Array, rates: Array, x: Array, steps: Array, b: Array, c: Array, segment_ids: Array
) -> tuple[Array, Array]:
    """(state behind a chunk, its y); `before` [B] is the segment of the token in front of it."""
    index = jnp.arange(x.shape[1])
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    past = same & (index[None, :] <= index[:, None])
    # ln of what is left at a token of its segment's start, or the chunk's where it began before: sums of its own document alone.
    decay = jnp.einsum("bij,bjh->bih", past.astype(jnp.float32), steps * rates)
    left = jnp.exp(decay)

    gaps = jnp.where(past[..., None], decay[:, :, None] - decay[:, None, :], -jnp.inf)
    weights = jnp.einsum("bin,bjn->bij", c, b)[..., None] * jnp.exp(gaps) * steps[:, None]
    y = jnp.einsum("bijh,bjhp->bihp", weights, x)
    goes_on = (segment_ids == before[:, None])[..., None, None]
    carried = jnp.einsum("bin,bhpn->bihp", c, state), jnp.einsum("bin,hpn->bihp", c, reset)
    y = y + left[..., None] * jnp.where(goes_on, *carried)

    to_end = jnp.exp(gaps[:, -1]) * steps
    origin = jnp.where(goes_on[:, -1, None], state, reset)
    return jnp.einsum("bjh,bjhp,bjn->bhpn", to_end, x, b) + left[:, -1, :, None, None] * origin, y


class Mamba2(nnx.Module):
    """[B, T, width] -> gated and normalised scan output [B, T, C], C = expand * width channels, each with a state of N numbers."""

    def __init__(self, cfg: Model, implementation: str, key: PRNGKeyArray):
        keys, std, channels, state = jax.random.split(key, 5), cfg.init_std, cfg.ssm_width, cfg.hybrid.state
        self.implementation, self.splits, heads = implementation, (channels, channels + state), cfg.ssm_heads
        self.input = Linear(keys[0], (cfg.width, cfg.conv_width), std=std, bias=False, axes=("embed", "ssm"))
        self.gate = Linear(keys[1], (cfg.width, channels), std=std, bias=False, axes=("embed", "ssm"))
        self.step = Linear(keys[2], (cfg.width, heads), std=std, bias=False, axes=("embed", "selection"))
        self.conv = normal_param(keys[3], (cfg.conv_width, cfg.hybrid.d_conv), std, ("channels", "taps"))
        self.conv_bias = nnx.Param(jnp.zeros(cfg.conv_width, jnp.float32), axes=("norm",))
        self.step_bias = nnx.Param(jnp.zeros(heads, jnp.float32), axes=("norm",))
        self.log_rate = nnx.Param(jnp.log(jax.random.uniform(keys[4], (heads,), minval=1.0, maxval=16.0)), axes=("norm",))
        self.skip = nnx.Param(jnp.ones(heads, jnp.float32), axes=("norm",))
        self.norm = Norm(cfg, width=channels)

    def __call__(
        self,
        h: Float[Array, "B T width"],
        segment_ids: Int[Array, "B T"],
        taps: Taps,
        reset_tail: Float[Array, "tail D"] | None,
        reset_state: Float[Array, "C N"] | None,
        tail: Float[Array, "B tail D"] | None = None,
        state: Float[Array, "B C N"] | None = None,
    ) -> tuple[Float[Array, "B T C"], tuple[Float[Array, "B tail D"], Float[Array, "B C N"]]]:
        """(y, (last inputs of the convolution, D = C + 2 N of them, state after the last token)), as of `Mamba`."""
        options = {"segment_ids": segment_ids, "implementation": self.implementation}
        mixed, end = ops.causal_conv(
            self.input(h), self.conv[...], self.conv_bias[...], initial_tail=tail, reset_tail=reset_tail, **options
        )
        x, b, c = jnp.split(mixed, self.splits, axis=-1)
        heads, rows, channels, numbers = len(self.skip[...]), len(h), x.shape[-1], b.shape[-1]
        by_head = lambda s: s.reshape(*s.shape[:-2], heads, channels // heads, numbers)  # noqa: E731
        reset = jnp.zeros((channels, numbers)) if reset_state is None else reset_state
        begin = jnp.broadcast_to(reset, (rows, channels, numbers)) if state is None else state
        steps = jax.nn.softplus(self.step(h).astype(jnp.float32) + self.step_bias[...])
        split = x.reshape(*x.shape[:2], heads, -1)
        y, last = chunked_scan(split, steps, -jnp.exp(self.log_rate[...]), b, c, segment_ids, by_head(begin), by_head(reset))
        y = (y + self.skip[...][:, None] * split).reshape(x.shape).astype(x.dtype)
        return self.norm(y * jax.nn.silu(self.gate(h))), (end, last.reshape(rows, channels, numbers))
