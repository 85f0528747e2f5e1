"""CLIP: images and texts in one embedding space (Radford et al., arXiv 2103.00020), and its two losses."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from metajax.config import Runtime
from metajax.vision.clip.config import Clip
from metajax.vision.clip.convolution import ModifiedResNet
from metajax.vision.clip.transformer import TextTower, VisionTransformer


class CLIP(nnx.Module):
    """Two towers, and the learned scale of the logits between them. A sigmoid CLIP also has a learned bias.

    Initialised like OpenAI's text tower, except feed-forward networks' first map (1 / sqrt(width), theirs 1 / sqrt(2 width)).
    """

    def __init__(self, cfg: Clip, *, runtime: Runtime, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.cfg = cfg
        self.visual = VisionTransformer(cfg, runtime, keys[0]) if cfg.patch else ModifiedResNet(cfg, keys[0])
        self.text = TextTower(cfg, runtime, keys[1])
        sigmoid = cfg.loss == "sigmoid"
        self.logit_scale = nnx.Param(jnp.float32(math.log(10.0 if sigmoid else 1 / 0.07)), axes=())
        self.logit_bias = nnx.Param(jnp.float32(-10.0), axes=()) if sigmoid else None

    def encode_image(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B features"]:
        """Features of normalised images, float32, not L2-normalised."""
        return self.visual(images)[0].astype(jnp.float32)

    def encode_text(self, tokens: Int[Array, "B T"]) -> Float[Array, "B features"]:
        """Features of tokenised texts, float32, not L2-normalised."""
        return self.text(self.text.embed(tokens), end_of(tokens))[0].astype(jnp.float32)

    def logits(self, images: Float[Array, "B features"], texts: Float[Array, "N features"]) -> Float[Array, "B N"]:
        """Scaled cosines between features."""
        cosines = jnp.einsum("be,ne->bn", unit(images), unit(texts), preferred_element_type=jnp.float32)
        logits = jnp.exp(self.logit_scale[...]) * cosines
        return logits if self.logit_bias is None else logits + self.logit_bias[...]

    def __call__(self, images: Float[Array, "B H W 3"], tokens: Int[Array, "N T"]) -> Float[Array, "B N"]:
        """Logits of every image with every text."""
        return self.logits(self.encode_image(images), self.encode_text(tokens))


def unit(features: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
    """Features, L2-normalised."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def end_of(tokens: Int[Array, "B T"]) -> Int[Array, " B"]:
    """The position of each text's end token: the largest id in the text, as in OpenAI's code."""
    return jnp.argmax(tokens, axis=-1)


def cut_after_end(tokens: np.ndarray) -> np.ndarray:
    """Token ids [..., T] without the columns after the last end token: the same features for less work."""
    return tokens[..., : int(np.max(np.argmax(tokens, axis=-1))) + 1]


def contrastive_loss(logits: Float[Array, "B B"], matches: Bool[Array, "B B"] | None = None) -> Float[Array, ""]:
    """Symmetric cross-entropy of images over texts and texts over images.

    matches: which pairs belong together (None: image i and text i). A row with several matches splits its target evenly.
    """
    matches = jnp.eye(len(logits), dtype=bool) if matches is None else matches

    def one_way(logits: Array, matches: Array) -> Array:
        targets = matches / jnp.sum(matches, axis=-1, keepdims=True)
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))

    return (one_way(logits, matches) + one_way(logits.T, matches.T)) / 2


def sigmoid_loss(logits: Float[Array, "B B"], matches: Bool[Array, "B B"] | None = None) -> Float[Array, ""]:
    """Binary loss of every pair, summed over texts and averaged over images (SigLIP, arXiv 2303.15343, section 3.2)."""
    matches = jnp.eye(len(logits), dtype=bool) if matches is None else matches
    return -jnp.sum(jax.nn.log_sigmoid(jnp.where(matches, logits, -logits))) / len(logits)


LOSSES = {"softmax": contrastive_loss, "sigmoid": sigmoid_loss}  # by `Clip.loss`
