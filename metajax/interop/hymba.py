"""Hymba's released layout in and out: config.json and safetensors, whole or in shards, in any float type.

PyTorch keeps matrices [out, in]. One in-projection holds the rows of query, key, value (both only where a layer owns its keys), scan
input and gate, in this order. Weights are read slice by slice, each device's own part alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import ml_dtypes  # noqa: F401 - makes bfloat16 a NumPy type, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from metajax.config import Hybrid, Model, Runtime, UserError, require
from metajax.models.hybrid import layer_runs
from metajax.models.lm import LM, named_params
from metajax.models.rotary import hymba_ntk_factor

_MAMBA, _HEADS = "mixer.mamba", "mixer.attention"
# Tensor of a layer -> our parameters in it, one behind the other along its rows.
_LAYER = {
    "mamba.in_proj.weight": (
        f"{_HEADS}.query.w",
        f"{_HEADS}.key.w",
        f"{_HEADS}.value.w",
        f"{_MAMBA}.input.w",
        f"{_MAMBA}.gate.w",
    ),
    "mamba.out_proj.weight": ("mixer.output.w",),
    "mamba.conv1d.weight": (f"{_MAMBA}.conv",),
    "mamba.conv1d.bias": (f"{_MAMBA}.conv_bias",),
    "mamba.x_proj.0.weight": (f"{_MAMBA}.select.w",),
    "mamba.dt_proj.0.weight": (f"{_MAMBA}.step.w",),
    "mamba.dt_proj.0.bias": (f"{_MAMBA}.step_bias",),
    "mamba.A_log.0": (f"{_MAMBA}.log_rate",),
    "mamba.D.0": (f"{_MAMBA}.skip",),
    "mamba.dt_layernorm.weight": (f"{_MAMBA}.step_norm.scale",),
    "mamba.B_layernorm.weight": (f"{_MAMBA}.b_norm.scale",),
    "mamba.C_layernorm.weight": (f"{_MAMBA}.c_norm.scale",),
    "mamba.pre_avg_layernorm1.weight": ("mixer.attention_norm.scale",),
    "mamba.pre_avg_layernorm2.weight": ("mixer.ssm_norm.scale",),
    "input_layernorm.weight": ("mixer_norm.scale",),
    "pre_moe_layernorm.weight": ("mlp_norm.scale",),
    "moe.experts.0.gate_proj.weight": ("mlp.gate.w",),
    "moe.experts.0.up_proj.weight": ("mlp.up.w",),
    "moe.experts.0.down_proj.weight": ("mlp.down.w",),
}
_EMBEDDING = "model.embed_tokens.weight"
_WHOLE = {
    _EMBEDDING: "embedding",
    "model.memory_tokens": "blocks.meta_tokens",
    "model.final_layernorm.weight": "final_norm.scale",
}
_HEAD = "lm_head.weight"
_ROWS_AT_ONCE = 4096  # of the head, when it is compared with the embedding
# What the released code can be told and this model cannot.
_FIXED = {
    "hidden_act": "silu", "mlp_hidden_act": "silu", "mamba_d_conv": 4, "mamba_conv_bias": True, "mamba_proj_bias": False, "num_mamba": 1,
    "num_experts": 1, "attn_hidden_size": -1, "kq_head_dim": -1, "kq_norm": "none", "kv_weight_reuse": False,
    "kv_reuse_every_i_layer": -1, "memory_tokens_interspersed_every": 0, "tie_word_embeddings": True,
}  # fmt: skip


class Tensor(Protocol):
    """A tensor that is read where it is indexed: a NumPy array, or one in a file."""

    shape: tuple[int, ...]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


class Place(NamedTuple):
    """Where one layer's part of a parameter lies: rows of a tensor, from `start` on."""

    name: str
    start: int


# ------------------------------------------------------------------------------------------------- configuration


def model_config(values: Mapping[str, Any]) -> Model:
    """The model of a config.json. UserError for a missing key, and for a setting that this model cannot follow.

    `v_head_dim` is not read: the released code overwrites it.
    """
    missing = [
        name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size") if name not in values
    ]
    require(not missing, f"config.json lacks {', '.join(missing)}: not a Hymba")
    for name, value in _FIXED.items():
        found = values.get(name, value)
        require(found == value, f"config.json: {name} = {found!r}, but only {value!r} is supported")
    kinds = set(values.get("layer_type", ["h"]))
    require(kinds == {"h"}, f"config.json: layer_type has {', '.join(sorted(kinds - {'h'}))}, but only 'h' is supported")
    layers, window = values["num_hidden_layers"], values.get("sliding_window")
    hybrid = Hybrid(
        meta_tokens=values.get("num_memory_tokens", 0),
        full_layers=tuple(values.get("global_attn_idx") or ()) if window is not None else (),
        kv_groups=_group_sizes(values.get("kv_reuse_group") or [], layers),
        expand=values["mamba_expand"],
        state=values["mamba_d_state"],
        dt_rank=values["mamba_dt_rank"],
        inner_norms=values["mamba_inner_layernorms"],
    )
    return Model(
        layers=layers, width=values["hidden_size"], heads=values["num_attention_heads"], kv_heads=values["num_key_value_heads"],
        mlp_width=values["intermediate_size"], activation="swiglu", norm="rmsnorm", norm_eps=values["rms_norm_eps"], bias=False, tied=True,
        window=window, init_std=values["initializer_range"], hybrid=hybrid, **_positions(values),
    )  # fmt: skip


