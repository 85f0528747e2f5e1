"""Analytic FLOPs of CLIP's towers and of prompt learners: exact for matrix products, convolutions and pairs that a mask allows.

A multiply-add is two operations; recomputation is not counted. Gradients pass through the frozen text tower to the context, which
costs one more forward pass, and two more for its (query, key) pairs. No gradient passes through the frozen image tower.
"""

from __future__ import annotations

from typing import NamedTuple

from metajax.config import Model
from metajax.models.masks import Mask
from metajax.vision.clip.config import Clip
from metajax.vision.clip.convolution import EXPANSION
from metajax.vision.config import ImageConfig, Prompts


class Cost(NamedTuple):
    """Forward operations of products with weights, and of products of queries, keys and values."""

    products: int
    pairs: int

    @property
    def forward(self) -> int:
        return self.products + self.pairs

    @property
    def forward_and_back(self) -> int:
        """Cost with the gradient of the inputs but not of the weights."""
        return 2 * self.products + 3 * self.pairs


def _blocks(model: Model, tokens: int, pairs: int) -> Cost:
    """A stack of blocks over one row; `pairs`: number of (query, key) pairs in one layer."""
    per_token = 2 * model.width * (4 * model.width + 2 * model.mlp_width)
    return Cost(model.layers * tokens * per_token, model.layers * pairs * 4 * model.width)


def text_cost(clip: Clip, length: int, *, causal: bool = True) -> Cost:
    """Cost of one text of `length` tokens; causal: without the pairs that the mask forbids."""
    blocks = _blocks(clip.text, length, Mask().pairs(length) if causal else length**2)
    return blocks._replace(products=blocks.products + 2 * clip.text_width * clip.embed)


def image_cost(clip: Clip) -> Cost:
    """Cost of one image."""
    if not clip.patch:
        return _resnet(clip)
    tokens = (clip.image_size // clip.patch) ** 2 + 1
    blocks = _blocks(clip.vision, tokens, tokens**2)
    return blocks._replace(products=blocks.products + _patches(clip) + 2 * clip.vision_width * clip.embed)


def _patches(clip: Clip) -> int:
    """Cost of embedding a vision transformer's patches: every pixel once."""
    return 2 * clip.image_size**2 * 3 * clip.vision_width


def _resnet(clip: Clip) -> Cost:
    """Convolutions (side^2 of taps times inputs times outputs for each pixel of the result), then attention with one query."""
    width, side = clip.vision_width, clip.image_size // 2
    taps = side**2 * 9 * (3 * width // 2 + (width // 2) ** 2 + width**2 // 2)
    side, inputs = side // 2, width
    for stage, count in enumerate(clip.vision_layers):
        inner = width << stage
        for block in range(count):
            halves = stage > 0 and block == 0
            taps += side**2 * (inputs * inner + 9 * inner**2)
            side = side // 2 if halves else side
            taps += side**2 * inner * EXPANSION * (inner + (inputs if halves or inputs != inner * EXPANSION else 0))
            inputs = inner * EXPANSION
    tokens = side**2 + 1
    return Cost(2 * (taps + inputs**2 + 2 * tokens * inputs**2 + inputs * clip.embed), 4 * tokens * inputs)


def learner_flops(clip: Clip, cfg: Prompts, text: Cost, classes: int, *, still: bool = False) -> int:
    """FLOPs of one step of a prompt learner: a batch of images, and a prompt per class (per class and image if images shift it).

    text: cost of a prompt. still: image features are precomputed.
    """
    batch, conditioned, bottleneck = cfg.batch, cfg.condition != "none", cfg.bottleneck or clip.embed // 16
    images = 0 if still else batch * (6 + bool(cfg.augment) if cfg.paired else 1)
    prompts = classes * (batch if conditioned else 1)
    logits = 2 * (2 * batch * classes * clip.embed)
    moved = batch * ((cfg.condition == "meta") + 6 * cfg.paired)  # images in the meta-net, whose inputs need no gradient
    meta = 2 * moved * bottleneck * (2 * clip.embed + 3 * clip.text_width)
    return images * image_cost(clip).forward + prompts * text.forward_and_back + logits + meta


def image_step_flops(config: ImageConfig, clip: Clip, classes: int, length: int, *, causal: bool = True) -> int:
    """FLOPs of one step of a run on images, whose texts have `length` tokens.

    A CLIP's: three passes through both towers and the square of logits, without the gradient of pixels.
    """
    text = text_cost(clip, length, causal=causal)
    if config.prompts is None:
        batch = config.images.batch
        per_image = image_cost(clip).forward + text.forward + 2 * batch * clip.embed
        return batch * (3 * per_image - _patches(clip))
    return learner_flops(clip, config.prompts, text, classes, still=config.still)
