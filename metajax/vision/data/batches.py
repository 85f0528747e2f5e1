"""Batches of images as a pure function of (step, seed): shuffled, in random views, and for AAPL paired with another class."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from metajax.distributed.mesh import HostRows
from metajax.vision.data.preprocessing import as_rgb, centre, resize
from metajax.vision.data.sets import ImageSet, Item
from metajax.vision.data.templates import SELECTED

Record = dict[str, Any]
See = Callable[[Image.Image, np.random.Generator], np.ndarray]
CAPTIONS = ("a photo of a {}.", *SELECTED)  # captions with which a CLIP is trained here
_RATIO = (3 / 4, 4 / 3)
_TRIES = 10
ONE_HOST = HostRows(0, 1, True)


def random_view(image: Image.Image, size: int, rng: np.random.Generator, least: float) -> np.ndarray:
    """uint8[size, size, 3]: a random crop of at least that share of the area, 3:4 to 4:3, bicubic; mirrored with probability 1/2.

    As in torchvision's RandomResizedCrop: ten tries for a shape that fits, otherwise the centre.
    """
    image = as_rgb(image)
    width, height = image.size
    for _ in range(_TRIES):
        area, ratio = width * height * rng.uniform(least, 1), math.exp(rng.uniform(*np.log(_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:
        w, h = round(min(width, height * _RATIO[1])), round(min(height, width / _RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
    pixels = np.asarray(resize(image.crop((left, top, left + w, top + h)), size, size))
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def viewer(size: int, view: str, least: float) -> See:
    """The view of a training image (`Images.view`)."""
    if view == "centre":
        return lambda image, rng: centre(image, size)
    return lambda image, rng: random_view(image, size, rng, least)


def _batches(
    items: Sequence[Any], seed: int, batch: int, make: Callable[[Any, np.random.Generator], Record], rows: HostRows
) -> grain.MapDataset:
    """Endless epochs, each shuffled again and cut into whole batches; this host's contiguous slice of each batch.

    If there are too few items for a batch, all items form the batch.
    """
    records = grain.MapDataset.source(items).seed(seed).shuffle().random_map(make)
    batch = min(batch, len(items))
    local, in_epoch = batch // rows.count, len(items) // batch

    def record(n: int) -> Record:
        step, i = divmod(n, local)
        epoch, place = divmod(step, in_epoch)
        return records[epoch * len(items) + place * batch + rows.index * local + i]

    return grain.MapDataset.range(sys.maxsize // 2).map(record).batch(local)


def prompt_batches(
    images: ImageSet, items: Sequence[Item], seed: int, batch: int, see: See, rows: HostRows = ONE_HOST, *, paired: bool
) -> grain.MapDataset:
    """Batches of index, label and pixels [views, size, size, 3]; this host's rows of the batch of step s at index s.

    paired: a second view of an image of another class, drawn uniformly among classes and then among its images.
    """
    by_class: dict[int, list[Item]] = {}
    for item in items:
        by_class.setdefault(item.label, []).append(item)

    def make(place: int, rng: np.random.Generator) -> Record:
        item = items[place]
        views = [see(images.read(item.key), rng)]
        if paired:
            labels = [label for label in by_class if label != item.label]
            others = by_class[labels[int(rng.integers(len(labels)))]]
            views.append(see(images.read(others[int(rng.integers(len(others)))].key), rng))
        return {"index": np.int32(place), "label": np.int32(item.label), "pixels": np.stack(views)}

    return _batches(range(len(items)), seed, batch, make, rows)


Tokenize = Callable[[str], np.ndarray]


def caption_batches(
    sets: Sequence[ImageSet], seed: int, batch: int, see: See, tokenize: Tokenize, rows: HostRows = ONE_HOST
) -> grain.MapDataset:
    """Batches of pixels [size, size, 3] and tokens [T] for contrastive training; this host's rows of the batch of step s at index s.

    A text is a template filled with the image's description or, half of the time, its class; sets without classes keep texts.
    """
    items = [(one, item) for one in sets for item in one.splits["pretrain"]]

    def make(pair: tuple[ImageSet, Item], rng: np.random.Generator) -> Record:
        images, item = pair
        template, name = CAPTIONS[int(rng.integers(len(CAPTIONS)))], images.name_of(item)
        if item.label >= 0 and rng.random() < 0.5:
            name = images.classes[item.label]
        text = template.format(name) if images.classes else name
        return {"pixels": see(images.read(item.key), rng), "tokens": tokenize(text)}

    return _batches(items, seed, batch, make, rows)


def texts_of_sets(sets: Sequence[ImageSet]) -> list[str]:
    """All texts that training captions consist of: templates, descriptions and class names."""
    names = [one.name_of(item) for one in sets for item in one.splits["pretrain"]]
    return [*names, *(name for one in sets for name in one.classes), *CAPTIONS, *(one.template for one in sets)]


def test_pixels(images: ImageSet, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8[N, size, size, 3], labels int32[N]): the centres of a set's test images."""
    items = images.splits["test"]
    return np.stack([centre(images.read(item.key), size) for item in items]), np.array([item.label for item in items], np.int32)
