"""Sequence mixers by name: `MIXERS`. A new one is one file with a class under `@mixer("name")`."""

from metajax.models.mixers.base import MIXERS, Cache, Captures, KeyValues, LayerInputs, LayerSpec, Mixer, mixer

__all__ = ["MIXERS", "Cache", "Captures", "KeyValues", "LayerInputs", "LayerSpec", "Mixer", "mixer"]
