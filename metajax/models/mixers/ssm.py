"""The base of Mamba-1 and Mamba-2: projections, a convolution and a gated scan, without the output map to the model's width."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from metajax.config import Hybrid, Model
from metajax.models import ops
from metajax.models.layers import Linear, normal_param
from metajax.models.mixers.base import Cache, Captures, LayerInputs, LayerSpec, Mixer

State = tuple[Float[Array, "B tail D"], Float[Array, "B C N"]]  # (last inputs of the convolution, float32 state)


def hybrid_of(cfg: Model) -> Hybrid:
    """The config of the hybrid layers."""
    if cfg.hybrid is None:
        raise ValueError("model.hybrid is null, but it holds the sizes of this mixer")
    return cfg.hybrid


class StateSpace(Mixer):
    """[B, T, width] -> gated scan output [B, T, C]. Each of the C = expand * width channels has N states."""

    captures = (
        "ssm_branch",  # [L, B, T, C], before its norm and the output map
        "conv_tail",  # [L, B, d_conv - 1, D], last inputs of the convolution
        "ssm_state",  # float32[L, B, C, N], after the last token
    )

    def __init__(self, cfg: Model, implementation: str, *keys: PRNGKeyArray):
        """keys: of the input projection, the gate projection and the convolution."""
        widths, std, convolved = (self.convolved(cfg), cfg.ssm_width), cfg.init_std, self.convolved(cfg)
        self.implementation = implementation
        self.in_proj, self.gate_proj = (
            Linear(key, (cfg.width, width), std=std, bias=False, axes=("embed", "ssm"))
            for key, width in zip(keys[:2], widths, strict=True)
        )
        self.conv = normal_param(keys[2], (convolved, hybrid_of(cfg).d_conv), std, ("channels", "taps"))
        self.conv_bias = nnx.Param(jnp.zeros(convolved, jnp.float32), axes=("norm",))

    def __call__(
        self, h: Float[Array, "B T width"], inputs: LayerInputs, cache: Cache, captures: Captures
    ) -> tuple[Float[Array, "B T C"], State]:
        """A segment starts from the state of the learned prefix, a row from that of its earlier tokens."""
        options = {"segment_ids": inputs.segment_ids, "implementation": self.implementation}
        reset_tail, reset_state = (x[0] for x in cache.prefix[self.name]) if self.name in cache.prefix else (None, None)
        tail, state = cache.past.get(self.name, (None, None))
        tails, states = {"initial_tail": tail, "reset_tail": reset_tail}, {"initial_state": state, "reset_state": reset_state}
        x, tail = ops.causal_conv(x=self.in_proj(h), w=self.conv[...], b=self.conv_bias[...], **tails, **options)
        y, state = self.scan(h, x, captures, **states, **options)
        for name, value in (("ssm_branch", y), ("conv_tail", tail), ("ssm_state", state)):
            captures.record(name, value)
        return y, (tail, state)

    def scan(
        self, h: Float[Array, "B T width"], x: Float[Array, "B T D"], captures: Captures, **options: Any
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B C N"]]:
        """(gated output, state after the last token); `x`: the output of the convolution, `options`: of `ops.selective_scan`."""
        raise NotImplementedError

    @staticmethod
    def convolved(cfg: Model) -> int:
        """D, the channels of the convolution."""
        return cfg.ssm_width

    @staticmethod
    def channels(cfg: Model) -> int:
        return cfg.ssm_width

    @classmethod
    def cache_bytes(cls, cfg: Model, spec: LayerSpec, tokens: int) -> dict[str, int]:
        tail = cls.convolved(cfg) * (hybrid_of(cfg).d_conv - 1) * jnp.dtype(cfg.compute_dtype).itemsize
        return {"state": 4 * cfg.ssm_width * hybrid_of(cfg).state, "conv": tail}
