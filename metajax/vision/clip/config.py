"""The config of a CLIP model, and the published sizes (Radford et al., arXiv 2103.00020, tables 19 and 20)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from metajax.config.model import Model
from metajax.core.errors import nearest, require
from metajax.core.fields import Count, Part, Positive, Range, Size, SizeOrZero

# OpenAI's values for red, green and blue.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
Real = Annotated[float, Range(-1e30, 1e30)]


@dataclass(frozen=True)
class Clip(Part, path="clip"):
    """An image tower and a text tower that map into one embedding space of width `embed`."""

    vision_layers: tuple[Size, ...]  # vision transformer: one number; ResNet: blocks of each of the four stages
    vision_width: Size  # ResNet: channels of the first stage
    vision_heads: Size  # ResNet: heads of its attention pool
    text_width: Size
    text_heads: Size
    embed: Size
    patch: SizeOrZero = 0  # side of a vision transformer's patches; 0: a ResNet
    image_size: Size = 224
    text_layers: Size = 12
    context: Size = 77  # rows of the text tower's position table
    vocab: Count = 49_408
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    loss: Literal["softmax", "sigmoid"] = "softmax"  # sigmoid: SigLIP's (arXiv 2303.15343), whose logits have a learned bias
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    # The input of the image tower is (pixel / 255 - mean) / std in each channel; None: OpenAI's numbers.
    pixel_mean: tuple[Real, Real, Real] | None = None
    pixel_std: tuple[Positive, Positive, Positive] | None = None

    def __post_init__(self) -> None:
        stages, side, kind = (1, self.patch, "a vision transformer") if self.patch else (4, 32, "a ResNet (patch 0)")
        require(len(self.vision_layers) == stages, f"clip.vision_layers = {self.vision_layers}: {kind} needs {stages}")
        require(self.image_size % side == 0, f"clip.image_size = {self.image_size} does not divide by {side}")

    @property
    def pixel_statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """(mean, standard deviation) of each channel, for normalising pixels in [0, 1]."""
        return self.pixel_mean or PIXEL_MEAN, self.pixel_std or PIXEL_STD

    @property
    def vision(self) -> Model:
        """The transformer of the image tower."""
        return self._transformer(self.vision_layers[0], self.vision_width, self.vision_heads)

    @property
    def text(self) -> Model:
        """The transformer of the text tower."""
        return self._transformer(self.text_layers, self.text_width, self.text_heads)

    def _transformer(self, layers: int, width: int, heads: int) -> Model:
        plain = Model(layers, width, heads, mlp_width=4 * width, bias=True, position="learned", init_std=width**-0.5)
        return replace(plain, activation=self.activation, compute_dtype=self.compute_dtype)


_BASE = Clip((12,), vision_width=768, vision_heads=12, text_width=512, text_heads=8, embed=512, patch=16)
PRESETS = {
    "ViT-B/16": _BASE,
    "ViT-B/32": replace(_BASE, patch=32),
    "ViT-L/14": Clip((24,), vision_width=1024, vision_heads=16, text_width=768, text_heads=12, embed=768, patch=14),
    "RN50": Clip((3, 4, 6, 3), vision_width=64, vision_heads=32, text_width=512, text_heads=8, embed=1024),
}
PUBLISHED = {  # names of their weights
    "clip-vit-base-patch16": "ViT-B/16",
    "clip-vit-base-patch32": "ViT-B/32",
    "clip-vit-large-patch14": "ViT-L/14",
    "RN50.pt": "RN50",
}


def preset(name: str, **changes: Any) -> Clip:
    """A published size with fields changed; UserError for an unknown name."""
    require(name in PRESETS, f"clip preset {name!r}: unknown{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)
