"""Attention of the class token over test images: the last block's, and that through all blocks (rollout).

Attention from the class token to the patches, for a few test images: an illustration, not a measurement. The image tower is the
frozen CLIP's, so learners on the same CLIP have the same maps.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metajax.analysis import Figures, Numbers
from metajax.core.errors import require
from metajax.reporting.panels import panels
from metajax.vision.analyses import image_analysis
from metajax.vision.clip.model import CLIP
from metajax.vision.data.preprocessing import normalise
from metajax.vision.study import ImageStudy


def _fits(study: ImageStudy) -> bool:
    return bool(study.model.cfg.patch)


def _needs(study: ImageStudy) -> None:
    require(_fits(study), "a ResNet has no class token that attends to patches")


@image_analysis("attention", title="Where the class token looks", fits=_fits, needs=_needs, on_prompts=False)
def attention(study: ImageStudy) -> dict[str, Any]:
    """Weights of the patches for the class token, float[SHOWN, side, side]: of the last block (mean over heads), and over all blocks.

    Over all blocks: each map is averaged with the residual stream's identity (rollout, Abnar and Zuidema, arXiv 2005.00928).
    """
    maps = np.asarray(_probabilities(study.model, study.pixels)).mean(axis=2)  # [L, N, query, key]
    rolled = np.eye(maps.shape[-1])
    for block in maps:
        rolled = (block + np.eye(maps.shape[-1])) / 2 @ rolled
    side = study.model.cfg.image_size // study.model.cfg.patch
    last, rollout = (found[:, 0, 1:].reshape(-1, side, side) for found in (maps[-1], rolled))
    details = {"pixels": study.pixels.tolist(), "names": study.names, "attribution": study.attribution}
    details |= {"last": last.round(4).tolist(), "rollout": rollout.round(4).tolist()}
    return {"itself": float(maps[-1][:, 0, 0].mean()), "details": details}


@jax.jit
def _probabilities(model: CLIP, pixels: jax.Array) -> jax.Array:
    return model.visual(normalise(jnp.asarray(pixels), model.cfg), ("attention_probabilities",))[1]["attention_probabilities"]


@attention.headlines
def headlines(numbers: Numbers) -> list[str]:
    return [f"In the last block the class token keeps {numbers['itself']:.0%} of its weight for itself."]


@attention.figures
def figures(result: Numbers) -> Figures:
    details = result["details"]
    pixels, names = np.array(details["pixels"], np.uint8), details["names"]
    maps = {"image": None, "last block": details["last"], "all blocks": details["rollout"]}
    figure, axes_of = panels(3, len(pixels), 3.5 / 3)
    for at, axes in enumerate(axes_of):
        (row, n), side = divmod(at, len(pixels)), pixels.shape[1]
        words = list(maps)[row]
        axes.imshow(pixels[n], extent=(0, side, side, 0))
        if maps[words] is not None:
            shown = np.array(maps[words][n])
            axes.imshow(shown, extent=(0, side, side, 0), cmap="inferno", alpha=0.65, interpolation="bilinear")
        axes.set(xticks=[], yticks=[])
        if row == 0:
            axes.set_title(names[n], fontsize=8)
        if n == 0:
            axes.set_ylabel(words, fontsize=8.5)
    caption = "The last block's attention, mean over heads, and attention through all blocks (rollout)."
    return [(figure, f"{caption} Brightness is relative to each map. {details['attribution']}".strip())]
