"""The stack of pre-norm blocks of both CLIP towers, and the two towers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metajax.config import Model, Runtime
from metajax.core.errors import require
from metajax.distributed.rules import RESIDUAL_AXES, constrain
from metajax.models.layers import Mlp, Norm, normal_param, scan_layers
from metajax.models.mixers.attention import Projections
from metajax.models.mixers.base import Captures
from metajax.vision.clip.config import Clip
from metajax.vision.clip.convolution import Conv, check_captures

# Intermediates that towers can return besides their features.
CAPTURABLE = (
    "residual",  # [L, B, T, width], the input of each block
    "attention_probabilities",  # float32[L, B, heads, query, key], computed in addition to the tower's attention
    "final",  # [B, T, width], after the final norm; for images, after the last block
)
Captured = dict[str, Array]


class Block(nnx.Module):
    """x += Attention(norm x); x += Mlp(norm x), with full or causal attention."""

    def __init__(self, cfg: Model, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.attention, self.attention_norm = Projections(cfg, keys[0]), Norm(cfg)
        self.mlp, self.mlp_norm = Mlp(cfg, keys[1]), Norm(cfg)

    def __call__(self, x: Float[Array, "B T width"], captures: Captures, *, causal: bool) -> Float[Array, "B T width"]:
        captures.record("residual", x)
        q, k, v = self.attention.split(self.attention_norm(x), None)
        if captures.wants("attention_probabilities"):
            captures.record("attention_probabilities", _probabilities(q, k, causal))
        x = x + self.attention.merge(jax.nn.dot_product_attention(q, k, v, is_causal=causal))
        return constrain(x + self.mlp(self.mlp_norm(x)), RESIDUAL_AXES)


def _probabilities(q: Float[Array, "B T H D"], k: Float[Array, "B T H D"], causal: bool) -> Float[Array, "B H T T"]:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    allow = jnp.tril(jnp.ones(scores.shape[-2:], bool)) if causal else True
    return jax.nn.softmax(scores, where=allow, axis=-1)


class Transformer(nnx.Module):
    """Blocks, stacked and scanned, [B, T, width] -> [B, T, width]."""

    def __init__(self, cfg: Model, runtime: Runtime, key: PRNGKeyArray, *, causal: bool):
        self.layers, self.remat, self.unroll, self.causal = cfg.layers, runtime.remat, runtime.unroll or cfg.layers, causal
        self.blocks = jax.vmap(functools.partial(Block, cfg))(jax.random.split(key, cfg.layers))

    def __call__(self, x: Float[Array, "B T width"], capture: tuple[str, ...]) -> tuple[Float[Array, "B T width"], Captured]:
        check_captures(capture, CAPTURABLE)

        def body(x: Array, block: Block) -> tuple[Array, Captured]:
            captures = Captures(capture)
            x = block(x, captures, causal=self.causal)
            return x, captures.values

        return scan_layers(body, x, self.blocks, layers=self.layers, remat=self.remat, unroll=self.unroll)


class VisionTransformer(nnx.Module):
    """A class token and patches; the features are the class token's final state (Dosovitskiy et al., arXiv 2010.11929).

    CLIP's version also has a norm before its blocks, and no bias in its patch embedding.
    """

    def __init__(self, cfg: Clip, runtime: Runtime, key: PRNGKeyArray):
        keys = jax.random.split(key, 5)
        width, std, patches = cfg.vision_width, cfg.vision_width**-0.5, (cfg.image_size // cfg.patch) ** 2
        self.patch, self.dtype = cfg.patch, cfg.compute_dtype
        self.patches = Conv(keys[0], (cfg.patch, 3, width))
        self.class_token = normal_param(keys[1], (width,), std, ("embed",))
        self.positions = normal_param(keys[2], (patches + 1, width), std, ("positions", "embed"))
        self.pre_norm, self.final_norm = Norm(cfg.vision), Norm(cfg.vision)
        self.transformer = Transformer(cfg.vision, runtime, keys[3], causal=False)
        self.projection = normal_param(keys[4], (width, cfg.embed), std, ("embed", "features"))

    def __call__(
        self, images: Float[Array, "B H W 3"], capture: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "B features"], Captured]:
        """(features, captured intermediates) of normalised images."""
        x = self.patches(images.astype(self.dtype), stride=self.patch)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...].astype(x.dtype)
        x, captured = self.transformer(self.pre_norm(x), capture)
        features = self.final_norm(x[:, 0]) @ self.projection[...].astype(x.dtype)
        return features, {**captured, "final": x} if "final" in capture else captured


class TextTower(nnx.Module):
    """Causal blocks over a text; the features are the end token's final state.

    Positions after the end token change nothing, so a batch may be cut after its longest text (`cut_after_end`).
    """

    def __init__(self, cfg: Clip, runtime: Runtime, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        width, self.dtype = cfg.text_width, cfg.compute_dtype
        self.embedding = normal_param(keys[0], (cfg.vocab, width), 0.02, ("vocab", "embed"))
        self.positions = normal_param(keys[1], (cfg.context, width), 0.01, ("positions", "embed"))
        self.transformer = Transformer(cfg.text, runtime, keys[2], causal=True)
        self.final_norm = Norm(cfg.text)
        self.projection = normal_param(keys[3], (width, cfg.embed), width**-0.5, ("embed", "features"))

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T width"]:
        """Token embeddings without positions; prompt learners insert their vectors here."""
        return self.embedding[...][tokens]

    def __call__(
        self, embedded: Float[Array, "B T width"], end: Int[Array, " B"], capture: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "B features"], Captured]:
        """(features, captured intermediates) of embedded tokens; `end`: the position of each text's end token."""
        length, table = embedded.shape[1], self.positions[...]
        most = len(table)
        require(length <= most, f"texts of {length} tokens, but the text tower has {most} positions; cut them")
        x, captured = self.transformer((embedded + table[:length]).astype(self.dtype), capture)
        x = self.final_norm(x)
        features = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0] @ self.projection[...].astype(x.dtype)
        return features, {**captured, "final": x} if "final" in capture else captured
