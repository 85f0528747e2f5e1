"""Position-wise modules: parameters with logical axes, linear maps, norms and the feed-forward network.

Every parameter is float32 and carries `axes`, one logical name for each of its dimensions. Vectors (norm scales and all
biases) have the axes ("norm",). The input's dtype is the compute dtype; weights are cast to it at use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from metajax.config import Model
from metajax.distributed.rules import RULES, constrain

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "swiglu": jax.nn.silu,
}


def normal_param(key: PRNGKeyArray, shape: tuple[int, ...], std: float, axes: tuple[str, ...]) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2)."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes)


def residual_std(cfg: Model) -> float:
    """Initial standard deviation of projections into the residual stream: init_std / sqrt(2 layers) (GPT-2, section 2.3)."""
    return cfg.init_std / (2 * cfg.layers) ** 0.5


class Linear(nnx.Module):
    """y = x w + b over the last axis, [..., inputs] -> [..., outputs]; `b` is None without a bias."""

    def __init__(self, key: PRNGKeyArray, shape: tuple[int, int], *, std: float, bias: bool, axes: tuple[str, str]):
        self.w = normal_param(key, shape, std, axes)
        self.b = nnx.Param(jnp.zeros(shape[1], jnp.float32), axes=("norm",)) if bias else None

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        y = as_rows(x) @ gathered(self.w, x.dtype)
        y = y if self.b is None else y + self.b[...].astype(x.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def gathered(param: nnx.Param, dtype: DTypeLike) -> Array:
    """A parameter in the compute dtype, gathered from the devices it is spread over; its part of `tensor` stays on its device.

    XLA would multiply by the sharded weight in a ring of small products, which round each partial sum to the compute dtype.
    """
    axes = (axis if RULES[axis] == ("tensor",) else None for axis in param.get_metadata()["axes"])
    return constrain(param[...].astype(dtype), tuple(axes))


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last axis, with statistics in float32. A LayerNorm has a bias if `cfg.bias`.

    width: size of the last axis (0: the model's width). scaled: whether there is a learned scale.
    """

    def __init__(self, cfg: Model, *, width: int = 0, scaled: bool = True):
        self.kind, self.eps = cfg.norm, cfg.norm_eps
        self.scale = nnx.Param(jnp.ones(width or cfg.width, jnp.float32), axes=("norm",)) if scaled else None
        biased = cfg.bias and cfg.norm == "layernorm"
        self.bias = nnx.Param(jnp.zeros(width or cfg.width, jnp.float32), axes=("norm",)) if biased else None

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        wide = x.astype(jnp.float32)
        if self.kind == "layernorm":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.kind == "rmsnorm":
            wide = wide.astype(x.dtype)  # Llama and Hymba round before they apply the scale
        y = wide if self.scale is None else wide * self.scale[...].astype(wide.dtype)
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class Mlp(nnx.Module):
    """Feed-forward network: down(act(up(x))), or with "swiglu" down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202).

    down_std: initial standard deviation of `down`; None: `residual_std`.
    """

    def __init__(self, cfg: Model, key: PRNGKeyArray, down_std: float | None = None):
        keys = jax.random.split(key, 3)
        wide, narrow = (cfg.width, cfg.mlp_width), (cfg.mlp_width, cfg.width)
        self.activation = cfg.activation
        self.up = Linear(keys[0], wide, std=cfg.init_std, bias=cfg.bias, axes=("embed", "mlp"))
        self.down = Linear(keys[1], narrow, std=down_std or residual_std(cfg), bias=cfg.bias, axes=("mlp", "embed"))
        gated = cfg.activation == "swiglu"
        self.gate = Linear(keys[2], wide, std=cfg.init_std, bias=cfg.bias, axes=("embed", "mlp")) if gated else None

    def __call__(self, x: Float[Array, "B T width"]) -> Float[Array, "B T width"]:
        act = ACTIVATIONS[self.activation]
        hidden = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(hidden)


def scan_layers(body: Callable[..., Any], carry: Any, stacked: Any, *, layers: int, remat: str, unroll: int) -> tuple[Any, Any]:
    """Scan `body` over stacked layers. remat: "none", "full", or "dots", which keeps the results of weight products."""
    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        # If the loop is fully unrolled, the compiler could merge the forward pass with its recomputation and undo the saving.
        body = jax.checkpoint(body, policy=policy, prevent_cse=unroll >= layers)
    return jax.lax.scan(body, carry, stacked, unroll=unroll)


def as_rows(x: Float[Array, "*batch width"]) -> Float[Array, "... width"]:
    """`x` with merged leading dimensions, [rows, width]; unchanged if the current mesh shards its length.

    The weight gradient then contracts one dimension. XLA's CPU backend does this several times faster than two, for which
    it materialises transposed copies and repeats the elementwise work before them.
    """
    return x if jax.sharding.get_abstract_mesh().shape.get("context", 1) > 1 else x.reshape(-1, x.shape[-1])


def gather_rows(x: Array, positions: Array) -> Array:
    """Gather rows of each sequence: [B, T, ...] at int32[B, M] -> [B, M, ...]. A position >= T reads zeros."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, positions)


def scatter_add_rows(x: Array, positions: Array, rows: Array) -> Array:
    """Add `rows` [B, M, ...] to x [B, T, ...] at the positions int32[B, M]. A position >= T is dropped."""
    return jax.vmap(lambda row, at, r: row.at[at].add(r, mode="drop"))(x, positions, rows)
