"""CLIP's evaluation transform against OpenAI's, on sizes that round both ways."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from metajax.data.images.preprocessing import centre, normalise

Z = np.load(Path(__file__).parents[2] / "goldens" / "clip_preprocess_a.npz")


@pytest.mark.parametrize("name", ["image0", "image1", "image2", "image3", "image4"])
def test_meets_the_golden(name):
    found = normalise(centre(Image.fromarray(Z[f"{name}_uint8_hwc"]), int(Z["n_px"])))
    np.testing.assert_allclose(found.transpose(2, 0, 1), Z[f"out{name[-1]}_chw"], rtol=0, atol=1e-5)


def test_grey_images_and_devices():
    pixels = centre(Image.fromarray(Z["gray_uint8_hw"]), int(Z["n_px"]))
    assert pixels.dtype == np.uint8
    for found in (normalise(pixels), normalise(jnp.asarray(pixels))):
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.asarray(found).transpose(2, 0, 1), Z["gray_out_chw"], rtol=0, atol=1e-5)
