"""Imports published checkpoints as run directories, which `generate` and `eval` open like trained runs."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from metajax.config import Config, Data, Imported, Runtime
from metajax.core.errors import UserError, require
from metajax.core.progress import warn
from metajax.core.sealed import FORMAT, Sealed
from metajax.data.encoding import Tokenizer
from metajax.data.tokenizers import Gpt2, HuggingFace, open_tokenizer
from metajax.distributed.mesh import make_mesh
from metajax.distributed.rules import param_shardings
from metajax.interop.families import FAMILIES
from metajax.interop.files import KEPT, TOKENIZER_CONFIG, open_directory, read_json, read_kept
from metajax.interop.gguf_files import open_gguf, write_gguf_tokenizer
from metajax.interop.layouts import HEAD, Tensor, load_model, table_rows
from metajax.interop.settings import shown
from metajax.interop.tokenizer_files import as_library
from metajax.runs.directory import ORIGIN, RunDirectory, default_workdir, environment
from metajax.runs.files import write_json
from metajax.training.checkpoints import Checkpoints
from metajax.training.state import State

TOKENIZER_FILES = {"tokenizer.json": "hf", "tokenizer.model": "sentencepiece"}


def import_directory(family: str, folder: Path, runs: Path, tokenizer: str, workdir: Path | None = None) -> Path:
    """Write a model directory as a run at step 0 and return its workdir. Weights are loaded directly into the sharded layout.

    tokenizer: a tokenizer's spec, or "" for the file in the folder. The embedding is padded to the tokenizer's table with the
      mean of its rows. No softmax includes these rows, but training may start from them with ids unknown to the checkpoint.

    Raises:
      UserError: a file, tensor or setting is missing or not supported by this model; the workdir holds something else.
    """
    values, tensors = open_directory(folder, family, (HEAD, *FAMILIES[family].layout.buffers))
    generation, kept = folder / "generation_config.json", read_kept(folder)
    ends = (*end_ids(values), *(end_ids(read_json(generation)) if generation.exists() else ()))
    spec, name = tokenizer or _tokenizer_spec(folder), folder.resolve().name
    return _import_weights(family, name, values, tensors, runs, spec, ends, kept, workdir)


def import_gguf(path: Path, runs: Path, cache: Path, tokenizer: str) -> Path:
    """Import a Llama from a GGUF file, dequantised; see `import_directory`. The file's tokenizer is written below `cache`."""
    values, tensors, fields = open_gguf(path)
    folder = None
    if not tokenizer:
        own = {name: value for name, value in fields.items() if name.startswith("tokenizer.")}
        digest = hashlib.sha256(json.dumps([FORMAT, own], sort_keys=True).encode()).hexdigest()
        folder = cache.absolute() / "tokenizers" / f"gguf2-{digest[:12]}"
        if not folder.exists():
            write_gguf_tokenizer(fields, folder)
        tokenizer = f"hf:{Sealed(folder).check().folder / 'tokenizer.json'}"
    kept = read_kept(folder) if folder else {}
    return _import_weights("llama", path.stem, values, tensors, runs, tokenizer, end_ids(values), kept)


