"""Mamba-1 (arXiv 2312.00752, algorithm 2 and section 3.4) in the form of Hymba (arXiv 2411.13676, section 2.1).

dt, B and C are normalised before the scan. Hymba speaks of "Mamba heads", but there is one set of parameters and no head structure.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from metajax.config import Model
from metajax.models import ops
from metajax.models.layers import Linear, Norm
from metajax.models.mixers.base import Captures, LayerSpec, mixer
from metajax.models.mixers.ssm import StateSpace, hybrid_of

DT_RANGE = (1e-3, 1e-1)  # range of the initial step sizes with dt_init "mamba" (arXiv 2312.00752, section 3.6)


@mixer("mamba")
class Mamba(StateSpace):
    """Mamba-1: a step size for each channel."""

    captures = (
        *StateSpace.captures,
        "ssm_step",  # float32[L, B, T, C], step sizes
        "ssm_b",  # [L, B, T, N], what a token writes into the state
        "ssm_c",  # [L, B, T, N], what it reads from it
    )

    def __init__(self, cfg: Model, spec: LayerSpec, implementation: str, key: PRNGKeyArray):
        keys, hybrid, std = jax.random.split(key, 6), hybrid_of(cfg), cfg.init_std
        super().__init__(cfg, implementation, *keys[:3])
        channels, rank, state = cfg.ssm_width, cfg.dt_rank, hybrid.state
        self.splits = (rank, rank + state)
        self.x_proj = Linear(keys[3], (channels, rank + 2 * state), std=std, bias=False, axes=("channels", "selection"))
        self.dt_proj = Linear(keys[4], (rank, channels), std=std, bias=False, axes=("selection", "channels"))
        self.dt_bias = nnx.Param(_dt_bias(hybrid.dt_init, channels, keys[5]), axes=("norm",))
        self.A_log = nnx.Param(jnp.tile(jnp.log(jnp.arange(1.0, state + 1)), (channels, 1)), axes=("channels", "rate"))
        self.D = nnx.Param(jnp.ones(channels, jnp.float32), axes=("norm",))
        inner = hybrid.inner_norms
        self.dt_norm, self.b_norm, self.c_norm = (Norm(cfg, width=n) if inner else None for n in (rank, state, state))

    def scan(self, h: Array, x: Array, captures: Captures, **options: Any) -> tuple[Array, Array]:
        selected = jnp.split(self.x_proj(x), self.splits, axis=-1)
        norms = (self.dt_norm, self.b_norm, self.c_norm)
        low_rank, b, c = (part if norm is None else norm(part) for norm, part in zip(norms, selected, strict=True))
        if captures.wants("ssm_step"):
            dt = self.dt_proj(low_rank).astype(jnp.float32)
            captures.record("ssm_step", jax.nn.softplus(dt + self.dt_bias[...]))
        captures.record("ssm_b", b)
        captures.record("ssm_c", c)
        steps = {"dt": self.dt_proj(low_rank), "dt_bias": self.dt_bias[...]}
        A, gate = -jnp.exp(self.A_log[...]), self.gate_proj(h)
        return ops.selective_scan(u=x, A=A, B=b, C=c, D=self.D[...], z=gate, **steps, **options)

    @staticmethod
    def token_flops(cfg: Model, spec: LayerSpec) -> dict[str, int]:
        channels, hybrid = cfg.ssm_width, hybrid_of(cfg)
        return {
            "mamba": 2 * channels * (2 * cfg.width + 2 * cfg.dt_rank + 2 * hybrid.state),
            "conv": 2 * hybrid.d_conv * channels,
            "scan": scan_operations(channels, hybrid.state),
        }


def _dt_bias(kind: str, channels: int, key: PRNGKeyArray) -> Float[Array, " C"]:
    """Zeros, or the inverse softplus of step sizes drawn log-uniformly from DT_RANGE."""
    if kind == "zero":
        return jnp.zeros(channels, jnp.float32)
    low, high = jnp.log(jnp.array(DT_RANGE))
    dt = jnp.exp(jax.random.uniform(key, (channels,), minval=low, maxval=high))
    return dt + jnp.log(-jnp.expm1(-dt))


def scan_operations(channels: int, state: int) -> int:
    """Operations per token in the scan; a transcendental function counts as one.

    Each state takes 7: dt A, its exponential, times h, (dt u) B, add, times C, add. Each channel takes 6: bias and softplus
    of dt, dt u, D u (which starts the sum over states), silu of the gate and the product with it.
    """
    return channels * (7 * state + 6)
