"""Tensor layouts of other programs as tables (tensor name <-> our parameters), and conversion of weights in both directions.

PyTorch stores linear maps as [out, in], we as [in, out]. One tensor may concatenate several of our parameters along their
outputs. Our layers are stacked. A tensor is read in blocks of rows, only the shard of each device, and is written to the sharded
layout before the next tensor is read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from metajax.config import Imported, Model, Runtime
from metajax.core.errors import require
from metajax.interop.settings import few
from metajax.models.lm import LM, named_params
from metajax.models.specs import layer_runs

HEAD = "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
NUMBERS_AT_ONCE = 1 << 18  # numbers of a tensor that are read at once: whole rows, at least one
Filled = TypeVar("Filled")  # a module


class Tensor(Protocol):
    """A tensor that is read when it is indexed: a NumPy array, or a tensor in a file."""

    shape: tuple[int, ...]
    dtype: Any  # a NumPy dtype, or the file's name of one

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


@dataclass(frozen=True)
class Layout:
    """The tensors of a model family. A tensor is absent if the model lacks its parameters, such as a bias."""

    family: str
    whole: Mapping[str, str]  # tensor -> our parameter; contains "embedding"
    layer: Mapping[str, str]  # tensor of a layer -> our parameters in it, concatenated along their last axis
    prefix: str  # of the tensor names of layer {}
    turned: tuple[str, ...] = (".w",)  # path suffixes of our matrices that the file stores as [out, in]
    buffers: tuple[str, ...] = ()  # name suffixes of tensors that are not parameters
    fields: Mapping[str, Collection[Any]] = field(default_factory=dict)  # of our model -> the values that the family supports

    @property
    def embedding(self) -> str:
        return next(name for name, path in self.whole.items() if path == "embedding")


def pairs(parts: Mapping[str, str]) -> dict[str, str]:
    """{tensor: our parameters} of the weight and bias of each part, given {part: our paths}; paths of norms end with "norm"."""
    found = {}
    for part, ours in parts.items():
        ends = {"weight": "scale", "bias": "bias"} if ours.endswith("norm") else {"weight": "w", "bias": "b"}
        found |= {f"{part}.{theirs}": " ".join(f"{path}.{end}" for path in ours.split()) for theirs, end in ends.items()}
    return found


class Part(NamedTuple):
    """The place of one of our parameters in a tensor."""

    path: str
    layer: int | None  # index in its stack
    start: int  # offset along our last axis


class Stored(NamedTuple):
    """A tensor as it is stored in a file."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def stored(model: LM, layout: Layout, rows: int | None = None) -> dict[str, Stored]:
    """Every tensor of a (possibly abstract) model with `rows` of the vocabulary (None: all). UserError if one has no place."""
    runs = enumerate(layer_runs(model.cfg))
    places = [(f"blocks.{run}.{i}.", n) for run, (group, count) in runs for n in range(count) for i in range(len(group))]
    found = stored_of(model, layout, [(layout.prefix.format(number), *place) for number, place in enumerate(places)])
    for name, tensor in found.items():
        if rows is not None and tensor.parts[0].path in ("embedding", "unembedding"):
            found[name] = tensor._replace(shape=(rows, *tensor.shape[1:]))
    return found


def stored_of(model: Any, layout: Layout, layers: Iterable[tuple[str, str, int]]) -> dict[str, Stored]:
    """`stored` for any module. layers: (prefix of tensor names, prefix of our paths, index in the stack) of each layer."""
    ours = {path: param.shape for path, param in named_params(model).items()}
    found = {name: _stored([(path, ours[path])], None, layout) for name, path in layout.whole.items() if path in ours}
    for start, prefix, place in layers:
        for tensor, paths in layout.layer.items():
            present = [(path, ours[path][1:]) for path in (prefix + end for end in paths.split()) if path in ours]
            if present:
                found[start + tensor] = _stored(present, place, layout)
    left_out = sorted(ours.keys() - {part.path for tensor in found.values() for part in tensor.parts})
    require(not left_out, f"the layout of {layout.family} has no place for {', '.join(left_out[:3])}: this is another model")
    return found


def _stored(present: list[tuple[str, tuple[int, ...]]], layer: int | None, layout: Layout) -> Stored:
    path, shape = present[0]
    if not shape:
        return Stored((), (Part(path, layer, 0),))
    starts = np.cumsum([0, *(shape[-1] for _, shape in present)]).tolist()
    whole = np.broadcast_to(np.float32(0), (*shape[:-1], starts[-1]))
    parts = tuple(Part(path, layer, start) for (path, _), start in zip(present, starts, strict=False))
    return Stored(_as_stored(layout, path, whole).shape, parts)


