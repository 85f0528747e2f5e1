"""The eleven data sets of the prompt-learning papers and ImageNet's four variants, in the folders of CoOp's instructions.

Splits, class names and their order come from the published split_zhou_*.json; Aircraft and ImageNet have none and are read from
their own lists. Nothing is downloaded. A missing split is not replaced, because results on another split cannot be compared.
"""

from __future__ import annotations

import json
from pathlib import Path

from metajax.core.errors import UserError, require
from metajax.vision.data.names import VARIANTS, ZHOU
from metajax.vision.data.sets import ImageSet, Item, image_files, of_files
from metajax.vision.data.templates import TEMPLATES

Splits = dict[str, list[tuple[str, int]]]  # split -> (path, label)


def open_published(name: str, root: Path) -> ImageSet:
    """Open a data set by its name; UserError if its folder or one of its lists is missing."""
    try:
        if name in ZHOU:
            base, classes, splits = _zhou(name, root)
        elif name == "fgvc_aircraft":
            base, classes, splits = _aircraft(root / name)
        else:
            base, classes, splits = _imagenet(name, root)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # errors for a list of another form
        raise UserError(f"{name}: its lists below {root} are not the published ones ({error!r}); fetch them again") from None
    items = {split: [Item(path, label) for path, label in found] for split, found in splits.items()}
    return of_files(name, base, classes, items, TEMPLATES[name])


def _read(path: Path, what: str) -> str:
    require(path.is_file(), f"{path} does not exist; {what}, and name the folder above with --data-dir")
    return path.read_text(encoding="utf-8")


def _zhou(name: str, root: Path) -> tuple[Path, list[str], Splits]:
    folder, images, file, _ = ZHOU[name]
    found = json.loads(_read(root / folder / file, f"put CoOp's published {file} beside the images"))
    names = {label: word for rows in found.values() for _, label, word in rows}
    splits = {split: [(path, label) for path, label, _ in found[split]] for split in ("train", "val", "test")}
    return root / folder / images, [names[label] for label in range(len(names))], splits


def _aircraft(folder: Path) -> tuple[Path, list[str], Splits]:
    what = "put the official FGVC-Aircraft lists and images there"
    classes = [name.strip() for name in _read(folder / "variants.txt", what).split("\n") if name.strip()]
    splits: Splits = {}
    for split in ("train", "val", "test"):
        lines = [line.split(" ", 1) for line in _read(folder / f"images_variant_{split}.txt", what).splitlines() if line.strip()]
        splits[split] = [(f"{image}.jpg", classes.index(name.strip())) for image, name in lines]
    return folder / "images", classes, splits


def _imagenet(name: str, root: Path) -> tuple[Path, list[str], Splits]:
    """ImageNet, with the validation images as test set; a variant with fewer classes has only these."""
    lines = _read(root / "imagenet" / "classnames.txt", "put CoOp's published classnames.txt there").splitlines()
    names = dict(line.strip().split(" ", 1) for line in lines if line.strip())
    synsets = sorted(names)
    base = root / ("imagenet/images" if name == "imagenet" else VARIANTS[name])
    folders: dict[str, dict[Path, str]] = {}  # of each split, with their synsets
    for split, place in {"train": "train", "test": "val"}.items() if name == "imagenet" else [("test", "")]:
        folder = base / place
        require(folder.is_dir(), f"{folder} does not exist; put folders of the classes' images there, or name --data-dir")
        found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        folders[split] = {path: synsets[int(path.name)] if name == "imagenet_v2" else path.name for path in found}
    present = sorted({synset for found in folders.values() for synset in found.values()})
    unknown = [synset for synset in present if synset not in names]
    require(not unknown, f"{base} has a folder {unknown and unknown[0]}, which is not in classnames.txt")
    splits: Splits = {split: [] for split in folders}
    for split, found in folders.items():
        for path, synset in found.items():
            label = present.index(synset)
            splits[split] += [(image.relative_to(base).as_posix(), label) for image in image_files(path)]
    return base, [names[synset] for synset in present], splits
