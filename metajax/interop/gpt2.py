"""GPT-2 weights in and out: state dicts as nanoGPT and Hugging Face name and lay them out.

nanoGPT keeps its projections [out, in] and uses the exact (erf) GELU; Hugging Face keeps the four projections of a block
[in, out] and uses the tanh form. Both fuse query, key and value, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from metajax.config import Model, Runtime, require
from metajax.models.lm import LM, named_params

Layout = Literal["nanogpt", "huggingface"]
ACTIVATION: dict[str, str] = {"nanogpt": "gelu", "huggingface": "gelu_tanh"}
_ATTENTION = "blocks.attention.projections"
# Our path -> name inside a layer. The fused projection is apart.
_LAYER = {
    "blocks.attention_norm.scale": "ln_1.weight",
    "blocks.attention_norm.bias": "ln_1.bias",
    f"{_ATTENTION}.output.w": "attn.c_proj.weight",
    f"{_ATTENTION}.output.b": "attn.c_proj.bias",
    "blocks.mlp_norm.scale": "ln_2.weight",
    "blocks.mlp_norm.bias": "ln_2.bias",
    "blocks.mlp.up.w": "mlp.c_fc.weight",
    "blocks.mlp.up.b": "mlp.c_fc.bias",
    "blocks.mlp.down.w": "mlp.c_proj.weight",
    "blocks.mlp.down.b": "mlp.c_proj.bias",
}
_WHOLE = {
    "embedding": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "final_norm.scale": "transformer.ln_f.weight",
    "final_norm.bias": "transformer.ln_f.bias",
}
_FUSED = {"w": "attn.c_attn.weight", "b": "attn.c_attn.bias"}
_PARTS = ("query", "key", "value")


def from_gpt2(state: Mapping[str, np.ndarray], cfg: Model, layout: Layout, *, runtime: Runtime | None = None) -> LM:
    """An LM with the weights of a GPT-2 state dict of NumPy arrays; rows and positions follow the dict.

    Accepts names with or without "transformer.", the prefix of compiled nanoGPT models, the causal-mask buffers of
    Hugging Face and a tied "lm_head.weight". Raises UserError naming a missing, extra or misshapen tensor, or the field of
    `cfg` that is not GPT-2's.
    """
    _check_config(cfg, layout)
    state = _normalise(state)
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        require(name in state, f"the {layout} state dict lacks {name}")
    model = jax.eval_shape(
        lambda: LM(
            cfg,
            vocab_size=len(state["transformer.wte.weight"]),
            max_length=len(state["transformer.wpe.weight"]),
            meta=None,
            runtime=runtime or Runtime(),
            key=jax.random.key(0),
        )
    )
    shapes = _tensor_shapes(model, cfg, layout)
    head = state.pop("lm_head.weight", None)
    require(
        head is None or np.array_equal(head, state["transformer.wte.weight"]), "lm_head.weight differs from wte: not a tied GPT-2"
    )
    missing, extra = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    require(not missing, f"the {layout} state dict lacks {', '.join(missing)}")
    require(not extra, f"the {layout} state dict has tensors that this configuration does not: {', '.join(extra)}")
    for name, shape in shapes.items():
        found = tuple(state[name].shape)
        require(found == shape, f"{name} has shape {found}, but {shape} is needed ({layout} layout)")
    return _assign(model, _from_names(state, cfg, layout))


def to_gpt2(model: LM, layout: Layout) -> dict[str, np.ndarray]:
    """The state dict of an LM in a layout's names and shapes, without the tied head; UserError when it is not a GPT-2."""
    _check_config(model.cfg, layout)
    ours = {path: np.asarray(param[...]) for path, param in named_params(model).items()}
    require(not any("meta_" in path for path in ours), "a model with meta-attention has no place in a GPT-2 state dict")
    state = {name: ours[path] for path, name in _WHOLE.items() if path in ours}
    for layer in range(model.cfg.layers):
        prefix = f"transformer.h.{layer}."
        for path, name in _LAYER.items():
            if path in ours:
                state[prefix + name] = _turn(ours[path][layer], layout)
        for array, name in _FUSED.items():
            if f"{_ATTENTION}.query.{array}" in ours:
                parts = [ours[f"{_ATTENTION}.{part}.{array}"][layer] for part in _PARTS]
                state[prefix + name] = _turn(np.concatenate(parts, axis=-1), layout)
    return state


