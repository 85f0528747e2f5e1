"""CLIP's preprocessing: RGB in 8 bits, short side resized to the model's size, centre crop, normalised by channel."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from metajax.core.errors import UserError, require
from metajax.vision.clip.config import Clip

Pixels = TypeVar("Pixels")  # an array on the host or on a device
# Errors of Pillow's decoders for a file that is not an image, or is cut off.
_DECODING = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(path: Path) -> Image.Image:
    """The decoded image of a file, in RGB with 8 bits a channel. UserError, naming the file, if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            image.load()
    except _DECODING as error:
        system = getattr(error, "strerror", None)  # such as a missing file or too many open files: the image itself may be fine
        require(not system, f"{path}: {system}")
        reason = "it is empty" if path.stat().st_size == 0 else (str(error).strip().splitlines() or ["damaged"])[0]
        raise UserError(f"{path}: not a whole image ({reason}); fetch it again, or remove it") from None
    return as_rgb(image, str(path))


def as_rgb(image: Image.Image, name: str = "an image") -> Image.Image:
    """The image in RGB with 8 bits a channel; 16 bits of grey are reduced by shifting. UserError for grey of 32 bits."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    unknown = f"{name}: its pixels have 32 bits, whose black and white are unknown; convert it to 8 or 16 bits"
    require(image.mode not in ("I", "F"), unknown)
    return image.convert("RGB")


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic resize with antialiasing, in 8 bits: along rows first, then along columns, each rounded.

    Pillow up to 12 does this by default, and CLIP was trained and tested with it; later versions choose the order by the sizes.
    """
    rows = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return rows.resize((width, height), Image.Resampling.BICUBIC)


def centre(image: Image.Image, size: int) -> np.ndarray:
    """uint8[size, size, 3]: the middle of an RGB image whose short side was resized to `size`.

    Sides are rounded as torchvision's Resize and CenterCrop round them, which OpenAI's code uses.
    """
    image, short = as_rgb(image), min(image.size)
    width, height = (size if side == short else size * side // short for side in image.size)
    left, top = (round((side - size) / 2) for side in (width, height))
    return np.asarray(resize(image, width, height).crop((left, top, left + size, top + size)))


def normalise(pixels: Pixels, clip: Clip) -> Pixels:
    """Normalise uint8 pixels for the image tower of `clip`: float32 [..., 3]."""
    mean, std = (np.array(numbers, np.float32) for numbers in clip.pixel_statistics)
    return (pixels.astype(np.float32) / 255 - mean) / std
