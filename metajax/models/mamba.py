"""Mamba-1 as a branch of a layer: projections, convolution and selective scan with its gate, without the map back to the model's width.

Mamba (arXiv 2312.00752, algorithm 2 and section 3.4) in the form of Hymba (arXiv 2411.13676, section 2.1): step size, B and C are
normalised before the scan. "Mamba heads" is that paper's word; there is one set of parameters and no head structure.
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

STEP_RANGE = (1e-3, 1e-1)  # of the initial step sizes with dt_init "mamba" (arXiv 2312.00752, section 3.6)


class Mamba(nnx.Module):
    """[B, T, width] -> gated scan output [B, T, C], C = expand * width channels, each with a state of N numbers."""

    def __init__(self, cfg: Model, implementation: str, key: PRNGKeyArray):
        keys, hybrid, std = jax.random.split(key, 6), cfg.hybrid, cfg.init_std
        channels, rank, state = cfg.ssm_width, cfg.dt_rank, hybrid.state
        self.implementation, self.splits = implementation, (rank, rank + state)
        self.input = Linear(keys[0], (cfg.width, channels), std=std, bias=False, axes=("embed", "ssm"))
        self.gate = Linear(keys[1], (cfg.width, channels), std=std, bias=False, axes=("embed", "ssm"))
        self.conv = normal_param(keys[2], (channels, hybrid.d_conv), std, ("channels", "taps"))
        self.conv_bias = nnx.Param(jnp.zeros(channels, jnp.float32), axes=("norm",))
        self.select = Linear(keys[3], (channels, rank + 2 * state), std=std, bias=False, axes=("channels", "selection"))
        self.step = Linear(keys[4], (rank, channels), std=std, bias=False, axes=("selection", "channels"))
        self.step_bias = nnx.Param(_step_bias(hybrid.dt_init, channels, keys[5]), axes=("norm",))
        self.log_rate = nnx.Param(jnp.tile(jnp.log(jnp.arange(1.0, state + 1)), (channels, 1)), axes=("channels", "rate"))
        self.skip = nnx.Param(jnp.ones(channels, jnp.float32), axes=("norm",))
        inner = hybrid.inner_norms
        self.step_norm, self.b_norm, self.c_norm = (Norm(cfg, width=n) if inner else None for n in (rank, state, state))

    def __call__(
        self,
        h: Float[Array, "B T width"],
        segment_ids: Int[Array, "B T"],
        taps: Taps,
        reset_tail: Float[Array, "tail C"] | None,
        reset_state: Float[Array, "C N"] | None,
        tail: Float[Array, "B tail C"] | None = None,
        state: Float[Array, "B C N"] | None = None,
    ) -> tuple[Float[Array, "B T C"], tuple[Float[Array, "B tail C"], Float[Array, "B C N"]]]:
        """(y, (last inputs of the convolution, state after the last token)).

        Every segment starts from `reset_tail` and `reset_state` (None: zeros), a row that goes on from `tail` and `state`.
        """
        options = {"segment_ids": segment_ids, "implementation": self.implementation}
        tails, states = {"initial_tail": tail, "reset_tail": reset_tail}, {"initial_state": state, "reset_state": reset_state}
        x, end = ops.causal_conv(self.input(h), self.conv[...], self.conv_bias[...], **tails, **options)
        selected = jnp.split(self.select(x), self.splits, axis=-1)
        norms = (self.step_norm, self.b_norm, self.c_norm)
        step, b, c = (part if norm is None else norm(part) for norm, part in zip(norms, selected, strict=True))
        rates = -jnp.exp(self.log_rate[...])
        if taps.wants("ssm_step"):
            taps.record("ssm_step", jax.nn.softplus(self.step(step).astype(jnp.float32) + self.step_bias[...]))
        taps.record("ssm_b", b)
        taps.record("ssm_c", c)
        y, last = ops.selective_scan(
            x, self.step(step), rates, b, c, self.skip[...], self.step_bias[...], self.gate(h), **states, **options
        )
        return y, (end, last)


def _step_bias(kind: str, channels: int, key: PRNGKeyArray) -> Float[Array, " C"]:
    """Zeros, or the inverse softplus of step sizes drawn log-uniformly from STEP_RANGE."""
    if kind == "zero":
        return jnp.zeros(channels, jnp.float32)
    low, high = jnp.log(jnp.array(STEP_RANGE))
    step = jnp.exp(jax.random.uniform(key, (channels,), minval=low, maxval=high))
    return step + jnp.log(-jnp.expm1(-step))