def _check_config(cfg: Model, layout: str) -> None:
    require(layout in ACTIVATION, f"layout = {layout!r}; known: {', '.join(ACTIVATION)}")
    wanted = {
        "activation": ACTIVATION[layout],
        "norm": "layernorm",
        "norm_position": "pre",
        "position": "learned",
        "tied": True,
        "num_kv_heads": cfg.heads,
    }
    for name, value in wanted.items():
        found = getattr(cfg, name)
        require(found == value, f"model.{name} = {found!r}, but GPT-2 in the {layout} layout has {value!r}")


def _normalise(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names with "transformer." in front (the head apart), without compile prefixes and mask buffers."""
    buffers = (".attn.bias", ".attn.masked_bias")
    named = {}
    for name, value in state.items():
        name = name.removeprefix("_orig_mod.")
        if not name.endswith(buffers):
            whole = name.startswith(("transformer.", "lm_head."))
            named[name if whole else f"transformer.{name}"] = np.asarray(value)
    return named


def _turn(matrix: np.ndarray, layout: str) -> np.ndarray:
    """Between our [in, out] and the layout's orientation; vectors stay."""
    return matrix.T if layout == "nanogpt" else matrix


def _tensor_shapes(model: LM, cfg: Model, layout: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the state dict of this (abstract) model holds."""
    ours = {path: param.shape for path, param in named_params(model).items()}
    shapes = {name: ours[path] for path, name in _WHOLE.items() if path in ours}
    layer = {name: ours[path][1:] for path, name in _LAYER.items() if path in ours}
    layer |= {
        name: (*ours[f"{_ATTENTION}.query.{array}"][1:-1], 3 * cfg.width)
        for array, name in _FUSED.items()
        if f"{_ATTENTION}.query.{array}" in ours
    }
    turned = {name: shape[::-1] if layout == "nanogpt" else shape for name, shape in layer.items()}
    return shapes | {f"transformer.h.{i}.{name}": shape for i in range(cfg.layers) for name, shape in turned.items()}


def _from_names(state: Mapping[str, np.ndarray], cfg: Model, layout: str) -> dict[str, np.ndarray]:
    """Arrays by our own paths, layers stacked, from a checked state dict."""

    def stacked(name: str) -> np.ndarray:
        return np.stack([_turn(state[f"transformer.h.{i}.{name}"], layout) for i in range(cfg.layers)])

    present = {name.split(".", 3)[3] for name in state if name.startswith("transformer.h.")}
    arrays = {path: state[name] for path, name in _WHOLE.items() if name in state}
    arrays |= {path: stacked(name) for path, name in _LAYER.items() if name in present}
    for array, name in _FUSED.items():
        if name in present:
            parts = np.split(stacked(name), 3, axis=-1)
            arrays |= {f"{_ATTENTION}.{part}.{array}": value for part, value in zip(_PARTS, parts, strict=True)}
    return arrays


def _assign(model: LM, arrays: Mapping[str, np.ndarray]) -> LM:
    """The abstract model with its parameters replaced, by path, with float32 arrays."""
    paths = named_params(model)
    leaves = [param.replace(jnp.asarray(arrays[path], jnp.float32)) for path, param in paths.items()]
    structure = jax.tree.structure(model, is_leaf=lambda leaf: any(leaf is param for param in paths.values()))
    return jax.tree.unflatten(structure, leaves)
