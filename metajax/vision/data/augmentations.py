"""AAPL's 14 image operations as pure functions of (image, key), as torchvision and OpenCV define them.

As in the released code, they work on normalised pixels: a colour jitter clamps these to [0, 1], which loses all values darker
than the mean, and zero is the mean colour. With `augment(..., space="rgb")` they work on colours in [0, 1] instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metajax.vision.clip.config import Clip
from metajax.vision.config import AUGMENTATIONS

Image = Float[Array, "H W 3"]
_GREY = (0.2989, 0.587, 0.114)
_CROP_SHIFT = 30 / 224  # share of a side: 30 pixels of the published 224
_CUTOUT_AREA, _CUTOUT_ASPECT, _CUTOUT_TRIES = 0.5, (0.3, 3.3), 10


def augment(
    image: Image, types: Int[Array, ""], key: PRNGKeyArray, *, clip: Clip, names: Sequence[str] = AUGMENTATIONS, space: str
) -> Image:
    """The image, normalised for `clip`, after the operation names[types]."""
    mean, std = (jnp.array(numbers, image.dtype) for numbers in clip.pixel_statistics)
    if space == "rgb":
        image = image * std + mean
    image = jax.lax.switch(types, [OPERATIONS[name] for name in names], image, key)
    return (image - mean) / std if space == "rgb" else image


# ---------------------------------------------------------------------------------------------------------- colours


def grey(image: Image) -> Image:
    """The luma in all three channels."""
    return jnp.broadcast_to(jnp.sum(image * jnp.array(_GREY), axis=-1, keepdims=True), image.shape)


def _blend(image: Image, other: Array | float, factor: Float[Array, ""]) -> Image:
    return jnp.clip(factor * image + (1 - factor) * other, 0.0, 1.0)


def turn_hue(image: Image, shift: Float[Array, ""]) -> Image:
    """Shift the hue by a share of the circle and keep saturation and value. Values outside [0, 1] use the same formulas."""
    red, green, _ = jnp.moveaxis(image, -1, 0)
    high, low = jnp.max(image, axis=-1), jnp.min(image, axis=-1)
    spread = jnp.where(high == low, 1.0, high - low)
    saturation = (high - low) / jnp.where(high == low, 1.0, high)
    to_red, to_green, to_blue = jnp.moveaxis((high[..., None] - image) / spread[..., None], -1, 0)
    sixth = jnp.where(high == red, to_blue - to_green, jnp.where(high == green, 2 + to_red - to_blue, 4 + to_green - to_red))
    hue = jnp.mod(jnp.mod(sixth / 6 + 1, 1.0) + shift, 1.0) * 6
    part = hue - jnp.floor(hue)
    p, q, t = (jnp.clip(high * (1 - x), 0.0, 1.0) for x in (saturation, saturation * part, saturation * (1 - part)))
    sectors = ((high, t, p), (q, high, p), (p, high, t), (p, q, high), (t, p, high), (high, p, q))
    sector = jnp.mod(jnp.floor(hue).astype(jnp.int32), 6)[..., None]
    return jnp.select([sector == n for n in range(6)], [jnp.stack(rgb, axis=-1) for rgb in sectors])


_ADJUSTMENTS: tuple[Callable[[Image, Array], Image], ...] = (
    lambda image, factor: _blend(image, 0.0, factor),  # brightness
    lambda image, factor: _blend(image, jnp.mean(grey(image)), factor),  # contrast
    lambda image, factor: _blend(image, grey(image), factor),  # saturation
    turn_hue,
)


def jitter(image: Image, order: Int[Array, " 4"], factors: Float[Array, " 4"], *, hue: bool) -> Image:
    """Change brightness, contrast, saturation and hue by their factors in the given order; without `hue`, keep the hue."""
    adjustments = _ADJUSTMENTS if hue else (*_ADJUSTMENTS[:3], lambda image, factor: image)
    for n in range(4):
        image = jax.lax.switch(order[n], adjustments, image, factors[order[n]])
    return image


def _random_jitter(strengths: tuple[float, float, float, float], image: Image, key: PRNGKeyArray) -> Image:
    keys, (*colours, hue) = jax.random.split(key), strengths
    low = jnp.array([*(max(0.0, 1 - s) for s in colours), -hue])
    high = jnp.array([*(1 + s for s in colours), hue])
    factors = jax.random.uniform(keys[0], (4,), minval=low, maxval=high)
    return jitter(image, jax.random.permutation(keys[1], 4), factors, hue=hue > 0)


# ---------------------------------------------------------------------------------------------------------- filters


def _neighbours(image: Image, rows: Array, columns: Array) -> Image:
    """A separable filter of three taps each way, mirrored at the border without repeating the border."""
    height, width, _ = image.shape
    wide = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    wide = sum(tap * wide[n : n + height] for n, tap in enumerate(rows))
    return sum(tap * wide[:, n : n + width] for n, tap in enumerate(columns))


def blur(image: Image, sigma: Float[Array, ""]) -> Image:
    """A Gaussian blur with that deviation on 3 x 3 pixels."""
    taps = jnp.exp(-0.5 * jnp.square(jnp.arange(-1, 2) / sigma))
    taps = taps / jnp.sum(taps)
    return _neighbours(image, taps, taps)


def sobel(image: Image) -> Image:
    """Length of the Sobel gradient of each channel."""
    smooth, slope = jnp.array([1.0, 2.0, 1.0]), jnp.array([-1.0, 0.0, 1.0])
    return jnp.sqrt(jnp.square(_neighbours(image, smooth, slope)) + jnp.square(_neighbours(image, slope, smooth)))


# ----------------------------------------------------------------------------------------------------------- places


def shift(image: Image, top: int, left: int) -> Image:
    """The image from row `top` and column `left` on, with zeros after it."""
    return jnp.pad(image[top:, left:], ((0, top), (0, left), (0, 0)))


def erase(image: Image, box: Int[Array, " 4"]) -> Image:
    """Set a box (top, left, height, width) to zero."""
    top, left, height, width = box
    rows, columns = jnp.arange(image.shape[0])[:, None], jnp.arange(image.shape[1])[None]
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    return jnp.where(inside[..., None], 0.0, image)


def cutout_box(shape: tuple[int, int], key: PRNGKeyArray) -> Int[Array, " 4"]:
    """(top, left, height, width) of half the area: the first of ten shapes that fits, or an empty box if none fits."""
    keys, (height, width) = jax.random.split(key, 3), shape
    low, high = (jnp.log(aspect) for aspect in _CUTOUT_ASPECT)
    aspect = jnp.exp(jax.random.uniform(keys[0], (_CUTOUT_TRIES,), minval=low, maxval=high))
    area = _CUTOUT_AREA * height * width
    tall, wide = (jnp.round(jnp.sqrt(x)).astype(jnp.int32) for x in (area * aspect, area / aspect))
    fits = (tall < height) & (wide < width)
    first = jnp.argmax(fits)
    tall, wide = (jnp.where(jnp.any(fits), x[first], 0) for x in (tall, wide))
    top, left = (jax.random.randint(k, (), 0, side - x + 1) for k, side, x in zip(keys[1:], shape, (tall, wide), strict=True))
    return jnp.stack([top, left, tall, wide])


OPERATIONS: dict[str, Callable[[Image, PRNGKeyArray], Image]] = {
    "color_jitter_red": functools.partial(_random_jitter, (1.5, 1.0, 1.0, 0.2)),
    "color_jitter_green": functools.partial(_random_jitter, (1.0, 1.0, 1.5, 0.0)),
    "color_jitter_blue": functools.partial(_random_jitter, (1.0, 1.0, 1.0, 0.5)),
    "grayscale": lambda image, key: grey(image),
    "gaussian_noise": lambda image, key: image + jax.random.normal(key, image.shape),
    "gaussian_blur": lambda image, key: blur(image, jax.random.uniform(key, (), minval=0.1, maxval=2.0)),
    "horizontal_flip": lambda image, key: image[:, ::-1],
    "vertical_flip": lambda image, key: image[::-1],
    "rotation_90": lambda image, key: jnp.rot90(image),
    "rotation_180": lambda image, key: jnp.rot90(image, 2),
    "rotation_270": lambda image, key: jnp.rot90(image, 3),
    "crop": lambda image, key: shift(image, *(round(_CROP_SHIFT * side) for side in image.shape[:2])),
    "cutout": lambda image, key: erase(image, cutout_box(image.shape[:2], key)),
    "sobel_filter": lambda image, key: sobel(image),
}
