"""Texts of classes: a template for each data set and an ensemble of templates, as in CoOp's code (Zhou et al., arXiv 2109.01134).

Underscores in names become spaces.
"""

from __future__ import annotations

from collections.abc import Sequence

from metajax.core.errors import require

_PHOTO = "a photo of a {}."
_PHOTOS = "imagenet imagenet_v2 imagenet_sketch imagenet_a imagenet_r caltech101 stanford_cars sun397".split()
# One for each data set.
TEMPLATES = dict.fromkeys(_PHOTOS, _PHOTO) | {
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "food101": "a photo of {}, a type of food.",
    "ucf101": "a photo of a person doing {}.",
}
# OpenAI's choice of the best templates on ImageNet.
SELECTED = ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.")
SELECTED += ("art of the {}.", "a photo of the small {}.")


def ensemble(dataset: str, template: str = "") -> tuple[str, ...]:
    """The templates whose mean represents a class: the selected ones and, except for ImageNet itself, the data set's own."""
    known = f"no template for data set {dataset!r}; known: {', '.join(TEMPLATES)}"
    require(bool(template) or dataset in TEMPLATES, known)
    return SELECTED if dataset == "imagenet" else (*SELECTED, template or TEMPLATES[dataset])


def texts_of(names: Sequence[str], template: str) -> list[str]:
    """The text of every class."""
    require("{}" in template, f"template {template!r} has no {{}} for the class's name")
    return [template.replace("{}", name.replace("_", " ")) for name in names]
