"""Prompt learners: context vectors around the embeddings of a class name, and the meta-net that shifts them for each image.

CoOp (Zhou et al., arXiv 2109.01134), CoCoOp (arXiv 2203.05557), AAPL (Kim et al., arXiv 2404.16804), as in their released code.
The CLIP is always an argument and never trained; `Learner` holds all trained parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metajax.models.layers import normal_param
from metajax.vision.clip.config import Clip
from metajax.vision.clip.model import CLIP, cut_after_end, unit
from metajax.vision.config import Prompts

# Most prompts in the text tower at a time. More are processed in chunks, which the backward pass recomputes.
TEXTS_AT_ONCE = 256
_CONTEXT_STD = 0.02


class MetaNet(nnx.Module):
    """Unit image features -> a vector for the context: linear, ReLU, linear; weights and biases from U(+-1 / sqrt(inputs))."""

    def __init__(self, key: PRNGKeyArray, features: int, bottleneck: int, width: int):
        keys = jax.random.split(key, 4)

        def drawn(key: PRNGKeyArray, shape: tuple[int, ...], inputs: int, axes: tuple[str, ...]) -> nnx.Param:
            return nnx.Param(jax.random.uniform(key, shape, jnp.float32, -(inputs**-0.5), inputs**-0.5), axes=axes)

        self.w1 = drawn(keys[0], (features, bottleneck), features, ("features", "mlp"))
        self.b1 = drawn(keys[1], (bottleneck,), features, ("norm",))
        self.w2 = drawn(keys[2], (bottleneck, width), bottleneck, ("mlp", "embed"))
        self.b2 = drawn(keys[3], (width,), bottleneck, ("norm",))

    def hidden(self, features: Float[Array, "*batch features"]) -> Float[Array, "*batch bottleneck"]:
        """Activations after the ReLU; a unit that is 0 for every image is dead."""
        return jax.nn.relu(features @ self.w1[...] + self.b1[...])

    def __call__(self, features: Float[Array, "*batch features"]) -> Float[Array, "*batch width"]:
        return self.hidden(features) @ self.w2[...] + self.b2[...]


class Learner(nnx.Module):
    """The parameters of a prompt learner: `context` [M, width] or [classes, M, width], and a meta-net if images shift it.

    words: embeddings [M, width] that initialise the context (`context_init`); None: random.
    """

    def __init__(self, cfg: Prompts, clip: Clip, classes: int, key: PRNGKeyArray, words: Float[Array, "M width"] | None = None):
        keys, features, width = jax.random.split(key), clip.embed, clip.text_width
        shape = (classes, cfg.context, width) if cfg.class_specific else (cfg.context, width)
        axes = ("classes", "positions", "embed")[-len(shape) :]
        drawn = normal_param(keys[0], shape, _CONTEXT_STD, axes)
        self.context = drawn if words is None else nnx.Param(jnp.broadcast_to(words, shape), axes=axes)
        bottleneck = cfg.bottleneck or features // 16
        self.meta_net = MetaNet(keys[1], features, bottleneck, width) if cfg.condition != "none" else None

    def contexts(self, moved: Float[Array, "N width"] | None) -> Float[Array, "N ..."]:
        """The context of every image, [N, M, width] or [N, classes, M, width]; N = 1 if no vectors shift the context."""
        if moved is None:
            return self.context[...][None]
        return self.context[...] + moved.reshape(len(moved), *(1,) * (self.context[...].ndim - 1), -1)


# ------------------------------------------------------------------------------------------------------- class texts


class ClassTexts(NamedTuple):
    """The frozen part of every class's prompt. positions: index of each position's vector in the context followed by `embedded`."""

    embedded: Float[Array, "C T width"]
    positions: Int[Array, "C T"]
    end: Int[Array, " C"]


def arrange(tokens: np.ndarray, name_lengths: Sequence[int], context: int, position: str) -> np.ndarray:
    """`ClassTexts.positions`, int32[C, T], of texts with placeholders for the context: start, M placeholders, name, rest.

    position: place of the name: "end", "middle" (after M // 2 vectors) or "front".
    """
    before = {"end": context, "middle": context // 2, "front": 0}[position]
    vectors, rows = list(range(context)), []
    for length in name_lengths:
        name = range(2 * context + 1, 2 * context + 1 + length)
        rest = range(2 * context + 1 + length, context + tokens.shape[1])
        rows.append([context, *vectors[:before], *name, *vectors[before:], *rest])
    return np.array(rows, np.int32)


def class_texts(model: CLIP, tokens: np.ndarray, name_lengths: Sequence[int], cfg: Prompts) -> ClassTexts:
    """`ClassTexts` of the classes' tokens [C, T], cut after the longest text."""
    tokens = cut_after_end(tokens)
    positions = arrange(tokens, name_lengths, cfg.context, cfg.class_position)
    return ClassTexts(model.text.embed(jnp.asarray(tokens)), jnp.asarray(positions), jnp.asarray(np.argmax(tokens, axis=1)))


def prompts(texts: ClassTexts, context: Float[Array, "C M width"]) -> Float[Array, "C T width"]:
    """Embedded prompts with the context inserted."""
    source = jnp.concatenate([context, texts.embedded], axis=1)
    return jnp.take_along_axis(source, texts.positions[..., None], axis=1)


def prompt_features(model: CLIP, texts: ClassTexts, contexts: Float[Array, "N ..."]) -> Float[Array, "N C features"]:
    """Unit features of every class's prompt under every context, computed for at most TEXTS_AT_ONCE prompts at a time."""
    classes, count = len(texts.end), len(contexts) * len(texts.end)

    def encode(pairs: Int[Array, " P"]) -> Float[Array, "P features"]:
        n, c = pairs // classes, pairs % classes
        chosen = jax.tree.map(lambda x: x[c], texts)
        context = contexts[n, c] if contexts.ndim == 4 else contexts[n]
        return unit(model.text(prompts(chosen, context), chosen.end)[0].astype(jnp.float32))

    if count <= TEXTS_AT_ONCE:
        features = encode(jnp.arange(count))
    else:
        turns = -(-count // TEXTS_AT_ONCE)
        pairs = jnp.minimum(jnp.arange(turns * TEXTS_AT_ONCE), count - 1).reshape(turns, TEXTS_AT_ONCE)
        features = jax.lax.map(jax.checkpoint(encode), pairs).reshape(turns * TEXTS_AT_ONCE, -1)[:count]
    return features.reshape(len(contexts), classes, -1)


def prompt_logits(
    model: CLIP, texts: ClassTexts, images: Float[Array, "B features"], contexts: Float[Array, "N ..."]
) -> Float[Array, "B C"]:
    """Logits of unit image features for the classes, with one context for each image or one for all."""
    weights = jnp.broadcast_to(prompt_features(model, texts, contexts), (len(images), len(texts.end), images.shape[-1]))
    logits = jnp.exp(model.logit_scale[...]) * jnp.einsum("be,bce->bc", images, weights, preferred_element_type=jnp.float32)
    return logits if model.logit_bias is None else logits + model.logit_bias[...]


# ------------------------------------------------------------------------------------------------------------ losses


def cross_entropy(logits: Float[Array, "B C"], labels: Int[Array, " B"]) -> Float[Array, ""]:
    """Cross-entropy, mean over images."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


Tokens = Float[Array, "*batch width"]


def triplet(anchor: Tokens, positive: Tokens, negative: Tokens, margin: float) -> Float[Array, "*batch"]:
    """max(0, |a - p|^2 - |a - n|^2 + margin), squares summed over the width."""
    near, far = (jnp.sum(jnp.square(anchor - other), axis=-1) for other in (positive, negative))
    return jnp.maximum(near - far + margin, 0.0)


def ad_triplet(tokens: Float[Array, "2 2 B width"], margin: float, constraints: str) -> Float[Array, ""]:
    """AAPL's adversarial triplet loss of delta tokens [image, augmentation, B, width]: mean over B of a sum over anchors.

    The same augmentation of another class should be nearer than another augmentation of the same image. "four": each of the four
    tokens is an anchor once. "two": anchors are image 1 with augmentation 1 and image 2 with augmentation 2.
    """
    (a1, b1), (a2, b2) = tokens
    anchors = [(a1, a2, b1), (b2, b1, a2)]
    anchors += [(a2, a1, b2), (b1, b2, a1)] if constraints == "four" else []
    return jnp.mean(sum(triplet(*anchor, margin) for anchor in anchors))
