"""Positions of metadata before, after or inside a piece of a document: `metadata.position` names one.

A module with `@position(NAME)` registers a function from the recipe to the metadata of every piece. To add a position, do the
same in a file of `experiments/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from metajax.config import Metadata
from metajax.core.registries import Registry


def before(length: int) -> int:
    """Before all body tokens of a piece; `metadata.bos_eos` decides whether before or after BOS."""
    return 0


def after(length: int) -> int:
    """After all body tokens of a piece; `metadata.bos_eos` decides whether after or before EOS."""
    return length


class Spot(NamedTuple):
    """One metadata string in every piece.

    template: of the string; "" means the learnable tokens. loss_weight: weight of its tokens in the loss. at: from the number of
    the piece's body tokens to how many of them precede it; a module-level function, so that it can be pickled.
    """

    template: str
    at: Callable[[int], int]
    loss_weight: float


position: Registry[Callable[[Metadata], tuple[Spot, ...]]] = Registry("position", __name__)


def own_template(recipe: Metadata) -> str:
    """The template of a recipe, or "" if it has learnable tokens instead."""
    return "" if recipe.tokens else recipe.template


def spots(recipe: Metadata) -> tuple[Spot, ...]:
    """The metadata of every piece; raises UserError for an unknown position."""
    return position.find(recipe.position, "metadata.position")(recipe)
