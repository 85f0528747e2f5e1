"""Hugging Face model directories: config.json with one safetensors file, or with shards and their index."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from metajax.core.errors import UserError, first_line, require
from metajax.core.sealed import HASHES
from metajax.interop.layouts import Tensor
from metajax.interop.settings import few, shown
from metajax.runs.files import find_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
KEPT = "imported_files.json"  # in an imported run: {name: text} of the other files in the source folder
# The files that are kept: settings, templates, vocabularies, the authors' code, model card and licence.
_KEPT_NAMES = re.compile(r".*\.(jinja|json|md|model|py|tiktoken|txt)|(?i:LICEN[CS]E|NOTICE|USE_POLICY).*", re.DOTALL)
_KEPT_BYTES = 1 << 26
TOKENIZER_CONFIG = "tokenizer_config.json"
_BASE64 = "\x00base64:"
DTYPES = {
    "float32": ("F32", np.dtype(np.float32)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),  # importing ml_dtypes also registers it with NumPy, which reading needs
    "float16": ("F16", np.dtype(np.float16)),
}


class Values(dict[str, Any]):
    """A JSON object; a missing key raises UserError for the file."""

    def __missing__(self, name: str) -> Any:
        raise UserError(f"the checkpoint's JSON lacks {name}: not a whole model directory, or one of another kind")


class _FileTensor:
    """A tensor of a safetensors file, read only when it is indexed."""

    def __init__(self, file: Any, name: str):
        self._slice = file.get_slice(name)
        self.shape, self.dtype = tuple(self._slice.get_shape()), self._slice.get_dtype()

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._slice[index]


def open_directory(folder: Path, model_type: str, spare: tuple[str, ...] = ()) -> tuple[Values, dict[str, Tensor]]:
    """(config.json, {name: tensor, not yet read}); UserError if something is missing, damaged or of another family.

    spare: name suffixes of tensors that an index may list although no file has them. A single file has precedence over an index.
    """
    config = read_json(folder / "config.json")
    found = config.get("model_type")
    require(found == model_type, f"{folder}/config.json: model_type is {shown(repr(found)[:200])}, not {model_type!r}")
    index, single = folder / INDEX, folder / WHOLE
    require(index.exists() or single.exists(), f"{folder} has no {WHOLE} and no {INDEX}; name a model directory")
    if single.exists():
        return config, open_tensors(single)
    tensors: dict[str, Tensor] = {}
    weight_map = read_json(index)["weight_map"]
    require(isinstance(weight_map, dict), f"{index}: weight_map is not a JSON object; fetch it again")
    for name, shard in weight_map.items():
        inside = isinstance(shard, str) and shard.isprintable() and Path(shard).name == shard
        require(inside, f"{index}: {shown(name)} is in {shown(repr(shard))}, not a file of this folder; fetch it again")
    for shard in sorted(set(weight_map.values())):
        file = folder / shard
        require(file.exists(), f"{folder} lacks the shard {shard} that {INDEX} names")
        held = open_tensors(file)
        lost = {name for name, place in weight_map.items() if place == shard and not name.endswith(spare)} - held.keys()
        require(not lost, f"{file} lacks {few(lost)}, which {INDEX} lists; fetch it again")
        tensors = joined(tensors, held, file)
    return config, tensors


def joined(tensors: Mapping[str, Any], more: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Tensors of one checkpoint with those of a further file; UserError if both have one of the same name."""
    twice = tensors.keys() & more.keys()
    require(not twice, f"{file} has {few(twice)}, which another part has too; fetch both again")
    return {**tensors, **more}


def open_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, not yet read."""
    try:
        file = safe_open(path, "np")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a safetensors file ({shown(first_line(error))}); fetch it again") from None
    return {name: _FileTensor(file, name) for name in file.keys()}  # noqa: SIM118 - the handle is no mapping


def read_json(path: Path) -> Values:
    """The object in a JSON file; UserError if it is not a JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a model directory") from None
    except (ValueError, RecursionError, OSError) as error:  # not JSON, not UTF-8, nested too deeply, not a file
        raise UserError(f"{path}: not JSON ({shown(first_line(error))}); fetch it again") from None
    require(isinstance(found, dict), f"{path}: not a JSON object; fetch it again")
    return Values(found)


def read_kept(folder: Path) -> dict[str, str]:
    """{name: text} of a model directory's files other than weights and config.json; base64 if a file is not UTF-8."""
    kept = {}
    for path in sorted(folder.iterdir()):
        wanted = _KEPT_NAMES.fullmatch(path.name) and path.name not in ("config.json", INDEX, HASHES)
        if wanted and path.is_file() and path.stat().st_size <= _KEPT_BYTES:
            content = path.read_bytes()
            try:
                kept[path.name] = content.decode()
            except UnicodeDecodeError:
                kept[path.name] = _BASE64 + base64.b64encode(content).decode()
    return kept


def write_kept(workdir: Path, folder: Path) -> None:
    """Write the files that a run has kept into a folder, byte for byte."""
    kept = find_json(workdir / KEPT) or {}
    for name, text in kept.items():
        sound = Path(name).name == name and isinstance(text, str)
        require(sound, f"{workdir / KEPT} is damaged; delete it, and export without these files")
        content = base64.b64decode(text.removeprefix(_BASE64)) if text.startswith(_BASE64) else text.encode()
        (folder / name).write_bytes(content)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(name)} appears twice")
    return found


def write_tensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterator[tuple[str, np.ndarray]], dtype: str, shard_bytes: int
) -> None:
    """Write one safetensors file, or an index and shards of at most `shard_bytes` (a larger tensor gets its own shard).

    tensors: in the order of `shapes`. Only one is in memory at a time, which the library's writer cannot do.
    """
    size = {name: math.prod(shape) * DTYPES[dtype][1].itemsize for name, shape in shapes.items()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(size[held] for held in shards[-1]) + size[name] > shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)] if len(shards) > 1 else [WHOLE]
    for name, held in zip(names, shards, strict=True):
        _write_file(folder / name, held, tensors, dtype)
    if len(shards) > 1:
        weight_map = {tensor: name for name, held in zip(names, shards, strict=True) for tensor in held}
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterator[tuple[str, np.ndarray]], dtype: str) -> None:
    """Write the length of the header in 8 bytes, the header as JSON, then the tensors in its order (the safetensors format)."""
    code, kind = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, shape in shapes.items():
            name, value = next(tensors)
            assert (name, value.shape) == (expected, shape), f"{name} {value.shape} instead of {expected} {shape}"
            file.write(np.ascontiguousarray(value, kind).reshape(-1).view(np.uint8).data)
