"""Metadata before the body, after it, or both."""

from __future__ import annotations

from metajax.config import Metadata
from metajax.data.positions import Spot, after, before, own_template, position


@position("none")  # training shows no metadata; evaluation shows it before the body
@position("prepend")
def prepend(recipe: Metadata) -> tuple[Spot, ...]:
    return (Spot(own_template(recipe), before, recipe.loss_weights[0]),)


@position("append")
def append(recipe: Metadata) -> tuple[Spot, ...]:
    return (Spot(own_template(recipe), after, recipe.loss_weights[1]),)


@position("both")
def both(recipe: Metadata) -> tuple[Spot, ...]:
    return (*prepend(recipe), Spot(recipe.appended or own_template(recipe), after, recipe.loss_weights[1]))
