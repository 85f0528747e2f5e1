"""Positions of metadata beside or inside a piece of a document: `metadata.position` names one.

A module with `@position(NAME)` registers a function from the recipe to the metadata of every piece. A position of your own is the same in a
file of `experiments/`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from metajax.config import Metadata
from metajax.core.registries import Registry


def before(length: int) -> int:
    """Before all body tokens of a piece, and before or after BOS as `metadata.bos_eos` says."""
    return 0


def after(length: int) -> int:
    """After all body tokens of a piece, and after or before EOS as `metadata.bos_eos` says."""
    return length


@dataclass(frozen=True)
class Spot:
    """One metadata string in every piece.

    template: what it shows; "" means the learnable tokens. loss_weight: of predicting it. at: how many of the piece's body tokens precede it,
    from their number; a function at the top of a module, so that it can be pickled.
    """

    template: str
    at: Callable[[int], int]
    loss_weight: float


position: Registry[Callable[[Metadata], tuple[Spot, ...]]] = Registry("position", __name__)


def own_template(recipe: Metadata) -> str:
    """The template of a recipe, "" where it has learnable tokens instead."""
    return "" if recipe.tokens else recipe.template


def spots(recipe: Metadata) -> tuple[Spot, ...]:
    """The metadata of every piece; UserError for a position that does not exist."""
    return position.find(recipe.position, "metadata.position")(recipe)
