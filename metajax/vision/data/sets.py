"""Image sets with classes, which every source returns; few-shot samples; the split of classes into base and new."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from metajax.core.errors import require
from metajax.core.progress import progress, warn
from metajax.vision.data.preprocessing import read_image

SUFFIXES = tuple(".png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm".split())


@dataclass(frozen=True)
class Item:
    """One image: its key in the set, its class, and a description (the class name if nothing more specific is known)."""

    key: Any
    label: int
    caption: str = ""


@dataclass(frozen=True)
class ImageSet:
    """Items by split, the classes' names by label, and how an item is read.

    splits: train and test; also pretrain if some images are reserved for training a CLIP, which then sees no others.
    """

    spec: str
    classes: tuple[str, ...]
    splits: Mapping[str, tuple[Item, ...]]
    read: Callable[[Any], Image.Image]
    fingerprint: str
    template: str = "a photo of a {}."
    attribution: str = ""  # shown next to any image of the set
    folder: Path | None = None  # folder of the files that the items' keys name; None: the images are not files of the user

    def name_of(self, item: Item) -> str:
        return item.caption or self.classes[item.label]


def fingerprint_of(*parts: object) -> str:
    """sha256 of these parts; the repr of a part must identify it."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def of_files(
    spec: str, folder: Path, classes: Sequence[str], splits: Mapping[str, Sequence[Item]], template: str = ImageSet.template
) -> ImageSet:
    """A set whose items' keys are paths below a folder."""
    items = {name: tuple(found) for name, found in splits.items()}
    fingerprint = fingerprint_of(spec.partition(":")[0], classes, items)
    read = lambda key: read_image(folder / key)  # noqa: E731
    return ImageSet(spec, tuple(classes), items, read, fingerprint, template, folder=folder)


def image_files(place: Path) -> list[Path]:
    """The images of a folder by name, without hidden files; a warning counts the files that are not images.

    Raises:
      UserError: the folder has no image.
    """
    files = [path for path in sorted(place.iterdir(), key=lambda path: path.name) if not path.name.startswith(".")]
    found = [path for path in files if path.suffix.lower() in SUFFIXES]
    kinds = ", ".join(SUFFIXES)
    require(bool(found), f"{place} has no image; put some there that end with {kinds}, or remove this folder of a class")
    if others := [path.name for path in files if path not in set(found)]:
        warn(f"{place}: {len(others)} entries are no images and are left out, such as {others[0]}; images end with {kinds}")
    return found


def content_of(images: ImageSet, *splits: str) -> str:
    """sha256 of the pixels of these splits; every file is decoded once.

    Raises:
      UserError: a file is not a complete image.
    """
    if images.folder is None:
        return images.fingerprint
    keys = sorted({item.key for split in splits for item in images.splits.get(split, ())})
    total = hashlib.sha256(images.fingerprint.encode())

    def check(key: str) -> bytes:
        images.read(key)
        return hashlib.sha256((images.folder / key).read_bytes()).digest()

    bar = progress(f"checking the images of {images.spec}", total=len(keys))
    with bar as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        for key, digest in zip(keys, pool.map(check, keys), strict=True):
            total.update(key.encode() + b"\0" + digest)
            advance(1)
    return total.hexdigest()


def split_by_hash(key: str, shares: Mapping[str, float]) -> str:
    """The split of an image, computed from its name only, so that adding images moves no other image."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 * sum(shares.values())
    for name, share in shares.items():
        place -= share
        if place < 0:
            return name
    return next(reversed(shares))


def few_shot(items: Sequence[Item], shots: int, seed: int) -> tuple[Item, ...]:
    """`shots` items of each class, or all if a class has fewer; 0: all items. Drawn like Dassl's, with CPython's generator,
    class by class in order of first appearance."""
    if not shots:
        return tuple(items)
    by_class: dict[int, list[Item]] = {}
    for item in items:
        by_class.setdefault(item.label, []).append(item)
    draw = random.Random(seed)
    return tuple(item for group in by_class.values() for item in (draw.sample(group, shots) if len(group) >= shots else group))


def part_of_classes(images: ImageSet, part: str) -> ImageSet:
    """The set with only the first half of its classes ("base", rounded up) or the second ("new"), numbered from 0; "all": all."""
    if part == "all":
        return images
    half = -(-len(images.classes) // 2)
    labels = range(half) if part == "base" else range(half, len(images.classes))
    splits = {}
    for name, items in images.splits.items():
        kept = (item for item in items if item.label in labels)
        splits[name] = tuple(replace(item, label=item.label - labels[0], caption=images.name_of(item)) for item in kept)
    return replace(images, classes=tuple(images.classes[label] for label in labels), splits=splits)


def check_set(images: ImageSet, split: str) -> None:
    """Raise UserError for a set that cannot be used for training or testing."""
    known = ", ".join(name for name, items in images.splits.items() if items)
    require(bool(images.splits.get(split)), f"{images.spec} has no {split} images; it has {known or 'none at all'}")
    require(len(images.classes) >= 2, f"{images.spec} has {len(images.classes)} class; at least 2")
