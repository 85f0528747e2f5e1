"""A run on images without its images and weights: the same step on shapes, to be planned or counted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.config import PUBLISHED, AnyConfig, Clip, ImageConfig, preset
from metajax.core.errors import require
from metajax.data.pipeline import Paths
from metajax.models.lm import decay_mask
from metajax.training.optimizers import make_optimizer, schedule
from metajax.training.state import State, initialiser
from metajax.vision.clip.model import CLIP
from metajax.vision.clip.prompts import ClassTexts, Learner
from metajax.vision.contrastive import caption_loss
from metajax.vision.data.published import CLASSES
from metajax.vision.data.sources import open_images
from metajax.vision.data.words import WordTokenizer
from metajax.vision.prompt_learning import Frozen, epoch_schedule, prompt_loss, sgd
from metajax.vision.task import Task

Batch = dict[str, jax.ShapeDtypeStruct]


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
    clip = replace(clip, compute_dtype=config.prompts.compute_dtype or clip.compute_dtype)
    classes, length = CLASSES.get(source), clip.context
    if classes is None:
        names = open_images(source, paths.cache, paths.data).classes
        longest = max(len(WordTokenizer([]).encode(f"{name}.")) for name in names)
        classes, length = len(names), config.prompts.context + longest + 2  # start and end
    return Shapes(clip, -(-classes // 2) if config.images.classes == "base" else classes, length)


def sketch(config: ImageConfig, shapes: Shapes) -> tuple[Task, tuple[State, Any, Batch]]:
    """(the task as far as its step needs it, (state, frozen, batch) of it as shapes)."""
    clip = functools.partial(CLIP, shapes.clip, runtime=config.runtime)
    if config.prompts is None:
        return _of_clip(config, shapes, clip)
    return _of_learner(config, shapes, clip)


def _of_clip(config: ImageConfig, shapes: Shapes, clip: Callable[..., CLIP]) -> tuple[Task, tuple[State, Any, Batch]]:
    def create(key: jax.Array) -> CLIP:
        return clip(key=key)

    tx = make_optimizer(config, decay_mask(jax.eval_shape(create, jax.random.key(0))))
    rate = schedule(config.optimizer, config.training.steps)
    task = Task(1, 1, None, create, tx, rate, None, caption_loss, None, "", None)
    count = config.images.batch
    batch = {"pixels": _pixels(shapes.clip, count), "tokens": _of(jnp.int32, count, shapes.length)}
    return task, (_state(task), (), batch)


def _of_learner(config: ImageConfig, shapes: Shapes, clip: Callable[..., CLIP]) -> tuple[Task, tuple[State, Any, Batch]]:
    cfg, classes, length = config.prompts, shapes.classes, shapes.length
    rate = epoch_schedule(cfg, 1)

    def create(key: jax.Array) -> Learner:
        return Learner(cfg, shapes.clip, classes, key)

    choice = np.full(len(cfg.augmentations), 1 / len(cfg.augmentations), np.float32)
    loss = functools.partial(prompt_loss, cfg=cfg)
    task = Task(1, 1, None, create, sgd(cfg, rate), rate, None, loss, None, "", None, choice=choice)
    embedded = _of(jnp.float32, classes, length, shapes.clip.text_width)
    texts = ClassTexts(embedded, _of(jnp.int32, classes, length), _of(jnp.int32, classes))
    features = _of(jnp.float32, int(config.still), shapes.clip.embed)  # of one image, where they are known
    frozen = Frozen(jax.eval_shape(clip, key=jax.random.key(0)), texts, features)
    label = _of(jnp.int32, cfg.batch)
    return task, (
        _state(task),
        frozen,
        {"index": label, "label": label, "pixels": _pixels(shapes.clip, cfg.batch, 1 + cfg.paired)},
    )


def _state(task: Task) -> State:
    return jax.eval_shape(initialiser(task.create, task.tx), jax.random.key(0))


def _of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _pixels(clip: Clip, *count: int) -> jax.ShapeDtypeStruct:
    return _of(jnp.uint8, *count, clip.image_size, clip.image_size, 3)
