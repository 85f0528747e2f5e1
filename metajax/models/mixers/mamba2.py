"""Mamba-2: one decay per head, so that the recurrence inside a chunk is a matrix product.

Transformers are SSMs (Dao and Gu, arXiv 2405.21060): the parallel projections of figure 6 and the chunked algorithm of section 6,
in plain XLA. Segments (packed documents) are our addition: each starts from the state after the learned prefix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metajax.config import Model
from metajax.core.errors import require
from metajax.models import ops
from metajax.models.layers import Linear, Norm, normal_param
from metajax.models.mixers.base import Cache, Captures, LayerInputs, LayerSpec, Mixer, mixer
from metajax.models.mixers.mamba import State, starts, state_bytes

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
    goes_on = (segment_ids == before[:, None])[..., None, None]
    carried = jnp.einsum("bin,bhpn->bihp", c, state), jnp.einsum("bin,hpn->bihp", c, reset)
    y = y + left[..., None] * jnp.where(goes_on, *carried)

    to_end = jnp.exp(gaps[:, -1]) * dt
    origin = jnp.where(goes_on[:, -1, None], state, reset)
    return jnp.einsum("bjh,bjhp,bjn->bhpn", to_end, x, b) + left[:, -1, :, None, None] * origin, y


def heads_of(cfg: Model) -> int:
    """Number of heads of 64 channels; one head if there are fewer channels."""
    return max(1, cfg.ssm_width // HEAD)


@mixer("mamba2")
class Mamba2(Mixer):
    """[B, T, width] -> gated and normalised scan output [B, T, C]. Each of the C = expand * width channels has N states."""

    captures = ("ssm_branch", "conv_tail", "ssm_state")  # as of Mamba-1

    def __init__(self, cfg: Model, spec: LayerSpec, implementation: str, key: PRNGKeyArray):
        keys, std, channels, state = jax.random.split(key, 5), cfg.init_std, cfg.ssm_width, cfg.hybrid.state
        heads, convolved = heads_of(cfg), channels + 2 * state  # B and C are convolved too
        require(
            channels % heads == 0,
            f"model.hybrid.ssm = 'mamba2': {channels} channels (expand * width) are no whole number of heads of {HEAD}",
        )
        self.implementation, self.splits = implementation, (channels, channels + state)
        self.in_proj = Linear(keys[0], (cfg.width, convolved), std=std, bias=False, axes=("embed", "ssm"))
        self.gate_proj = Linear(keys[1], (cfg.width, channels), std=std, bias=False, axes=("embed", "ssm"))
        self.dt_proj = Linear(keys[2], (cfg.width, heads), std=std, bias=False, axes=("embed", "selection"))
        self.conv = normal_param(keys[3], (convolved, cfg.hybrid.d_conv), std, ("channels", "taps"))
        self.conv_bias = nnx.Param(jnp.zeros(convolved, jnp.float32), axes=("norm",))
        self.dt_bias = nnx.Param(jnp.zeros(heads, jnp.float32), axes=("norm",))
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(keys[4], (heads,), minval=1.0, maxval=16.0)), axes=("norm",))
        self.D = nnx.Param(jnp.ones(heads, jnp.float32), axes=("norm",))
        self.norm = Norm(cfg, width=channels)

    def __call__(
        self, h: Float[Array, "B T width"], inputs: LayerInputs, cache: Cache, captures: Captures
    ) -> tuple[Float[Array, "B T C"], State]:
        options = {"segment_ids": inputs.segment_ids, "implementation": self.implementation}
        tails, states = starts(cache, "mamba2")
        mixed, tail = ops.causal_conv(self.in_proj(h), self.conv[...], self.conv_bias[...], **tails, **options)
        x, b, c = jnp.split(mixed, self.splits, axis=-1)
        heads, rows, channels, numbers = len(self.D[...]), len(h), x.shape[-1], b.shape[-1]
        by_head = lambda s: s.reshape(*s.shape[:-2], heads, channels // heads, numbers)  # noqa: E731
        reset, begin = states["reset_state"], states["initial_state"]
        reset = jnp.zeros((channels, numbers)) if reset is None else reset
        begin = jnp.broadcast_to(reset, (rows, channels, numbers)) if begin is None else begin
        dt = jax.nn.softplus(self.dt_proj(h).astype(jnp.float32) + self.dt_bias[...])
        split = x.reshape(*x.shape[:2], heads, -1)
        A = -jnp.exp(self.A_log[...])
        y, last = chunked_scan(split, dt, A, b, c, inputs.segment_ids, by_head(begin), by_head(reset))
        y = (y + self.D[...][:, None] * split).reshape(x.shape).astype(x.dtype)
        y, state = self.norm(y * jax.nn.silu(self.gate_proj(h))), last.reshape(rows, channels, numbers)
        for name, value in (("ssm_branch", y), ("conv_tail", tail), ("ssm_state", state)):
            captures.record(name, value)
        return y, (tail, state)

    @staticmethod
    def channels(cfg: Model) -> int:
        return cfg.ssm_width

    @staticmethod
    def token_flops(cfg: Model, spec: LayerSpec) -> dict[str, int]:
        """The scan is counted from the recurrence, as for Mamba-1.

        Each state takes 5: decay h, (dt x) B, add, times C, add. Each channel takes 7: dt x, D x, add, silu of the gate, its
        product, and two for the norm. Each head takes 4: bias and softplus of dt, dt A, its exponential.
        """
        channels, state, heads = cfg.ssm_width, cfg.hybrid.state, heads_of(cfg)
        convolved = channels + 2 * state
        return {
            "mamba2": 2 * cfg.width * (channels + convolved + heads),
            "conv": 2 * cfg.hybrid.d_conv * convolved,
            "scan": channels * (5 * state + 7) + 4 * heads,
        }

    @staticmethod
    def cache_bytes(cfg: Model, spec: LayerSpec, tokens: int) -> dict[str, int]:
        return state_bytes(cfg, cfg.ssm_width + 2 * cfg.hybrid.state)
