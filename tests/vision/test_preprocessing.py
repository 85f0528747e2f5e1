"""CLIP's evaluation transform compared with OpenAI's, on sizes that round up and down."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from metajax.core.errors import UserError
from metajax.vision.clip.config import preset
from metajax.vision.data.preprocessing import centre, normalise, read_image

CLIP = preset("ViT-B/16")
Z = np.load(Path(__file__).parents[1] / "goldens" / "clip_preprocess_a.npz")


@pytest.mark.parametrize("name", ["image0", "image1", "image2", "image3", "image4"])
def test_meets_the_golden(name):
    found = normalise(centre(Image.fromarray(Z[f"{name}_uint8_hwc"]), int(Z["n_px"])), CLIP)
    np.testing.assert_allclose(found.transpose(2, 0, 1), Z[f"out{name[-1]}_chw"], rtol=0, atol=1e-5)


def test_grey_images_and_devices():
    pixels = centre(Image.fromarray(Z["gray_uint8_hw"]), int(Z["n_px"]))
    assert pixels.dtype == np.uint8
    for found in (normalise(pixels, CLIP), normalise(jnp.asarray(pixels), CLIP)):
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.asarray(found).transpose(2, 0, 1), Z["gray_out_chw"], rtol=0, atol=1e-5)


@pytest.mark.fault(18)
@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bits_of_grey_are_shifted_to_8(tmp_path, dtype):
    grey = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    path = tmp_path / ("grey.png" if dtype == "<u2" else "grey.tif")
    Image.frombytes("I;16" if dtype == "<u2" else "I;16B", (64, 64), grey.astype(dtype).tobytes()).save(path)
    for image in (read_image(path), Image.open(path)):
        np.testing.assert_array_equal(centre(image, 64), np.repeat((grey >> 8)[..., None], 3, axis=-1))


@pytest.mark.fault(18)
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_of_32_bits_is_refused(tmp_path, dtype):
    Image.fromarray(np.full((8, 8), 70_000, dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(UserError, match=r"deep\.tif: its pixels have 32 bits.*convert it to 8 or 16"):
        read_image(tmp_path / "deep.tif")


def damaged(path):
    """An image file of each kind of damage, by name."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    image.save(path / "whole.png")
    image.save(path / "whole.jpg")
    png, jpeg = (path / "whole.png").read_bytes(), (path / "whole.jpg").read_bytes()
    contents = {
        "empty.png": b"",
        "page.jpg": b"<!DOCTYPE html><html>404</html>",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "header.png": png[:20],
        "zeros.webp": bytes(100),
        "flipped.png": png[:60] + bytes([png[60] ^ 255]) + png[61:],
        "chunk.png": png[:8] + b"\xff\xff\xff\xff" + png[12:],
        "text.gif": b"GIF89a",
        "tiff.tif": b"II*\0\xff\xff\xff\xff",
    }
    for name, content in contents.items():
        (path / name).write_bytes(content)
    return contents


@pytest.mark.fault(34)
def test_a_file_that_is_no_whole_image_is_named(tmp_path):
    for name in damaged(tmp_path):
        with pytest.raises(UserError, match=rf"/{name}: not a whole image \(.+\); fetch it again, or remove it$"):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match=r"gone\.png: No such file"):
        read_image(tmp_path / "gone.png")
