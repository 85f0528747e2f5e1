"""Sets of images with classes: what every source gives, few-shot choices, and the split of classes into base and new."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from metajax.config import require


@dataclass(frozen=True)
class Item:
    """One image: what its set reads it by, its class, and what it shows in words (its class's name where nothing closer is known)."""

    key: Any
    label: int
    caption: str = ""


@dataclass(frozen=True)
class ImageSet:
    """Items by split, the classes' names by label, and how an item is read.

    splits: train and test; pretrain where some images are kept for a CLIP of one's own, so that it has seen no other.
    """

    spec: str
    classes: tuple[str, ...]
    splits: Mapping[str, tuple[Item, ...]]
    read: Callable[[Any], Image.Image]
    fingerprint: str
    template: str = "a photo of a {}."
    manifest: Mapping[str, Any] = field(default_factory=dict)
    attribution: str = ""  # to stand beside any picture of it

    def name_of(self, item: Item) -> str:
        return item.caption or self.classes[item.label]


def fingerprint_of(*parts: object) -> str:
    """sha256 of parts whose text says what they are."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def split_by_hash(key: str, shares: Mapping[str, float]) -> str:
    """The split of an image by its name alone: adding images moves none of the others."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 * sum(shares.values())
    for name, share in shares.items():
        place -= share
        if place < 0:
            return name
    return next(reversed(shares))


def few_shot(items: Sequence[Item], shots: int, seed: int) -> tuple[Item, ...]:
    """`shots` items of each class, all where a class has fewer, drawn as Dassl draws them: class by class in order of first appearance,
    by CPython's generator; 0: all items."""
    if not shots:
        return tuple(items)
    by_class: dict[int, list[Item]] = {}
    for item in items:
        by_class.setdefault(item.label, []).append(item)
    draw = random.Random(seed)
    return tuple(item for group in by_class.values() for item in (draw.sample(group, shots) if len(group) >= shots else group))


def part_of_classes(images: ImageSet, part: str) -> ImageSet:
    """The set with the first half of its classes alone ("base", rounded up) or the second ("new"), numbered from 0; "all": itself."""
    if part == "all":
        return images
    half = -(-len(images.classes) // 2)
    labels = range(half) if part == "base" else range(half, len(images.classes))
    splits = {
        name: tuple(
            replace(item, label=item.label - labels[0], caption=images.name_of(item)) for item in items if item.label in labels
        )
        for name, items in images.splits.items()
    }
    return replace(images, classes=tuple(images.classes[label] for label in labels), splits=splits)


def check_set(images: ImageSet, split: str) -> None:
    """UserError for a set that cannot be trained or tested on."""
    known = ", ".join(name for name, items in images.splits.items() if items)
    require(bool(images.splits.get(split)), f"{images.spec} has no {split} images; it has {known or 'none at all'}")
    require(len(images.classes) >= 2, f"{images.spec} has {len(images.classes)} class; at least 2")
