"""The families of models whose published checkpoints can be read and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from metajax.config import Model
from metajax.interop import gpt2, hymba, llama
from metajax.interop.layouts import Layout, Tensor
from metajax.models.lm import LM


def _same(value: Any, values: Mapping[str, Any] | None = None) -> Any:
    return value


@dataclass(frozen=True)
class Family:
    """What tells one family from the others."""

    layout: Layout
    model_config: Callable[[Mapping[str, Any]], Model]  # of a config.json
    hub_config: Callable[[Model, int], dict[str, Any]]  # what config.json says of a model for rows of so many tokens
    length: str  # config.json's name for them
    # A checkpoint's tensors as the layout has them; of the tensors and config.json.
    names: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Mapping[str, Tensor]] = _same
    fit: Callable[[LM], LM] = _same  # the same function, with all that the layout must have
    # {setting: ends of names} of a model's tensors that are zeros and stay out of a file when the setting is false.
    zeros: Callable[[LM], dict[str, tuple[str, ...]]] = lambda model: {}


FAMILIES = {
    "hymba": Family(hymba.LAYOUT, hymba.model_config, hymba.hub_config, "max_position_embeddings"),
    "gpt2": Family(gpt2.LAYOUT, gpt2.model_config, gpt2.hub_config, "n_positions", gpt2.names, gpt2.with_biases),
    "llama": Family(
        llama.LAYOUT, llama.model_config, llama.hub_config, "max_position_embeddings", llama.names, zeros=llama.zero_biases
    ),
}
