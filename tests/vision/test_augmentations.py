"""The 14 augmentations compared with torchvision's and OpenCV's, as AAPL's code calls them; and the distribution of draws."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.vision.clip.config import preset
from metajax.vision.config import AUGMENTATIONS
from metajax.vision.data import augmentations as ops

Z = np.load(Path(__file__).parents[1] / "goldens" / "aapl_augment_a.npz")
IMAGE = jnp.asarray(Z["image_normalised_chw"].transpose(1, 2, 0))
KEY, CLIP = jax.random.key(0), preset("ViT-B/16")


def same(found, name):
    np.testing.assert_allclose(np.asarray(found).transpose(2, 0, 1), Z[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["grayscale", "horizontal_flip", "vertical_flip", "rotation_90", "rotation_180", "rotation_270", "sobel_filter"]
)
def test_fixed_operations(name):
    same(ops.OPERATIONS[name](IMAGE, KEY), f"{name}/out")


def test_operations_with_parameters():
    same(ops.shift(IMAGE, *Z["crop/top_left"].tolist()), "crop/out_top6_left5")
    same(IMAGE + Z["gaussian_noise/noise"].transpose(1, 2, 0), "gaussian_noise/out")
    for n in range(3):
        same(ops.blur(IMAGE, Z[f"gaussian_blur{n}/sigma"]), f"gaussian_blur{n}/out")
        same(ops.erase(IMAGE, Z[f"cutout{n}/top_left_height_width"]), f"cutout{n}/out")


@pytest.mark.parametrize(("colour", "hue"), [("red", True), ("green", False), ("blue", True)])
def test_colour_jitter(colour, hue):
    jitter = jax.jit(ops.jitter, static_argnames="hue")
    for n in range(3):
        at = f"color_jitter_{colour}{n}"
        order, factors = Z[f"{at}/order_0brightness_1contrast_2saturation_3hue"], Z[f"{at}/factors_b_c_s_h"]
        same(jitter(IMAGE, order, factors, hue=hue), f"{at}/out")


def test_each_type_is_its_operation_and_a_function_of_the_key():
    assert tuple(ops.OPERATIONS) == AUGMENTATIONS
    names = ("vertical_flip", "gaussian_noise", "color_jitter_blue")
    run = jax.jit(lambda image, types, key: ops.augment(image, types, key, names=names, clip=CLIP, space="normalised"))
    np.testing.assert_array_equal(run(IMAGE, 0, KEY), IMAGE[::-1])
    np.testing.assert_array_equal(run(IMAGE, 1, KEY), run(IMAGE, 1, KEY))
    assert np.any(run(IMAGE, 1, KEY) != run(IMAGE, 1, jax.random.key(1)))
    jittered = run(IMAGE, 2, KEY)
    assert IMAGE.min() < 0 <= jittered.min(), "colours clamp to [0, 1] on normalised images too"
    np.testing.assert_allclose(ops.augment(IMAGE, 0, KEY, names=names, clip=CLIP, space="rgb"), IMAGE[::-1], atol=1e-5)


def test_cutout_takes_half_the_image():
    tall, wide = np.asarray(jax.jit(jax.vmap(lambda key: ops.cutout_box((224, 224), key)))(jax.random.split(KEY, 200)))[:, 2:].T
    assert np.all(np.abs(tall * wide / 224**2 - 0.5) < 0.003)
    assert tall.min() < 150 < 180 < tall.max() < 224
    shifted = ops.OPERATIONS["crop"](jnp.ones((224, 224, 3)), KEY)
    assert float(shifted.sum()) == 194 * 194 * 3 and float(shifted[:194, :194].min()) == 1
