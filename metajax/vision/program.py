"""The program of a run on images without its images and weights: the same step on shapes, for plans and counts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metajax.config import AnyConfig
from metajax.core.errors import require
from metajax.data.pipeline import Paths
from metajax.planning.plan import Planned
from metajax.training.objectives import Batch
from metajax.training.program import Program
from metajax.vision.clip.config import PUBLISHED, Clip, preset
from metajax.vision.clip.model import CLIP
from metajax.vision.clip.prompts import ClassTexts
from metajax.vision.config import ImageConfig, Prompts
from metajax.vision.contrastive import contrastive_program
from metajax.vision.data.names import CLASSES
from metajax.vision.data.sources import open_images
from metajax.vision.data.words import WordTokenizer
from metajax.vision.flops import image_step_flops
from metajax.vision.prompt_learning import Frozen, prompt_program

# Fields of a prompt learner that change only numbers in its step, not shapes.
_RATES = ("context_init", "beta", "margin", "epochs", "learning_rate", "warmup_rate", "weight_decay")


def image_key(config: ImageConfig) -> tuple[Hashable | None, int]:
    """(what a train step's program depends on besides runtime and training, or None for a zero-shot run; number of classes)."""
    learner, images = config.prompts, config.images
    if learner is not None:
        plain = {name: getattr(Prompts(), name) for name in _RATES}
        learner = replace(learner, **plain, alpha=float(learner.alpha > 0), augment=float(learner.augment > 0))
    trains = learner is None or learner.context
    key = (config.clip, config.weights, learner, images.classes, images.batch)
    return key if trains else None, CLASSES.get(images.sources[0], 0)


class Shapes(NamedTuple):
    """Sizes that determine a step's cost besides its config: the CLIP, the classes of a learner, the tokens of a text."""

    clip: Clip
    classes: int
    length: int


def shapes_of(config: ImageConfig, parents: Sequence[AnyConfig], paths: Paths) -> Shapes:
    """The shapes of a config and the runs that it starts from. A published set need not be there: its number of classes is known,
    and texts of its unknown class names get the greatest length.

    Raises:
      UserError: weights or images are neither published nor there.
    """
    if config.prompts is None:
        return Shapes(config.clip, 0, config.clip.context)
    name, source = config.weights.rpartition("/")[2], config.images.sources[0]
    known = f"sizes are known of {', '.join(PUBLISHED)}, and of experiments in init.from"
    require(bool(parents) or name in PUBLISHED, f"weights = {config.weights!r}: {known}")
    clip = parents[-1].clip if parents else preset(PUBLISHED[name])
    clip = replace(clip, compute_dtype=config.prompts.compute_dtype or clip.compute_dtype)
    classes, length = CLASSES.get(source), clip.context
    if classes is None:
        names = open_images(source, paths.cache, paths.data).classes
        longest = max(len(WordTokenizer([]).encode(f"{name}.")) for name in names)
        classes, length = len(names), config.prompts.context + longest + 2  # start and end
    return Shapes(clip, -(-classes // 2) if config.images.classes == "base" else classes, length)


def image_program(config: ImageConfig, shapes: Shapes, devices: list[jax.Device] | None = None) -> tuple[Program, Batch]:
    """(the program of a run, the shapes of its batch) without its images and weights."""
    if config.prompts is None:
        count = config.images.batch
        program = contrastive_program(config, count, devices)
        batch = {"pixels": _pixels(shapes.clip, count), "tokens": _of(jnp.int32, count, shapes.length)}
        return program, program.abstract_batch(batch)
    cfg, clip, classes, length = config.prompts, shapes.clip, shapes.classes, shapes.length
    embedded = _of(jnp.float32, classes, length, clip.text_width)
    texts = ClassTexts(embedded, _of(jnp.int32, classes, length), _of(jnp.int32, classes))
    features = _of(jnp.float32, 1, clip.embed) if config.still else None
    model = jax.eval_shape(lambda: CLIP(clip, runtime=config.runtime, key=jax.random.key(0)))
    program = prompt_program(config, clip, Frozen.of(config, model, texts, features), classes, cfg.batch, devices)
    label = _of(jnp.int32, cfg.batch)
    return program, program.abstract_batch({"index": label, "label": label, "pixels": _pixels(clip, cfg.batch, 1 + cfg.paired)})


def image_step(config: ImageConfig, devices: list[jax.Device], *, shapes: Shapes) -> Planned:
    """The step of a CLIP or of a prompt learner, for plans; `shapes` gives the length of texts."""
    program, batch = image_program(config, shapes, devices)
    flops = image_step_flops(config, shapes.clip, shapes.classes, shapes.length)
    return Planned(program, batch, flops, (program.batch_size, "images"))


def _of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _pixels(clip: Clip, *count: int) -> jax.ShapeDtypeStruct:
    return _of(jnp.uint8, *count, clip.image_size, clip.image_size, 3)
