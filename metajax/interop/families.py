"""The model families whose published checkpoints can be imported and exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from metajax.config import Model
from metajax.interop import gpt2, hymba, llama
from metajax.interop.layouts import Layout, Tensor
from metajax.models.lm import LM


class Family(NamedTuple):
    """What is specific to one model family."""

    layout: Layout
    model_config: Callable[[Mapping[str, Any]], Model]  # from the values of a config.json
    hub_config: Callable[[Model, int], dict[str, Any]]  # (model, sequence length) -> values of config.json
    length: str  # config.json's name for the sequence length
    # (tensors of a checkpoint, config.json) -> tensors under the names of the layout.
    names: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Mapping[str, Tensor]] = lambda tensors, values: tensors
    fit: Callable[[LM], LM] = lambda model: model  # the same function, with every parameter that the layout requires
    # {setting: name suffixes} of a model's all-zero tensors, which a file omits if the setting is false.
    zeros: Callable[[LM], dict[str, tuple[str, ...]]] = lambda model: {}


_LENGTH = "max_position_embeddings"
FAMILIES = {
    "hymba": Family(hymba.LAYOUT, hymba.model_config, hymba.hub_config, _LENGTH),
    "gpt2": Family(gpt2.LAYOUT, gpt2.model_config, gpt2.hub_config, "n_positions", gpt2.names, gpt2.with_biases),
    "llama": Family(llama.LAYOUT, llama.model_config, llama.hub_config, _LENGTH, llama.names, zeros=llama.zero_biases),
}
