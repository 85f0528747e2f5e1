"""Where images come from: KIND[:PATH] -> ImageSet."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from metajax.config import nearest, require
from metajax.data.images.emoji import open_emoji
from metajax.data.images.published import NAMES, open_published
from metajax.data.images.sets import ImageSet, Item, fingerprint_of, split_by_hash

KINDS = ("emoji", "digits", "folder", "captions", *NAMES)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def open_images(spec: str, cache_dir: Path, data_dir: Path | None) -> ImageSet:
    """A source of images: emoji[:noto|:grey], digits, folder:PATH (PATH/CLASS/*.png, or PATH/{train,test}/CLASS/*.png), captions:PATH (images,
    each with a text beside it: x.png and x.txt), or a published set.

    Raises UserError for an unknown kind, and for files that are not there.
    """
    kind, _, path = spec.partition(":")
    require(kind in KINDS, f"unknown source of images {spec!r}{nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
    root = Path(str(data_dir)) if data_dir is not None else Path()
    if kind == "emoji":
        return open_emoji(spec, cache_dir)
    if kind == "digits":
        return open_digits()
    if kind in ("folder", "captions"):
        return {"folder": open_folder, "captions": open_captions}[kind](spec, root / path)
    return open_published(kind, root)


def open_digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, dark on white."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = (255 - found.images * (255 / 16)).astype(np.uint8)
    splits: dict[str, list[Item]] = {"pretrain": [], "train": [], "test": []}
    for key, label in enumerate(found.target.tolist()):
        splits[split_by_hash(f"digit {key}", dict.fromkeys(splits, 1.0))].append(Item(key, label))
    return ImageSet(
        "digits", DIGITS, {name: tuple(items) for name, items in splits.items()}, lambda key: Image.fromarray(pixels[key]).convert("RGB"),
        hashlib.sha256(pixels.tobytes()).hexdigest(), "a photo of a {}.", {"images": len(pixels)},
    )  # fmt: skip


def open_folder(spec: str, folder: Path) -> ImageSet:
    """Images in folders of their classes; without folders train and test in front of these, a half of each class by its files' names."""
    require(folder.is_dir(), f"{folder} is not a folder; name one that holds a folder of images for each class")
    parts = ("train", "test") if all((folder / part).is_dir() for part in ("train", "test")) else ()
    found: dict[str, list[Path]] = {}
    for base in [folder / part for part in parts] or [folder]:
        for place in sorted(p for p in base.iterdir() if p.is_dir()):
            found.setdefault(place.name, []).extend(sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES))
    classes = tuple(sorted(name for name, files in found.items() if files))
    require(len(classes) >= 2, f"{folder} has {len(classes)} folder with images; a class is a folder, and there are at least 2")
    splits: dict[str, list[Item]] = {"train": [], "test": []}
    for label, name in enumerate(classes):
        for file in found[name]:
            key = file.relative_to(folder).as_posix()
            split = key.partition("/")[0] if parts else split_by_hash(key, {"train": 1.0, "test": 1.0})
            splits[split].append(Item(key, label))
    items = {name: tuple(rows) for name, rows in splits.items()}
    sizes = [(item.key, (folder / item.key).stat().st_size) for rows in items.values() for item in rows]
    return ImageSet(
        spec, tuple(name.replace("_", " ") for name in classes), items, lambda key: Image.open(folder / key),
        fingerprint_of(classes, sizes), manifest={name: len(rows) for name, rows in items.items()},
    )  # fmt: skip


def open_captions(spec: str, folder: Path) -> ImageSet:
    """Images anywhere below a folder with what they show in a text file of the same name: for a CLIP to learn from, without classes."""
    require(folder.is_dir(), f"{folder} is not a folder; name one of images with their texts, x.png and x.txt")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    require(len(files) >= 2, f"{folder} has {len(files)} images; at least 2")
    items = []
    for file in files:
        text = file.with_suffix(".txt")
        require(text.is_file(), f"{file} has no text beside it; write what it shows into {text.name}")
        items.append(Item(file.relative_to(folder).as_posix(), -1, " ".join(text.read_text(encoding="utf-8").split())))
    sizes = [(item.key, item.caption, (folder / item.key).stat().st_size) for item in items]
    return ImageSet(
        spec,
        (),
        {"pretrain": tuple(items)},
        lambda key: Image.open(folder / key),
        fingerprint_of(sizes),
        "{}",
        {"pretrain": len(items)},
    )
