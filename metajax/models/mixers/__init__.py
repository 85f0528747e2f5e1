"""Sequence mixers by name: `MIXERS`. A new one is one file with a class under `@mixer("name")`."""

# ruff: noqa: F401  each file registers its mixer
from metajax.models.mixers import attention, mamba, mamba2, meta_attention
from metajax.models.mixers.base import MIXERS, Cache, Captures, KeyValues, LayerInputs, LayerSpec, Mixer, mixer