def _positions(values: Mapping[str, Any]) -> dict[str, Any]:
    if not values.get("rope", False):
        return {"position": "none"}
    kind, theta = values.get("rope_type", "default"), values["rope_theta"]
    require(kind in ("default", "ntk"), f"config.json: rope_type = {kind!r}, but only 'default' and 'ntk' are supported")
    if kind == "default":
        return {"position": "rope", "rope_theta": theta}
    original = values["orig_max_position_embeddings"]
    factor = hymba_ntk_factor(values["max_position_embeddings"], original)
    return {"position": "ntk", "rope_theta": theta, "rope_factor": factor, "rope_original_length": original}


def _group_sizes(groups: list[list[int]], layers: int) -> tuple[int, ...]:
    """Sizes in layer order, layers in no group as groups of one; () when nothing is shared."""
    by_first = {group[0]: group for group in groups}
    for group in groups:
        together = list(range(group[0], group[0] + len(group)))
        require(
            group == together, f"config.json: kv_reuse_group has {group}, but only layers that follow each other are supported"
        )
    sizes, layer = [], 0
    while layer < layers:
        sizes.append(len(by_first.get(layer, [layer])))
        layer += sizes[-1]
    return tuple(sizes) if max(sizes) > 1 else ()


# ------------------------------------------------------------------------------------------------- weights in


def from_hymba(
    state: Mapping[str, Tensor],
    cfg: Model,
    *,
    vocab_size: int | None = None,
    runtime: Runtime | None = None,
    shardings: Callable[[LM], LM] | None = None,
) -> LM:
    """An LM with the weights of a Hymba state dict, float32.

    vocab_size: rows of the embedding, those behind the file's filled with zeros; None: as many as the file has.
    shardings: abstract model -> its shardings; None: the default device. A tied "lm_head.weight" may be there.
    Raises UserError naming a missing, extra or misshapen tensor.
    """
    require(_EMBEDDING in state, f"the state dict lacks {_EMBEDDING}: not a Hymba")
    rows = state[_EMBEDDING].shape[0]
    require(vocab_size is None or vocab_size >= rows, f"{_EMBEDDING} has {rows} rows, but the tokenizer's table {vocab_size}")
    options = {"max_length": 1, "meta": None, "runtime": runtime or Runtime()}
    model = jax.eval_shape(lambda: LM(cfg, vocab_size=vocab_size or rows, key=jax.random.key(0), **options))
    places, shapes = layout(model)
    shapes[_EMBEDDING] = (rows, cfg.width)
    _check(state, shapes)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spread = shardings(model) if shardings else jax.tree.map(lambda _: default, model)
    arrays = {}
    for (path, param), sharding in zip(named_params(model).items(), jax.tree.leaves(spread), strict=True):
        read = lambda index, path=path, shape=param.shape: _read(state, path, places[path], shape, index)  # noqa: E731
        arrays[path] = jax.make_array_from_callback(param.shape, sharding, read)
    return jax.tree.unflatten(jax.tree.structure(model), [arrays[path] for path in named_params(model)])


def layout(model: LM) -> tuple[dict[str, list[Place]], dict[str, tuple[int, ...]]]:
    """({our path: where it lies, one place for each stacked layer}, {tensor: shape}) of a (possibly abstract) model."""
    ours = {path: param.shape for path, param in named_params(model).items()}
    places = {path: [Place(name, 0)] for name, path in _WHOLE.items() if path in ours}
    shapes = {name: ours[path] for name, path in _WHOLE.items() if path in ours}
    first = 0
    for run, (group, count) in enumerate(layer_runs(model.cfg)):
        for within in range(len(group)):
            prefix = f"blocks.runs.{run}.layers.{within}."
            for tensor, parts in _LAYER.items():
                present = [prefix + part for part in parts if prefix + part in ours]
                starts = np.cumsum([0, *(_turn_shape(path, ours[path][1:])[0] for path in present)]).tolist()
                for n in range(count if present else 0):
                    name = f"model.layers.{first + n * len(group) + within}.{tensor}"
                    shapes[name] = (starts[-1], *_turn_shape(present[0], ours[present[0]][1:])[1:])
                    for path, start in zip(present, starts, strict=False):
                        places.setdefault(path, []).append(Place(name, start))
        first += len(group) * count
    left_out = sorted(ours.keys() - places.keys())
    require(not left_out, f"no place in Hymba's layout for {', '.join(left_out[:3])}: not a Hymba as it was released")
    return places, shapes


