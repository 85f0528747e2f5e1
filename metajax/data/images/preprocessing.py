"""Images as CLIP reads them: the short side resized to the model's, the centre, and the numbers of the web's mean colour."""

from __future__ import annotations

from typing import TypeVar

import jax
import numpy as np
from PIL import Image

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic with antialiasing, in 8 bits: along rows first, then along columns, each rounded.

    As Pillow up to 12 does by itself, and as CLIP was trained and tested with; later versions choose the order by the sizes.
    """
    rows = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return rows.resize((width, height), Image.Resampling.BICUBIC)


def centre(image: Image.Image, size: int) -> np.ndarray:
    """uint8[size, size, 3]: the middle of an RGB image whose short side was resized to `size`.

    Sides are rounded as torchvision's Resize and CenterCrop round them, which OpenAI's code uses.
    """
    image, short = image.convert("RGB"), min(image.size)
    width, height = (size if side == short else size * side // short for side in image.size)
    left, top = (round((side - size) / 2) for side in (width, height))
    return np.asarray(resize(image, width, height).crop((left, top, left + size, top + size)))


def normalise(pixels: AnyArray) -> AnyArray:
    """float32 [..., 3] as the image tower reads it, of uint8 pixels; on the host or on a device."""
    return (pixels.astype(np.float32) / 255 - MEAN) / STD
