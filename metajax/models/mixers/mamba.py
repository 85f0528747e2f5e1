"""Mamba-1: projections, convolution and gated selective scan, without the output projection to the model's width.

Mamba (arXiv 2312.00752, algorithm 2 and section 3.4) in the form of Hymba (arXiv 2411.13676, section 2.1): dt, B and C are
normalised before the scan. Hymba speaks of "Mamba heads", but there is one set of parameters and no head structure.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from metajax.config import Model
from metajax.models import ops
from metajax.models.layers import Linear, Norm, normal_param
from metajax.models.mixers.base import Cache, Captures, LayerInputs, LayerSpec, Mixer, mixer

DT_RANGE = (1e-3, 1e-1)  # range of the initial step sizes with dt_init "mamba" (arXiv 2312.00752, section 3.6)
State = tuple[Float[Array, "B tail D"], Float[Array, "B C N"]]  # (last inputs of the convolution, float32 state)


def starts(cache: Cache, name: str) -> tuple[dict[str, Array | None], dict[str, Array | None]]:
    """(tails of the convolution, states of the scan) to start from: the prefix's for a segment, the earlier tokens' for a row."""
    reset_tail, reset_state = (x[0] for x in cache.prefix[name]) if name in cache.prefix else (None, None)
    tail, state = cache.past.get(name, (None, None))
    return {"initial_tail": tail, "reset_tail": reset_tail}, {"initial_state": state, "reset_state": reset_state}


@mixer("mamba")
class Mamba(Mixer):
    """[B, T, width] -> gated scan output [B, T, C]. Each of the C = expand * width channels has N states."""

    captures = (
        "ssm_branch",  # [L, B, T, C], before its norm and the output map
        "conv_tail",  # [L, B, d_conv - 1, C], last inputs of the convolution
        "ssm_state",  # float32[L, B, C, N], after the last token
        "ssm_step",  # float32[L, B, T, C], step sizes
        "ssm_b",  # [L, B, T, N], what a token writes into the state
        "ssm_c",  # [L, B, T, N], what it reads from it
    )

    def __init__(self, cfg: Model, spec: LayerSpec, implementation: str, key: PRNGKeyArray):
        keys, hybrid, std = jax.random.split(key, 6), cfg.hybrid, cfg.init_std
        channels, rank, state = cfg.ssm_width, cfg.dt_rank, hybrid.state
        self.implementation, self.splits = implementation, (rank, rank + state)
        self.in_proj = Linear(keys[0], (cfg.width, channels), std=std, bias=False, axes=("embed", "ssm"))
        self.gate_proj = Linear(keys[1], (cfg.width, channels), std=std, bias=False, axes=("embed", "ssm"))
        self.conv = normal_param(keys[2], (channels, hybrid.d_conv), std, ("channels", "taps"))
        self.conv_bias = nnx.Param(jnp.zeros(channels, jnp.float32), axes=("norm",))
        self.x_proj = Linear(keys[3], (channels, rank + 2 * state), std=std, bias=False, axes=("channels", "selection"))
        self.dt_proj = Linear(keys[4], (rank, channels), std=std, bias=False, axes=("selection", "channels"))
        self.dt_bias = nnx.Param(_dt_bias(hybrid.dt_init, channels, keys[5]), axes=("norm",))
        self.A_log = nnx.Param(jnp.tile(jnp.log(jnp.arange(1.0, state + 1)), (channels, 1)), axes=("channels", "rate"))
        self.D = nnx.Param(jnp.ones(channels, jnp.float32), axes=("norm",))
        inner = hybrid.inner_norms
        self.dt_norm, self.b_norm, self.c_norm = (Norm(cfg, width=n) if inner else None for n in (rank, state, state))

    def __call__(
        self, h: Float[Array, "B T width"], inputs: LayerInputs, cache: Cache, captures: Captures
    ) -> tuple[Float[Array, "B T C"], State]:
        options = {"segment_ids": inputs.segment_ids, "implementation": self.implementation}
        tails, states = starts(cache, "mamba")
        x, tail = ops.causal_conv(self.in_proj(h), self.conv[...], self.conv_bias[...], **tails, **options)
        selected = jnp.split(self.x_proj(x), self.splits, axis=-1)
        norms = (self.dt_norm, self.b_norm, self.c_norm)
        low_rank, b, c = (part if norm is None else norm(part) for norm, part in zip(norms, selected, strict=True))
        if captures.wants("ssm_step"):
            dt = self.dt_proj(low_rank).astype(jnp.float32)
            captures.record("ssm_step", jax.nn.softplus(dt + self.dt_bias[...]))
        captures.record("ssm_b", b)
        captures.record("ssm_c", c)
        y, state = ops.selective_scan(
            x, self.dt_proj(low_rank), -jnp.exp(self.A_log[...]), b, c, self.D[...], self.dt_bias[...], self.gate_proj(h),
            **states, **options,
        )  # fmt: skip
        for name, value in (("ssm_branch", y), ("conv_tail", tail), ("ssm_state", state)):
            captures.record(name, value)
        return y, (tail, state)

    @staticmethod
    def channels(cfg: Model) -> int:
        return cfg.ssm_width

    @staticmethod
    def token_flops(cfg: Model, spec: LayerSpec) -> dict[str, int]:
        channels, selected = cfg.ssm_width, cfg.dt_rank + 2 * cfg.hybrid.state
        return {
            "mamba": 2 * channels * (2 * cfg.width + selected + cfg.dt_rank),
            "conv": 2 * cfg.hybrid.d_conv * channels,
            "scan": scan_operations(channels, cfg.hybrid.state),
        }

    @staticmethod
    def cache_bytes(cfg: Model, spec: LayerSpec, tokens: int) -> dict[str, int]:
        return state_bytes(cfg, cfg.ssm_width)


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


def state_bytes(cfg: Model, convolved: int) -> dict[str, int]:
    """Bytes of a float32 state and of the last inputs of a convolution over `convolved` channels, for one row."""
    tail = convolved * (cfg.hybrid.d_conv - 1) * jnp.dtype(cfg.compute_dtype).itemsize
    return {"state": 4 * cfg.ssm_width * cfg.hybrid.state, "conv": tail}
