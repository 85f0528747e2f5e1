"""Training a CLIP from scratch on captioned images, and zero-shot classification with a weight vector for each class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from metajax.core.errors import require
from metajax.data.pipeline import Paths
from metajax.distributed.mesh import make_mesh
from metajax.evaluation.statistics import share_interval
from metajax.training.objectives import Batch, Means, objective, objectives
from metajax.training.optimizers import make_optimizer, schedule
from metajax.training.program import Program, everywhere
from metajax.vision.clip.model import CLIP, LOSSES, cut_after_end, unit
from metajax.vision.config import ImageConfig
from metajax.vision.data.batches import caption_batches, test_pixels, texts_of_sets, viewer
from metajax.vision.data.preprocessing import normalise
from metajax.vision.data.sets import ImageSet, check_set, content_of, fingerprint_of
from metajax.vision.data.sources import open_images
from metajax.vision.data.templates import texts_of
from metajax.vision.data.words import WordTokenizer
from metajax.vision.flops import image_step_flops
from metajax.vision.task import ImageTask


class ContrastiveTask(ImageTask):
    """Train a CLIP on all sources' pretraining images and captions; evaluate it zero-shot on test images of sets with classes."""

    def __init__(self, config: ImageConfig, paths: Paths, devices: list[jax.Device] | None = None):
        self.config, self.paths, self.steps = config, paths, config.training.steps
        self.sets = sets = [open_images(spec, paths.cache, paths.data) for spec in config.images.sources]
        tested = [images for images in sets if images.classes]
        require(bool(tested), f"images.sources = {config.images.sources}: none has classes to test; add one such as digits")
        for images in sets:
            require(bool(images.splits.get("pretrain")), f"{images.spec} has no pretrain images, which a CLIP learns from")
        for images in tested:
            check_set(images, "test")
        self.tokenizer, clip = WordTokenizer.of(texts_of_sets(sets)), config.clip
        words = self.tokenizer.size
        require(words <= clip.vocab, f"clip.vocab = {clip.vocab}, but these captions have {words} words; raise it to that")
        self.data = fingerprint_of(*(content_of(s, "pretrain", "test") for s in sets))
        size = min(config.images.batch, sum(len(images.splits["pretrain"]) for images in sets))
        self.program, self.epoch, self.tested = contrastive_program(config, size, devices), self.steps, tested
        see = viewer(clip.image_size, config.images.view, config.images.crop_area)
        tokenize = lambda text: self.tokenizer.tokenize([text], clip.context)[0]  # noqa: E731
        self.batches = caption_batches(sets, config.seed, size, see, tokenize, self.program.rows)
        self.step_flops = image_step_flops(config, clip, 0, clip.context)

    def evaluate(self, model: CLIP) -> dict[str, Any]:
        return {images.spec: zero_shot(model, self.tokenizer, images) for images in self.tested}


def contrastive_program(config: ImageConfig, batch_size: int, devices: list[jax.Device] | None = None) -> Program:
    """The program of a CLIP; parameters are replicated."""

    def create(key: jax.Array) -> CLIP:
        return CLIP(config.clip, runtime=config.runtime, key=key)

    tx = make_optimizer(config, jax.eval_shape(create, jax.random.key(0)))
    rate, mesh = schedule(config.optimizer, config.training.steps), make_mesh(config.runtime.mesh, devices)
    return Program(config, mesh, create, tx, rate, objectives["contrastive"], batch_size, layout=everywhere)


@objective("contrastive")
def contrastive(config: ImageConfig, model: CLIP, batch: Batch) -> Means:
    """The contrastive loss of a batch; equal texts also match each other's images."""
    tokens = batch["tokens"]
    matches = jnp.all(tokens[:, None] == tokens[None], axis=-1)
    loss = LOSSES[model.cfg.loss](model(normalise(batch["pixels"], model.cfg), tokens), matches)
    return {"loss": (loss, jnp.float32(1)), "logit_scale": (jnp.exp(model.logit_scale[...]), jnp.float32(1))}


# ---------------------------------------------------------------------------------------- zero-shot classification


def zero_shot(model: CLIP, tokenizer: Any, images: ImageSet, templates: tuple[str, ...] = ()) -> dict[str, float]:
    """Zero-shot accuracy on a set's test images; `templates`: averaged instead of the set's own template."""
    pixels, labels = test_pixels(images, model.cfg.image_size)
    texts = [tokenizer.tokenize(texts_of(images.classes, t), model.cfg.context) for t in templates or (images.template,)]
    weights = class_weights(model, jnp.asarray(cut_after_end(np.stack(texts))))
    return accuracy(lambda features: model.logits(features, weights), encode_images(model, pixels), labels)


def encode_images(model: CLIP, pixels: Any, at_once: int = 100) -> jax.Array:
    """Unit features [N, features] of uint8 images."""
    return jnp.concatenate([_encode(model, part) for part in whole_parts(pixels, at_once)])[: len(pixels)]


@jax.jit
def _encode(model: CLIP, pixels: jax.Array) -> jax.Array:
    return unit(model.encode_image(normalise(pixels, model.cfg)))


@jax.jit
def class_weights(model: CLIP, tokens: Int[Array, "templates classes T"]) -> Float[Array, "classes features"]:
    """A unit vector for each class: the mean of the unit features of its texts, computed one template at a time."""
    features = jax.lax.map(lambda texts: unit(model.encode_text(texts)), tokens)
    return unit(jnp.mean(features, axis=0))


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
