"""CLIP's convolutional image tower: a ResNet with a stem of three convolutions, average pools for strides and an attention pool.

Batch norms always use their running statistics, as is usual with a published CLIP. These are `nnx.BatchStat`s, not parameters, so
a tower of this kind can be fine-tuned here but not trained from scratch.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from metajax.core.errors import nearest, require
from metajax.models.layers import Linear, normal_param
from metajax.vision.clip.config import Clip

# Intermediates that the tower can return besides its features: [B, H/4, W/4, channels] after the stem, and [B, H/32, W/32,
# channels] before the attention pool.
CAPTURABLE = ("stem", "final")
_EPS = 1e-5
EXPANSION = 4  # a bottleneck's output channels / its inner ones


def check_captures(names: tuple[str, ...], known: tuple[str, ...]) -> None:
    """UserError for the name of an intermediate that a tower does not have."""
    for name in names:
        require(name in known, f"capture: unknown {name!r}{nearest(name, known)}; known: {', '.join(known)}")


class Conv(nnx.Module):
    """A square convolution without a bias, [B, H, W, inputs] -> [B, H', W', outputs]; size: (side, inputs, outputs)."""

    def __init__(self, key: PRNGKeyArray, size: tuple[int, int, int]):
        side, inputs, outputs = size
        axes = ("taps", "taps", "inputs", "embed")
        self.kernel = normal_param(key, (side, side, inputs, outputs), (side * side * inputs) ** -0.5, axes)

    def __call__(self, x: Float[Array, "B H W inputs"], *, stride: int = 1, padding: int = 0) -> Float[Array, "B H2 W2 outputs"]:
        layout = ("NHWC", "HWIO", "NHWC")
        pads = [(padding, padding)] * 2
        return jax.lax.conv_general_dilated(x, self.kernel[...].astype(x.dtype), (stride,) * 2, pads, dimension_numbers=layout)


class BatchNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over channels, with running statistics, in float32."""

    def __init__(self, channels: int):
        zeros, ones = jnp.zeros(channels, jnp.float32), jnp.ones(channels, jnp.float32)
        self.scale, self.bias = nnx.Param(ones, axes=("norm",)), nnx.Param(zeros, axes=("norm",))
        self.mean, self.var = nnx.BatchStat(zeros, axes=("norm",)), nnx.BatchStat(ones, axes=("norm",))

    def __call__(self, x: Float[Array, "B H W channels"]) -> Float[Array, "B H W channels"]:
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + _EPS)
        return ((x.astype(jnp.float32) - self.mean[...]) * factor + self.bias[...]).astype(x.dtype)


class ConvNorm(nnx.Module):
    """A convolution that keeps the size (up to its stride), then a batch norm."""

    def __init__(self, key: PRNGKeyArray, size: tuple[int, int, int]):
        self.side = size[0]
        self.conv, self.norm = Conv(key, size), BatchNorm(size[2])

    def __call__(self, x: Float[Array, "B H W inputs"], stride: int = 1) -> Float[Array, "B H2 W2 outputs"]:
        return self.norm(self.conv(x, stride=stride, padding=self.side // 2))


def _halved(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Means of 2 x 2 pixels."""
    batch, height, width, channels = x.shape
    return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


class Bottleneck(nnx.Module):
    """Convolutions 1x1, 3x3, 1x1 with a shortcut. If the block halves the image, both use means of 2 x 2 instead of strides."""

    def __init__(self, key: PRNGKeyArray, inputs: int, channels: int, *, halves: bool):
        keys, outputs = jax.random.split(key, 4), channels * EXPANSION
        self.halves = halves
        self.reduce = ConvNorm(keys[0], (1, inputs, channels))
        self.spatial = ConvNorm(keys[1], (3, channels, channels))
        self.expand = ConvNorm(keys[2], (1, channels, outputs))
        self.shortcut = ConvNorm(keys[3], (1, inputs, outputs)) if halves or inputs != outputs else None

    def __call__(self, x: Float[Array, "B H W inputs"]) -> Float[Array, "B H2 W2 outputs"]:
        inner = jax.nn.relu(self.spatial(jax.nn.relu(self.reduce(x))))
        if self.halves:
            inner, x = _halved(inner), _halved(x)
        return jax.nn.relu(self.expand(inner) + (x if self.shortcut is None else self.shortcut(x)))


class AttentionPool(nnx.Module):
    """Attention over pixels and their mean as tokens. The mean is the only query; its output is the image's features."""

    def __init__(self, cfg: Clip, key: PRNGKeyArray):
        keys = jax.random.split(key, 5)
        width, tokens = cfg.vision_width * 8 * EXPANSION, (cfg.image_size // 32) ** 2 + 1
        self.heads, std = cfg.vision_heads, width**-0.5
        self.positions = normal_param(keys[0], (tokens, width), std, ("positions", "embed"))
        linear = functools.partial(Linear, std=std, bias=True, axes=("embed", "heads"))
        self.query, self.key, self.value = (linear(key, (width, width)) for key in keys[1:4])
        self.output = linear(keys[4], (width, cfg.embed))

    def __call__(self, x: Float[Array, "B H W channels"]) -> Float[Array, "B features"]:
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = jnp.concatenate([jnp.mean(x, axis=1, keepdims=True), x], axis=1) + self.positions[...].astype(x.dtype)
        q, k, v = self.query(x[:, :1]), self.key(x), self.value(x)
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in (q, k, v))
        return self.output(jax.nn.dot_product_attention(q, k, v).reshape(x.shape[0], -1))


class ModifiedResNet(nnx.Module):
    """CLIP's ResNet: a stem (a quarter of the side), four stages (an eighth of that), attention pool."""

    def __init__(self, cfg: Clip, key: PRNGKeyArray):
        stem_key, pool_key, *stage_keys = jax.random.split(key, 6)
        width, self.dtype = cfg.vision_width, cfg.compute_dtype
        sizes = ((3, 3, width // 2), (3, width // 2, width // 2), (3, width // 2, width))
        self.stem = nnx.List([ConvNorm(k, size) for k, size in zip(jax.random.split(stem_key, 3), sizes, strict=True)])
        self.stages, inputs = nnx.List([]), width
        for stage, (count, key) in enumerate(zip(cfg.vision_layers, stage_keys, strict=True)):
            blocks = []
            for n, block_key in enumerate(jax.random.split(key, count)):
                blocks.append(Bottleneck(block_key, inputs, width << stage, halves=stage > 0 and n == 0))
                inputs = (width << stage) * EXPANSION
            self.stages.append(nnx.List(blocks))
        self.pool = AttentionPool(cfg, pool_key)

    def __call__(
        self, images: Float[Array, "B H W 3"], capture: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "B features"], dict[str, Array]]:
        """(features, captured intermediates) of normalised images."""
        check_captures(capture, CAPTURABLE)
        x = images.astype(self.dtype)
        for n, conv in enumerate(self.stem):
            x = jax.nn.relu(conv(x, stride=2 if n == 0 else 1))
        stem = x = _halved(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        captured = {"stem": stem, "final": x}
        return self.pool(x), {name: captured[name] for name in capture}
