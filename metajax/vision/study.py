"""Inputs of the analyses of a run on images: its CLIP, some test images, and the texts of a prompt learner's classes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from metajax.data.pipeline import Paths
from metajax.vision.clip.model import CLIP
from metajax.vision.clip.prompts import ClassTexts
from metajax.vision.clips import clip_of_run, open_clip, whole
from metajax.vision.config import ImageConfig
from metajax.vision.data.batches import test_pixels
from metajax.vision.data.sets import part_of_classes
from metajax.vision.data.sources import open_images
from metajax.vision.prompt_learning import texts_for

SHOWN = 6  # number of test images


class ImageStudy(NamedTuple):
    """A run's CLIP, test images of its first source with classes, and the texts of a learner's classes (None without a learner)."""

    config: ImageConfig
    model: CLIP
    pixels: np.ndarray  # uint8[SHOWN, size, size, 3]
    names: tuple[str, ...]  # of their classes
    attribution: str
    texts: ClassTexts | None

    made_on = None  # images have no prompts to record


def open_image_study(workdir: Path, config: ImageConfig, paths: Paths) -> ImageStudy:
    """The study of a complete run."""
    sources = (open_images(spec, paths.cache, paths.data) for spec in config.images.sources)
    images, texts = next(source for source in sources if source.classes), None
    if config.prompts is None:
        model = clip_of_run(workdir, config, whole(config))
    else:
        model, tokenizer = open_clip(config, paths)
        if config.prompts.context:
            texts = texts_for(model, tokenizer, part_of_classes(images, config.images.classes), config.prompts)
    pixels, labels = test_pixels(images, model.cfg.image_size)
    chosen = np.linspace(0, len(labels) - 1, SHOWN).astype(int)
    names = tuple(images.classes[label] for label in labels[chosen])
    return ImageStudy(config, model, pixels[chosen], names, images.attribution, texts)
