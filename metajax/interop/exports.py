"""Exports runs as Hugging Face model directories: config.json, safetensors and the tokenizer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from metajax.config import Config
from metajax.core.atomic import whole_folder
from metajax.core.errors import require
from metajax.core.progress import warn
from metajax.data.tokenizers import load as load_tokenizer
from metajax.interop.families import FAMILIES, Family
from metajax.interop.files import DTYPES, write_kept, write_tensors
from metajax.interop.layouts import HEAD, stored, tensors_of
from metajax.interop.tokenizer_files import write_tokenizer
from metajax.runs.directory import ORIGIN, read_config
from metajax.runs.files import find_json
from metajax.training.opened import OpenedRun

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_run(opened: OpenedRun, family: str, folder: Path, dtype: str = "float32", shard_bytes: int = 5 * 10**9) -> None:
    """Write a run as a model directory, tensor by tensor. The folder appears only when it is complete.

    An imported run keeps its original rows, token ids and tied or untied head.

    Raises:
      UserError: the family's layout cannot represent a part of the run, which is named; or the folder is not empty.
    """
    require(dtype in DTYPES, f"--dtype {dtype}: unknown; known: {', '.join(DTYPES)}")
    require(not folder.exists() or not any(folder.iterdir()), f"{folder} is not empty; name a new folder")
    kind, config, words = FAMILIES[family], opened.config, opened.tokenizer.vocabulary
    _require_plain(config, kind)
    (origin, came_from), imported = _origin(opened, family), config.imported
    rows, length = words.size if imported is None else imported.last, max(config.row_positions, config.model.max_positions)
    ids = origin["config"] if origin else dict(zip(_IDS, (words.bos, words.eos, words.pad), strict=True))
    values = _config_values(kind.hub_config(config.model, length), origin) | {name: ids[name] for name in _IDS if name in ids}
    values["vocab_size"] = rows
    values |= {"dtype" if "dtype" in values else "torch_dtype": dtype}
    model, head = kind.fit(opened.model), bool(origin.get("tied_head"))
    shapes = {name: tensor.shape for name, tensor in stored(model, kind.layout, rows).items()}
    zeros, tensors = kind.zeros(model), tensors_of(model, kind.layout, rows)
    if head:
        shapes[HEAD] = shapes[kind.layout.embedding]
        tensors = itertools.chain(tensors, [(HEAD, np.asarray(model.embedding[...][:rows], np.float32))])
    values |= dict.fromkeys(zeros, False)
    omitted = tuple(itertools.chain(*zeros.values()))
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith(omitted)}
    tensors = ((name, value) for name, value in tensors if name in shapes)
    with whole_folder(folder) as work:
        write_tensors(work, shapes, tensors, dtype, shard_bytes)
        write_tokenizer(opened.tokenizer, work, rows, length)
        if origin:
            write_kept(came_from, work)
        (work / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _require_plain(config: Config, kind: Family) -> None:
    """UserError if the run has something besides its model's fields that the layout cannot represent."""
    meta = config.meta_tokens
    if meta is None:
        return
    lacks = f"{kind.layout.family} has no meta-attention and no vectors for meta-tokens: this run cannot be exported"
    for name, plain in (("attention", "none"), ("embedding", "learned"), ("zero_position", "none")):
        require(getattr(meta, name) == plain, f"meta_tokens.{name} is {getattr(meta, name)!r}, but {lacks}")
    if meta.rate:
        warn(f"training put meta-tokens into the text (meta_tokens.rate = {meta.rate}); programs that read the export will not")


def _origin(opened: OpenedRun, family: str) -> tuple[dict[str, Any], Path]:
    """(origin of the imported run that this run is or descends from, its folder); {} if none or if tokenizer or family differ."""
    folder, config = opened.workdir.absolute(), opened.config
    while not (folder / ORIGIN).exists() and config.init.run:
        parents = [above / config.init.run for above in folder.parents]
        folder = next((parent for parent in parents if (parent / "config.json").exists()), None)
        if folder is None:
            warn(f"init.from: {config.init.run} is gone; the export lacks its chat template and other files, if it had any")
            return {}, opened.workdir
        config = read_config(folder)
    origin = find_json(folder / ORIGIN) or {}
    same = origin.get("family") == family and load_tokenizer(folder).fingerprint() == opened.tokenizer.fingerprint()
    return (origin if same else {}), folder


def _config_values(ours: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """config.json: the original values updated with the model's own; the rotary settings keep their original form."""
    came: dict[str, Any] = origin.get("config", {})
    kept = ("architectures", "auto_map", "transformers_version", "use_cache")
    constant = {name: came[name] for name in kept if came.get(name) is not None}
    rotary = {"rope_theta": ours.get("rope_theta"), **(ours.get("rope_scaling") or {"rope_type": "default"})}
    return came | ours | constant | ({"rope_parameters": rotary, "rope_scaling": None} if came.get("rope_parameters") else {})
