"""Classes by their names: one weight vector for each class of its texts (metajax/data/images/templates.py), images by the nearest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metajax.models.clip.model import CLIP, unit


@jax.jit
def class_weights(model: CLIP, tokens: Int[Array, "templates classes T"]) -> Float[Array, "classes features"]:
    """A vector of length 1 for each class: the mean of its texts' features, each of length 1; one template at a time."""
    features = jax.lax.map(lambda texts: unit(model.encode_text(texts)), tokens)
    return unit(jnp.mean(features, axis=0))


@jax.jit
def zero_shot_logits(
    model: CLIP, images: Float[Array, "B H W 3"], weights: Float[Array, "classes features"]
) -> Float[Array, "B classes"]:
    """Logits of normalised images for the classes."""
    return model.logits(model.encode_image(images), weights)