def end_ids(values: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids in `eos_token_id` of a config.json or generation_config.json, which is a number, a list or absent."""
    found = values.get("eos_token_id")
    ids = tuple(found) if isinstance(found, list) else () if found is None else (found,)
    require(
        all(type(i) is int for i in ids), f"eos_token_id = {repr(found)[:200]}: it has to be a number, a list of numbers or null"
    )
    return ids


def _import_weights(
    family: str,
    name: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    runs: Path,
    spec: str,
    ends: Sequence[int],
    kept: Mapping[str, str],
    workdir: Path | None = None,
) -> Path:
    """`import_directory` from config.json values and named tensors. ends: ids that end a text besides the tokenizer's EOS."""
    words = open_tokenizer(spec, cache_dir=runs, data_dir=None, corpus_fingerprint="", texts=_no_texts)
    kind, tensors = FAMILIES[family], FAMILIES[family].names(tensors, values)
    model, rows = kind.model_config(values), table_rows(tensors, kind.layout)
    length = model.max_positions or int(values.get(kind.length) or 2048)
    named = values.get("vocab_size") or rows
    require(named == rows, f"config.json: vocab_size = {shown(repr(named))}, but {kind.layout.embedding} has {rows} rows")
    sizes = f"tokenizer {spec} has {words.vocabulary.base} tokens, the checkpoint {rows}"
    require(words.vocabulary.base <= 2 * rows + 1024, f"{sizes}: name the checkpoint's own with --tokenizer")
    ends = [i for i in dict.fromkeys(ends) if 0 <= i < rows]
    words = _with_ends(words, values.get("bos_token_id"), ends[0] if ends else None)
    if words.vocabulary.eos < rows:
        ends = dict.fromkeys([*ends, words.vocabulary.eos])
    imported = Imported(rows, ends=tuple(ends), opens=_puts_bos(words))
    config = Config(name=f"imported/{name}", data=Data(tokenizer=spec, sequence_length=length), model=model, imported=imported)
    spread = functools.partial(param_shardings, mesh=make_mesh(Runtime.mesh))
    options = {"vocab_size": imported.table(words.vocabulary.size), "max_length": length, "runtime": config.runtime}
    weights = load_model(tensors, model, kind.layout, **options, shardings=spread)
    for table in filter(None, (weights.embedding, weights.unembedding)):
        table.set_value(_fill_up(table[...], rows))
    if words.vocabulary.base > rows:
        warn(f"{sizes}: text with those from {rows} on has no loss")
    if words.vocabulary.bos >= rows:
        warn(f"config.json and tokenizer {spec} name no token that begins or ends a text: an untrained vector is used for it")
    origin = {"family": family, "config": dict(values), "rows": rows, "ends": list(ends)}
    origin["tied_head"] = model.tied and HEAD in tensors
    workdir = workdir or default_workdir(config, runs)
    _write(config, words, weights, origin, workdir)
    write_json(workdir / KEPT, kept)
    return workdir


def _with_ends(words: Tokenizer, bos: int | None, eos: int | None) -> Tokenizer:
    """The tokenizer with the BOS and EOS of the checkpoint's config, if the tokenizer's own files do not name them."""
    if not isinstance(words, HuggingFace):
        return words
    known, (text, *named) = as_library(words).id_to_token, json.loads(words.content())
    for n, token in enumerate((bos, eos)):
        named[n] = named[n] or (known(token) if token in range(words.vocabulary.base) else None)
    found = HuggingFace.from_content(words.spec, json.dumps([text, *named]))
    if found.vocabulary.bos >= words.vocabulary.base > found.vocabulary.eos:  # without a BOS, a text begins with the EOS
        named[0] = known(found.vocabulary.eos)
        found = HuggingFace.from_content(words.spec, json.dumps([text, *named]))
    return found


def _puts_bos(words: Tokenizer) -> bool:
    """Whether other programs put BOS before a prompt, from tokenizer_config.json or else from the tokenizer."""
    kind, _, name = words.spec.partition(":")
    beside = (Path(name) if Path(name).is_dir() else Path(name).parent) / TOKENIZER_CONFIG
    told = read_json(beside).get("add_bos_token") if kind in ("hf", "sentencepiece", "gpt2") and beside.is_file() else None
    if isinstance(told, bool):
        return told
    if isinstance(words, HuggingFace):
        return as_library(words).encode("").ids[:1] == [words.vocabulary.bos]
    return not isinstance(words, Gpt2)


def _fill_up(table: jax.Array, rows: int) -> jax.Array:
    """The table with the mean of its first `rows` rows in all other rows, updated in place with the same sharding."""

    def fill(table: jax.Array) -> jax.Array:
        return jnp.where(jnp.arange(len(table))[:, None] < rows, table, jnp.mean(table[:rows], axis=0))

    return jax.jit(fill, donate_argnums=0, out_shardings=table.sharding)(table) if len(table) > rows else table


def _write(config: Config, tokenizer: Tokenizer, model: Any, origin: dict[str, Any], workdir: Path) -> None:
    require(not (workdir / "config.json").exists(), f"{workdir} already exists; delete it, or choose another --runs-dir")
    run = RunDirectory.open(workdir, config)
    try:
        run.data = {"tokenizer": tokenizer.fingerprint()}
        run.write_config()
        run.write("environment.json", environment())
        run.write(ORIGIN, origin)
        tokenizer.save(workdir)
        checkpoints = Checkpoints(workdir, keep=1, identity=run.identity)
        checkpoints.save(State(model, (), jnp.zeros((), jnp.int32), jnp.zeros((), bool)), {"imported": True})
        checkpoints.close()
    finally:
        run.close()


def _tokenizer_spec(folder: Path) -> str:
    for name, kind in TOKENIZER_FILES.items():
        if (folder / name).exists():
            return f"{kind}:{(folder / name).absolute()}"
    raise UserError(f"{folder} has no {' and no '.join(TOKENIZER_FILES)}; copy one there, or name one with --tokenizer")


def _no_texts() -> list[str]:
    raise UserError("--tokenizer bpe:N would be trained on a corpus; name the checkpoint's own tokenizer")
