"""Zero-shot classification: a weight vector per class from its texts (metajax/vision/data/templates.py); the nearest one wins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from metajax.evaluation.statistics import share_interval
from metajax.vision.clip.model import CLIP, unit


@jax.jit
def class_weights(model: CLIP, tokens: Int[Array, "templates classes T"]) -> Float[Array, "classes features"]:
    """A unit vector for each class: the mean of the unit features of its texts, computed one template at a time."""
    features = jax.lax.map(lambda texts: unit(model.encode_text(texts)), tokens)
    return unit(jnp.mean(features, axis=0))


@jax.jit
def zero_shot_logits(
    model: CLIP, images: Float[Array, "B H W 3"], weights: Float[Array, "classes features"]
) -> Float[Array, "B classes"]:
    """Logits of normalised images for the classes."""
    return model.logits(model.encode_image(images), weights)


def whole_parts(rows: Any, at_once: int) -> list[Any]:
    """Rows in parts of equal size, so that one compiled program serves all; copies of the last row fill the last part."""
    at_once = min(at_once, len(rows))
    places = np.minimum(np.arange(-(-len(rows) // at_once) * at_once), len(rows) - 1)
    return [rows[part] for part in places.reshape(-1, at_once)]


def accuracy(
    logits_of: Callable[[jax.Array], jax.Array], features: Float[Array, "N features"], labels: np.ndarray, at_once: int = 1000
) -> dict[str, float]:
    """{accuracy, low, high, images} of logits computed for `at_once` images at a time; low and high: its 95 % interval (Wilson)."""
    found = np.concatenate([np.argmax(logits_of(part), axis=1) for part in whole_parts(features, at_once)])
    right = int(np.sum(found[: len(labels)] == labels))
    low, high = share_interval(right, len(labels))
    return {"accuracy": right / len(labels), "low": low, "high": high, "images": len(labels)}


def harmonic(base: float, new: float) -> float:
    """Harmonic mean of two accuracies; 0 if one is 0."""
    return 2 * base * new / (base + new) if base and new else 0.0
