"""A CLIP trained from its start on captioned images."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.config import ImageConfig
from metajax.core.errors import require
from metajax.data.pipeline import Paths
from metajax.models.lm import decay_mask
from metajax.training.optimizers import make_optimizer, schedule
from metajax.vision.clip.model import CLIP, LOSSES, cut_after_end, unit
from metajax.vision.data.batches import caption_batches, test_pixels, texts_of_sets, viewer
from metajax.vision.data.preprocessing import normalise
from metajax.vision.data.sets import ImageSet, check_set, content_of, fingerprint_of
from metajax.vision.data.sources import open_images
from metajax.vision.data.templates import texts_of
from metajax.vision.data.words import WordTokenizer
from metajax.vision.task import Losses, Task
from metajax.vision.zero_shot import accuracy, class_weights, whole_parts


def contrastive_task(config: ImageConfig, paths: Paths) -> Task:
    """Images and captions of all sources' pretraining images; evaluated on the test images of those with classes, by names alone."""
    sets = [open_images(spec, paths.cache, paths.data) for spec in config.images.sources]
    tested = [images for images in sets if images.classes]
    require(bool(tested), f"images.sources = {config.images.sources}: none has classes to be tested by; add one such as digits")
    for images in sets:
        require(bool(images.splits.get("pretrain")), f"{images.spec} has no pretrain images, which a CLIP learns from")
    for images in tested:
        check_set(images, "test")
    tokenizer, clip = WordTokenizer.of(texts_of_sets(sets)), config.clip
    require(
        tokenizer.size <= clip.vocab,
        f"clip.vocab = {clip.vocab}, but these captions have {tokenizer.size} words; raise it to that",
    )
    see = viewer(clip.image_size, config.images.view, config.images.crop_area)
    batch = config.images.batch
    batches = caption_batches(sets, config.seed, batch, see, lambda text: tokenizer.tokenize([text], clip.context)[0])

    def create(key: jax.Array) -> CLIP:
        return CLIP(clip, runtime=config.runtime, key=key)

    tx = make_optimizer(config, decay_mask(jax.eval_shape(create, jax.random.key(0))))
    return Task(
        steps=config.training.steps, epoch=config.training.steps, batches=batches, create=create, tx=tx,
        rate=schedule(config.optimizer, config.training.steps), frozen=(), loss=caption_loss,
        evaluate=lambda model: {s.spec: zero_shot(model, tokenizer, s) for s in tested},
        images=fingerprint_of(*(content_of(s, "pretrain", "test") for s in sets)), tokenizer=tokenizer, manifest=[describe(s) for s in sets],
    )  # fmt: skip


def caption_loss(model: CLIP, frozen: Any, batch: dict[str, jax.Array], choice: jax.Array, key: jax.Array) -> Losses:
    """Images and texts of a batch; texts that are the same belong to each other's images too."""
    tokens = batch["tokens"]
    matches = jnp.all(tokens[:, None] == tokens[None], axis=-1)
    loss = LOSSES[model.cfg.loss](model(normalise(batch["pixels"], model.cfg), tokens), matches)
    return loss, {"logit_scale": jnp.exp(model.logit_scale[...])}


def zero_shot(model: CLIP, tokenizer: Any, images: ImageSet, templates: tuple[str, ...] = ()) -> dict[str, float]:
    """Accuracy on a set's test images by its classes' names; `templates`: those averaged in place of the set's own."""
    pixels, labels = test_pixels(images, model.cfg.image_size)
    texts = [tokenizer.tokenize(texts_of(images.classes, t), model.cfg.context) for t in templates or (images.template,)]
    weights = class_weights(model, jnp.asarray(cut_after_end(np.stack(texts))))
    return accuracy(lambda features: model.logits(features, weights), encode_images(model, pixels), labels)


def encode_images(model: CLIP, pixels: Any, at_once: int = 100) -> jax.Array:
    """Unit features [N, features] of uint8 images, each computed once."""
    return jnp.concatenate([_encode(model, part) for part in whole_parts(pixels, at_once)])[: len(pixels)]


@jax.jit
def _encode(model: CLIP, pixels: jax.Array) -> jax.Array:
    return unit(model.encode_image(normalise(pixels, model.cfg)))


def describe(images: ImageSet) -> dict[str, Any]:
    """A set as reports name it."""
    splits = {name: len(items) for name, items in images.splits.items()}
    return {"spec": images.spec, "classes": len(images.classes), "splits": splits, "attribution": images.attribution}
