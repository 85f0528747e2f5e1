"""The families of models whose published checkpoints can be read and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from metajax.config import Model
from metajax.interop import gpt2, hymba, llama
from metajax.interop.layouts import Layout, Tensor
from metajax.models.lm import LM


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Family:
    """What tells one family from the others."""

    layout: Layout
    model_config: Callable[[Mapping[str, Any]], Model]  # of a config.json
    hub_config: Callable[[Model, int], dict[str, Any]]  # what config.json says of a model for rows of so many tokens
    length: str  # config.json's name for them
    names: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = _same  # of a checkpoint, as the layout has them
    fit: Callable[[LM], LM] = _same  # the same function, with all that the layout must have


FAMILIES = {
    "hymba": Family(hymba.LAYOUT, hymba.model_config, hymba.hub_config, "max_position_embeddings"),
    "gpt2": Family(gpt2.LAYOUT, gpt2.model_config, gpt2.hub_config, "n_positions", gpt2.names, gpt2.with_biases),
    "llama": Family(llama.LAYOUT, llama.model_config, llama.hub_config, "max_position_embeddings"),
}