def _turn_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a layer's parameter in PyTorch's layout: matrices turned, convolutions with an axis of one in the middle."""
    if path.endswith(".w"):
        return shape[::-1]
    return (shape[0], 1, shape[1]) if path.endswith(".conv") else shape


def _check(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    found = {name for name in state if name != _HEAD and not name.endswith("rotary_emb.inv_freq")}
    missing, extra = sorted(shapes.keys() - found), sorted(found - shapes.keys())
    require(not missing, f"the checkpoint lacks {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    require(not extra, f"the checkpoint has tensors that its configuration does not: {', '.join(extra[:5])}")
    for name, shape in shapes.items():
        has = tuple(state[name].shape)
        require(has == shape, f"{name} has shape {has}, but its configuration needs {shape}")
    if _HEAD in state:
        head, rows = state[_HEAD], shapes[_EMBEDDING][0]
        require(
            tuple(head.shape) == shapes[_EMBEDDING], f"{_HEAD} has shape {tuple(head.shape)}, the embedding {shapes[_EMBEDDING]}"
        )
        parts = (slice(start, min(start + _ROWS_AT_ONCE, rows)) for start in range(0, rows, _ROWS_AT_ONCE))
        same = all(np.array_equal(head[part, :], state[_EMBEDDING][part, :]) for part in parts)
        require(same, f"{_HEAD} differs from {_EMBEDDING}, but the embedding is tied")


def _read(
    state: Mapping[str, Tensor], path: str, places: list[Place], shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """One device's part of a parameter, float32."""
    index = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
    if path.startswith("blocks.runs."):
        return np.stack([_read_place(state, path, place, index[1:]) for place in places[index[0]]])
    return _read_place(state, path, places[0], index)


def _read_place(state: Mapping[str, Tensor], path: str, place: Place, index: tuple[slice, ...]) -> np.ndarray:
    tensor, turned = state[place.name], path.endswith(".w")
    rows, *others = index[::-1] if turned else index
    if path.endswith(".conv"):
        others = [slice(0, 1), *others]
    start, stop = (min(place.start + i, tensor.shape[0]) for i in (rows.start, rows.stop))
    part = np.asarray(tensor[(slice(start, stop), *others)]).astype(np.float32)
    part = part[:, 0] if path.endswith(".conv") else part.T if turned else part
    missing = rows.stop - rows.start - (stop - start)  # rows of the embedding that the file does not have
    return np.pad(part, [(0, missing), (0, 0)]) if missing else part


# ------------------------------------------------------------------------------------------------- directories


class _FileTensor:
    """A tensor of a safetensors file; its numbers stay in the file until they are indexed."""

    def __init__(self, file: Any, name: str):
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._slice[index]


def open_directory(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, {name: tensor still in its file}) of a model directory with one safetensors file, or shards and their index."""
    config = _read_json(folder / "config.json")
    require(config.get("model_type") == "hymba", f"{folder}/config.json: model_type is {config.get('model_type')!r}, not 'hymba'")
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    require(index.exists() or single.exists(), f"{folder} has no model.safetensors and no {index.name}; name a model directory")
    if not index.exists():
        return config, _open_file(single)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(_read_json(index)["weight_map"].values())):
        require((folder / shard).exists(), f"{folder} lacks the shard {shard} that {index.name} names")
        tensors |= _open_file(folder / shard)
    return config, tensors


def _open_file(path: Path) -> dict[str, Tensor]:
    try:
        file = safe_open(path, "np")
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file ({error}); fetch it again") from None
    return {name: _FileTensor(file, name) for name in file.keys()}  # noqa: SIM118 - the handle is no mapping


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a model directory") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch it again") from None


# ------------------------------------------------------------------------------------------------- weights out


def to_hymba(model: LM, *, vocab_size: int | None = None) -> dict[str, np.ndarray]:
    """The state dict of an LM in the released names and shapes, float32, without the tied head; the first `vocab_size` rows (None: all)."""
    require(model.cfg.hybrid is not None, "only a hybrid model has a place in Hymba's layout")
    places, shapes = layout(model)
    state = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    for path, param in named_params(model).items():
        stacked = path.startswith("blocks.runs.")
        for place, value in zip(places[path], param[...] if stacked else param[...][None], strict=True):
            value = np.asarray(value, np.float32)
            value = value.reshape(_turn_shape(path, value.shape)) if path.endswith(".conv") else value
            value = value.T if path.endswith(".w") else value
            state[place.name][place.start : place.start + len(value)] = value
    state[_EMBEDDING] = state[_EMBEDDING][:vocab_size]
    return state


def write_safetensors(state: Mapping[str, np.ndarray], path: Path) -> None:
    """The state dict as one file, in the types that its arrays have."""
    save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, path, metadata={"format": "pt"})
