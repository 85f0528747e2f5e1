"""Metadata in the middle of every piece, a position of metadata."""

from metajax.data.positions import Spot, own_template, position


def middle(length):
    return length // 2


@position("middle")
def in_the_middle(recipe):
    return (Spot(own_template(recipe), middle, 0.5),)