def _as_stored(layout: Layout, path: str, value: np.ndarray) -> np.ndarray:
    """A view of a layer's parameter in the layout of the file.

    Linear maps are transposed. Sequence convolutions get a middle axis of size 1. Image ones become [out, in, height, width].
    """
    if path.endswith(layout.turned):
        return value.T
    if path.endswith(".kernel"):
        return value.transpose(3, 2, 0, 1)
    return value[:, None] if path.endswith(".conv") else value


def _index_stored(layout: Layout, path: str, index: tuple[slice, ...]) -> tuple[slice, ...]:
    """The index into the file's tensor that corresponds to an index into the parameter."""
    if path.endswith(layout.turned):
        return index[::-1]
    if path.endswith(".kernel"):
        return (index[3], index[2], index[0], index[1])
    return (index[0], slice(0, 1), index[1]) if path.endswith(".conv") else index


# --------------------------------------------------------------------------------------------------------- in


def load_model(
    state: Mapping[str, Tensor],
    cfg: Model,
    layout: Layout,
    *,
    vocab_size: int | None = None,
    max_length: int = 1,
    runtime: Runtime | None = None,
    shardings: Callable[[LM], LM] | None = None,
) -> LM:
    """An LM with the float32 weights of a state dict, which may contain a tied "lm_head.weight".

    vocab_size: rows of the embedding; rows after the file's are zeros and have no logits. None: as many as the file has.
    max_length: rows of a learned position table. shardings: abstract model -> its shardings; None: the default device.
    Raises UserError naming every missing, extra or misshapen tensor, and tensors that are not finite floating-point numbers.
    """
    rows = table_rows(state, layout)
    require(vocab_size is None or vocab_size >= rows, f"{layout.embedding} has {rows} rows, more than a table of {vocab_size}")
    prefix = re.compile(re.escape(layout.prefix).replace(r"\{\}", r"(\d{1,6})\b"))
    layers = {int(found[1]) for found in map(prefix.match, state) if found}
    lacking = next(
        (layer for layer in range(cfg.layers) if layer not in layers), None
    )  # one message for the tensors of all layers
    found = f"its configuration has {cfg.layers} layers, its tensors {len(layers)}"
    require(lacking is None, f"the checkpoint lacks {layout.prefix.format(lacking)}*: {found}")
    imported = None if vocab_size in (None, rows) else Imported(rows)
    options = {"max_length": max_length, "meta": None, "runtime": runtime or Runtime(), "imported": imported}
    model = jax.eval_shape(lambda: LM(cfg, vocab_size=vocab_size or rows, key=jax.random.key(0), **options))
    return fill(model, stored(model, layout, rows), state, layout, shardings)


def table_rows(state: Mapping[str, Tensor], layout: Layout) -> int:
    """Number of rows of a state dict's embedding."""
    name = layout.embedding
    require(name in state, f"the checkpoint lacks {name}: not {layout.family} in this layout")
    shape = tuple(state[name].shape)
    require(len(shape) == 2 and shape[0] > 0, f"{name} has shape {shape}, but a table of tokens is needed")
    return shape[0]


def fill(
    model: Filled,
    tensors: Mapping[str, Stored],
    state: Mapping[str, Tensor],
    layout: Layout,
    shardings: Callable[[Filled], Filled] | None = None,
) -> Filled:
    """An abstract module filled with the float32 weights of a state dict that holds `tensors`; see `load_model`."""
    _check(state, tensors, layout)
    places: dict[str, list[tuple[str, Part]]] = {}
    for tensor, (_, parts) in tensors.items():
        for part in parts:
            places.setdefault(part.path, []).append((tensor, part))
    default = SingleDeviceSharding(jax.devices()[0])
    spread = shardings(model) if shardings else jax.tree.map(lambda _: default, model)
    arrays = []
    for (path, param), sharding in zip(named_params(model).items(), jax.tree.leaves(spread), strict=True):
        reads = [functools.partial(read_part, state, layout, *place) for place in places[path]]
        stacked = places[path][0][1].layer is not None
        arrays.append(_stack(reads, param.shape, sharding) if stacked else _single(reads[0], param.shape, sharding))
    return jax.tree.unflatten(jax.tree.structure(model), arrays)


Read = Callable[[tuple[slice, ...]], np.ndarray]


def _single(read: Read, shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    def shard(index: tuple[slice, ...]) -> np.ndarray:
        return read(tuple(slice(*along.indices(size)[:2]) for along, size in zip(index, shape, strict=True)))

    return jax.make_array_from_callback(shape, sharding, shard)


def _stack(reads: list[Read], shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    """Copy layers one by one into the stacked parameter, already sharded, so that no device ever holds it whole."""
    if len(reads) == 1:
        return _single(lambda index: reads[0](index[1:])[None], shape, sharding)
    spread = isinstance(sharding, NamedSharding)
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])) if spread else sharding  # layers are not sharded
    stack = jnp.zeros(shape, jnp.float32, device=sharding)
    for n, read in enumerate(reads):
        place = jax.device_put(np.int32(n))  # after a transfer JAX frees the last layer's copy on the host
        stack = _put(sharding)(stack, _single(read, shape[1:], of_layer), place)
        stack.block_until_ready()  # otherwise reading would run ahead
    return stack


