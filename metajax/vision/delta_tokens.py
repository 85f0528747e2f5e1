"""Delta tokens (changes of an image's instance token under augmentations): their separation by augmentation and by class.

Protocol of AAPL's released code: instance tokens (meta-net outputs) of up to 100 images, plain and under each augmentation;
silhouettes (Euclidean, all dimensions) of deltas by augmentation; PCA and t-SNE (perplexity 10, random state 123) for figures.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples, silhouette_score

from metajax.vision.clip.model import CLIP, unit
from metajax.vision.clip.prompts import Learner
from metajax.vision.config import Prompts
from metajax.vision.data.augmentations import augment
from metajax.vision.data.preprocessing import normalise

TEMPERATURE = 0.1  # temperature of the weights from silhouettes
EMBEDDED = 40  # images in t-SNE, whose time grows faster than the number of points


def delta_groups(learner: Learner, model: CLIP, pixels: np.ndarray, cfg: Prompts, seed: int) -> tuple[jax.Array, jax.Array]:
    """(instance tokens [types + 1, N, width] with the plain images first, deltas [types, N, width]) of uint8 images."""
    key, plain = jax.random.key(seed), _tokens(learner, model, normalise(jnp.asarray(pixels), model.cfg))
    groups = [plain]
    for n in range(len(cfg.augmentations)):
        keys = jax.random.split(jax.random.fold_in(key, n), len(pixels))
        groups.append(_augmented(learner, model, jnp.asarray(pixels), n, keys, names=cfg.augmentations, space=cfg.space))
    tokens = jnp.stack(groups)
    return tokens, tokens[1:] - plain


@jax.jit
def _tokens(learner: Learner, model: CLIP, images: jax.Array) -> jax.Array:
    return learner.meta_net(unit(model.encode_image(images)))


@jax.jit
def _hidden(learner: Learner, model: CLIP, images: jax.Array) -> jax.Array:
    return learner.meta_net.hidden(unit(model.encode_image(images)))


@functools.partial(jax.jit, static_argnames=("names", "space"))
def _augmented(
    learner: Learner, model: CLIP, pixels: jax.Array, kind: jax.Array, keys: jax.Array, *, names: tuple[str, ...], space: str
) -> jax.Array:
    one = functools.partial(augment, clip=model.cfg, names=names, space=space)
    changed = jax.lax.map(lambda x: one(x[0], kind, x[1]), (normalise(pixels, model.cfg), keys))
    return learner.meta_net(unit(model.encode_image(changed)))


def by_type(deltas: np.ndarray) -> np.ndarray:
    """float[types]: the mean silhouette of each augmentation's deltas, among all deltas [types, N, width]."""
    kinds = np.repeat(np.arange(len(deltas)), deltas.shape[1])
    samples = silhouette_samples(deltas.reshape(len(kinds), -1), kinds)
    return samples.reshape(len(deltas), -1).mean(axis=1)


def weights(groups: tuple[jax.Array, jax.Array]) -> np.ndarray:
    """Probabilities of the augmentations in the next epoch, softmax(-silhouette / 0.1): poorly separated ones are more frequent."""
    found = -by_type(np.asarray(groups[1])) / TEMPERATURE
    found = np.exp(found - found.max())
    return (found / found.sum()).astype(np.float32)


def analyse(learner: Learner, model: CLIP, pixels: np.ndarray, labels: np.ndarray, cfg: Prompts, seed: int) -> dict[str, Any]:
    """Silhouettes of deltas and of instance tokens, and dead units of the meta-net; `details` is for figures.

    A silhouette is None if a dead meta-net or a single class leaves nothing to separate.
    """
    tokens, deltas = (np.asarray(part) for part in delta_groups(learner, model, pixels, cfg, seed))
    hidden = np.asarray(_hidden(learner, model, normalise(jnp.asarray(pixels), model.cfg)))
    alive, (types, count) = bool(np.any(deltas)), deltas.shape[:2]
    flat, kinds, classes = deltas.reshape(types * count, -1), np.repeat(np.arange(types), count), np.tile(labels, types)
    several = 1 < len(np.unique(labels)) < count

    def score(points: np.ndarray, groups: np.ndarray, separable: bool = True) -> float | None:
        return _score(points, groups) if alive and separable else None

    result: dict[str, Any] = {
        "images": count,
        "dead_units": float(np.mean(np.all(hidden == 0, axis=0))),
        "norm": float(np.linalg.norm(flat, axis=1).mean()),
        "silhouette": score(flat, kinds),
        "silhouette_classes": score(flat, classes, several),
        "meta_silhouette": score(tokens.reshape(len(tokens) * count, -1), np.repeat(np.arange(len(tokens)), count)),
        "meta_silhouette_classes": score(tokens[0], labels, several),
    }
    if alive:
        points = {"pca": PCA(2).fit_transform(flat).round(4).tolist(), "tsne": _tsne(deltas[:, :EMBEDDED])}
        groups = {"augmentations": list(cfg.augmentations), "types": kinds.tolist(), "classes": classes.tolist()}
        result["details"] = groups | points | {"by_type": by_type(deltas).tolist(), "pairs": _pairs(deltas)}
    return result


def _score(points: np.ndarray, groups: np.ndarray) -> float:
    return float(silhouette_score(points, groups))


def _pairs(deltas: np.ndarray) -> list[list[float]]:
    """The silhouette of each pair of augmentations."""
    found, halves = np.zeros((len(deltas), len(deltas))), np.repeat((0, 1), deltas.shape[1])
    for a, b in itertools.combinations(range(len(deltas)), 2):
        found[a, b] = found[b, a] = _score(np.concatenate([deltas[a], deltas[b]]), halves)
    return found.round(4).tolist()


def _tsne(deltas: np.ndarray) -> dict[str, Any]:
    """Two dimensions of the deltas [types, N, width], and the type of each."""
    types, count = deltas.shape[:2]
    found = TSNE(2, perplexity=min(10, types * count - 1), random_state=123).fit_transform(deltas.reshape(types * count, -1))
    return {"points": found.round(3).tolist(), "types": np.repeat(np.arange(types), count).tolist()}
