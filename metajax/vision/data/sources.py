"""Where images come from: KIND[:PATH] -> ImageSet."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from metajax.core.errors import UserError, nearest, require
from metajax.vision.data.emoji import open_emoji
from metajax.vision.data.names import NAMES
from metajax.vision.data.published import open_published
from metajax.vision.data.sets import SUFFIXES, ImageSet, Item, image_files, of_files, split_by_hash

KINDS = ("emoji", "digits", "folder", "captions", *NAMES)
DIGITS = tuple("zero one two three four five six seven eight nine".split())


def open_images(spec: str, cache_dir: Path, data_dir: Path | None) -> ImageSet:
    """Open a source of images: emoji[:noto|:grey], digits, folder:PATH (PATH/CLASS/*.png, or PATH/{train,test}/CLASS/*.png),
    captions:PATH (images with their texts: x.png and x.txt), or a published set.

    Raises UserError for an unknown kind and for missing files.
    """
    kind, _, path = spec.partition(":")
    require(kind in KINDS, f"unknown source of images {spec!r}{nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
    root = Path(str(data_dir)) if data_dir is not None else Path()
    match kind:
        case "emoji":
            return open_emoji(spec, cache_dir)
        case "digits":
            return open_digits()
        case "folder":
            return open_folder(spec, root / path)
        case "captions":
            return open_captions(spec, root / path)
    return open_published(kind, root)


def open_digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, dark on white."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = (255 - found.images * (255 / 16)).astype(np.uint8)
    splits: dict[str, list[Item]] = {"pretrain": [], "train": [], "test": []}
    for key, label in enumerate(found.target.tolist()):
        splits[split_by_hash(f"digit {key}", dict.fromkeys(splits, 1.0))].append(Item(key, label))
    items, fingerprint = {name: tuple(found) for name, found in splits.items()}, hashlib.sha256(pixels.tobytes()).hexdigest()
    read = lambda key: Image.fromarray(pixels[key]).convert("RGB")  # noqa: E731
    return ImageSet("digits", DIGITS, items, read, fingerprint)


def open_folder(spec: str, folder: Path) -> ImageSet:
    """Images in one folder per class. Without parent folders train and test, half of each class is for testing, by file name."""
    require(folder.is_dir(), f"{folder} is not a folder; name one that holds a folder of images for each class")
    parts = ("train", "test") if all((folder / part).is_dir() for part in ("train", "test")) else ()
    found: dict[str, list[Path]] = {}
    for base in [folder / part for part in parts] or [folder]:
        for place in sorted(path for path in base.iterdir() if path.is_dir() and not path.name.startswith(".")):
            found.setdefault(place.name, []).extend(image_files(place))
    classes = tuple(sorted(found))
    require(len(classes) >= 2, f"{folder} has {len(classes)} folder with images; a class is a folder, and there are at least 2")
    for part in parts:
        lost = [name for name in classes if not (folder / part / name).is_dir()]
        require(not lost, f"{folder / part} has no folder {lost and lost[0]}, which the other split has; every class is in both")
    splits: dict[str, list[Item]] = {"train": [], "test": []}
    for label, name in enumerate(classes):
        for file in found[name]:
            key = file.relative_to(folder).as_posix()
            split = key.partition("/")[0] if parts else split_by_hash(key, {"train": 1.0, "test": 1.0})
            splits[split].append(Item(key, label))
    return of_files(spec, folder, [name.replace("_", " ") for name in classes], splits)


def open_captions(spec: str, folder: Path) -> ImageSet:
    """Images anywhere below a folder, with captions in text files of the same names: for training a CLIP, without classes."""
    require(folder.is_dir(), f"{folder} is not a folder; name one of images with their texts, x.png and x.txt")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    require(len(files) >= 2, f"{folder} has {len(files)} images; at least 2")
    items = []
    for file in files:
        text = file.with_suffix(".txt")
        require(text.is_file(), f"{file} has no text beside it; write what it shows into {text.name}")
        items.append(Item(file.relative_to(folder).as_posix(), -1, _caption(text)))
    return of_files(spec, folder, (), {"pretrain": items}, "{}")


def _caption(path: Path) -> str:
    try:
        words = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; write the caption as UTF-8") from None
    require(bool(words), f"{path} is empty; write what the image shows into it")
    return " ".join(words)