@functools.cache
def _put(sharding: Sharding) -> Any:
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def read_part(state: Mapping[str, Tensor], layout: Layout, name: str, part: Part, index: tuple[slice, ...]) -> np.ndarray:
    """One device's shard of a layer's parameter, float32, read from the tensor `name`; tokens that the file lacks are zeros."""
    tensor = state[name]
    if not index:
        return _finite(name, tensor[()])
    read = np.zeros([along.stop - along.start for along in index], np.float32)
    last = slice(index[-1].start + part.start, index[-1].stop + part.start)
    target, (rows, *others) = _as_stored(layout, part.path, read), _index_stored(layout, part.path, (*index[:-1], last))
    for block in _blocks(rows.start, min(rows.stop, tensor.shape[0]), math.prod(tensor.shape[1:])):
        target[block.start - rows.start : block.stop - rows.start] = _finite(name, tensor[(block, *others)])
    return read


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    """Values of a tensor as float32; UserError if one is not finite."""
    with np.errstate(over="ignore"):
        values = np.asarray(values, np.float32)
    finite = bool(np.isfinite(values).all())
    require(finite, f"{name} has numbers that are NaN or infinite in float32; fetch the checkpoint again")
    return values


def _blocks(start: int, stop: int, width: int) -> Iterator[slice]:
    """Slices of rows from `start` to `stop`, a block at a time; a row has `width` numbers."""
    count = max(1, NUMBERS_AT_ONCE // width)
    return (slice(first, min(first + count, stop)) for first in range(start, stop, count))


def _check(state: Mapping[str, Tensor], tensors: Mapping[str, Stored], layout: Layout) -> None:
    """UserError that lists every tensor that does not fit."""
    tied = HEAD not in tensors and HEAD in state and "embedding" in layout.whole.values()
    expected = {name: tensor.shape for name, tensor in tensors.items()}
    if tied:
        expected[HEAD] = expected[layout.embedding]
    found = {name for name in state if not name.endswith(layout.buffers)}
    present = sorted(expected.keys() & found)
    problems = {
        "the checkpoint lacks {}": sorted(expected.keys() - found),
        "the checkpoint has tensors that its configuration does not: {}": sorted(found - expected.keys()),
    }
    for kind in sorted({str(state[name].dtype) for name in present} - set(FLOATS)):
        text = f"{kind} numbers, where floating-point ones are needed, are in {{}}"
        problems[text] = [name for name in present if str(state[name].dtype) == kind]
    told = [text.format(few(names)) for text, names in problems.items() if names]
    for name in present:
        if tuple(state[name].shape) != expected[name]:
            told.append(f"{name} has shape {tuple(state[name].shape)}, but {expected[name]} is needed by its configuration")
    require(not told, "; ".join(told[:8]) + f"; and {len(told) - 8} more" * (len(told) > 8))
    if tied:
        for block in _blocks(0, *expected[HEAD]):
            head, embedding = (_finite(name, state[name][block, :]) for name in (HEAD, layout.embedding))
            require(np.array_equal(head, embedding), f"{HEAD} differs from {layout.embedding}, but the embedding is tied")


# -------------------------------------------------------------------------------------------------------- out


def tensors_of(model: LM, layout: Layout, rows: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, float32 array) of each tensor, with the first `rows` of the vocabulary and without a tied head."""
    return values_of(model, stored(model, layout, rows), layout)


def values_of(model: Any, tensors: Mapping[str, Stored], layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    """`tensors_of` for any module that fills `tensors`."""
    params = named_params(model)
    for name, tensor in tensors.items():
        values = [params[part.path][...] if part.layer is None else params[part.path][...][part.layer] for part in tensor.parts]
        parts = [np.asarray(value, np.float32) for value in values]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        yield name, _as_stored(layout, tensor.parts[0].path, whole)[tuple(slice(size) for size in tensor.shape)]


def require_fields(cfg: Model, layout: Layout) -> None:
    """UserError for the first field of a model whose value the family does not support."""
    for name, known in layout.fields.items():
        found = functools.reduce(getattr, name.split("."), cfg)
        shown = "set" if dataclasses.is_dataclass(found) else repr(found)
        require(found in known, f"model.{name} is {shown}, but {layout.family} has {' or '.join(map(repr, known))} alone")
