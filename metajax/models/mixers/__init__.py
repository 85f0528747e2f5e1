"""Sequence mixers by name: `MIXERS`. To add one, write a file with a class decorated by `@mixer("name")`."""

from metajax.models.mixers.base import MIXERS, Cache, Captures, KeyValues, LayerInputs, LayerSpec, Mixer, mixer

__all__ = ["MIXERS", "Cache", "Captures", "KeyValues", "LayerInputs", "LayerSpec", "Mixer", "mixer"]
