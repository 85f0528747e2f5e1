"""A run on images without its images and weights: the same step, on shapes or on random numbers, to be planned or timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.config import require
from metajax.data.images.published import CLASSES
from metajax.data.images.sources import open_images
from metajax.data.images.words import WordTokenizer
from metajax.data.pipeline import Paths
from metajax.families import AnyConfig
from metajax.image_config import ImageConfig
from metajax.models.clip.config import PUBLISHED, Clip, preset
from metajax.models.clip.model import CLIP
from metajax.models.clip.prompts import ClassTexts, Learner, arrange
from metajax.models.lm import decay_mask
from metajax.training.optimizers import make_optimizer, schedule
from metajax.training.state import State, initialiser
from metajax.vision.contrastive import caption_loss
from metajax.vision.prompt_learning import Frozen, epoch_schedule, prompt_loss, sgd
from metajax.vision.task import Task

Drawn = tuple[State, Any, dict[str, jax.Array]]  # (state, frozen, batch)


@dataclass(frozen=True)
class Shapes:
    """What a step's cost depends on beside its config: the CLIP, the classes of a learner, the tokens of a text."""

    clip: Clip
    classes: int
    length: int


def shapes_of(config: ImageConfig, parents: Sequence[AnyConfig], paths: Paths) -> Shapes:
    """Of a config and the runs that it starts from. Of a published set, which need not be there, the number of classes is known but not
    their names: texts are then as long as they can be.

    Raises:
      UserError: weights or images that are neither published nor there.
    """
    if config.prompts is None:
        return Shapes(config.clip, 0, config.clip.context)
    name, source = config.weights.rpartition("/")[2], config.images.sources[0]
    require(
        bool(parents) or name in PUBLISHED,
        f"weights = {config.weights!r}: sizes are known of {', '.join(PUBLISHED)}, and of experiments in init.from",
    )
    clip = parents[-1].clip if parents else preset(PUBLISHED[name])
    classes, length = CLASSES.get(source), clip.context
    if classes is None:
        names = open_images(source, paths.cache, paths.data).classes
        longest = max(len(WordTokenizer([]).encode(f"{name}.")) for name in names)
        classes, length = len(names), config.prompts.context + longest + 2  # start and end
    return Shapes(clip, -(-classes // 2) if config.images.classes == "base" else classes, length)


def sketch(config: ImageConfig, shapes: Shapes) -> tuple[Task, Callable[[jax.Array], Drawn]]:
    """(the task as far as its step needs it, key -> what the step is called with); nothing is drawn yet."""
    return _of_clip(config, shapes) if config.prompts is None else _of_learner(config, shapes)


def _of_clip(config: ImageConfig, shapes: Shapes) -> tuple[Task, Callable[[jax.Array], Drawn]]:
    def create(key: jax.Array) -> CLIP:
        return CLIP(shapes.clip, runtime=config.runtime, key=key)

    tx = make_optimizer(config, decay_mask(jax.eval_shape(create, jax.random.key(0))))
    rate = schedule(config.optimizer, config.training.steps)

    def draw(key: jax.Array) -> Drawn:
        keys, count = jax.random.split(key), config.images.batch
        tokens = jax.random.randint(keys[0], (count, shapes.length), 0, shapes.clip.vocab)
        batch = {"pixels": _pixels(keys[1], shapes.clip, count), "tokens": tokens}
        return initialiser(create, tx)(key), (), batch

    return Task(1, 1, None, create, tx, rate, None, caption_loss, None, "", None), draw


def _of_learner(config: ImageConfig, shapes: Shapes) -> tuple[Task, Callable[[jax.Array], Drawn]]:
    cfg, clip, classes, length = config.prompts, shapes.clip, shapes.classes, shapes.length

    def create(key: jax.Array) -> Learner:
        return Learner(cfg, clip, classes, key)

    rate = epoch_schedule(cfg, 1)
    tx = sgd(cfg, rate)

    def draw(key: jax.Array) -> Drawn:
        keys = jax.random.split(key, 3)
        slots = arrange(np.zeros((classes, length)), [length - cfg.context - 2] * classes, cfg.context, cfg.class_position)
        embedded = 0.02 * jax.random.normal(keys[0], (classes, length, clip.text_width))
        texts = ClassTexts(embedded, jnp.asarray(slots), jnp.full(classes, length - 1, jnp.int32))
        features = jnp.ones((int(config.still), clip.embed))  # of one image, which all are where they are known
        frozen = Frozen(CLIP(clip, runtime=config.runtime, key=keys[1]), texts, features)
        label = jnp.arange(cfg.batch, dtype=jnp.int32) % classes
        batch = {"index": jnp.zeros_like(label), "label": label, "pixels": _pixels(keys[2], clip, cfg.batch, 1 + cfg.paired)}
        return initialiser(create, tx)(key), frozen, batch

    choice = np.full(len(cfg.augmentations), 1 / len(cfg.augmentations), np.float32)
    loss = functools.partial(prompt_loss, cfg=cfg)
    return Task(1, 1, None, create, tx, rate, None, loss, None, "", None, choice=choice), draw


def _pixels(key: jax.Array, clip: Clip, *count: int) -> jax.Array:
    return jax.random.bits(key, (*count, clip.image_size, clip.image_size, 3), jnp.uint8)
