"""Published checkpoints as run directories: what `generate` and `eval` open, without a training behind it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from metajax.config import Config, Data, Runtime, UserError, require
from metajax.data.tokenizers import Tokenizer, open_tokenizer
from metajax.interop.families import FAMILIES
from metajax.interop.files import open_directory
from metajax.interop.gguf_files import open_gguf, write_gguf_tokenizer
from metajax.interop.layouts import HEAD, Tensor, load_model
from metajax.parallel.mesh import make_mesh
from metajax.parallel.rules import param_shardings
from metajax.progress import warn
from metajax.reporting.records import RunDirectory, default_workdir, environment
from metajax.training.checkpoints import Checkpoints
from metajax.training.state import State

TOKENIZER_FILES = {"tokenizer.json": "hf", "tokenizer.model": "sentencepiece"}
ORIGIN = "imported.json"  # of the run: the config.json it came with, and whether a tied head did


def import_directory(family: str, folder: Path, runs: Path, tokenizer: str, workdir: Path | None = None) -> Path:
    """Write a model directory as a run at step 0 and return its workdir; weights go straight into the sharded layout.

    tokenizer: a tokenizer's spec, or "" for the file in the folder. The embedding is filled up with zeros to the tokenizer's table.

    Raises:
      UserError: a file, tensor or setting that is missing or that this model cannot follow; a workdir that holds something else.
    """
    values, tensors = open_directory(folder, family)
    return import_weights(family, folder.resolve().name, values, tensors, runs, tokenizer or _tokenizer_spec(folder), workdir)


def import_gguf(path: Path, runs: Path, cache: Path, tokenizer: str) -> Path:
    """The same of a Llama in a GGUF file, dequantised; the file's own tokenizer is written below `cache`."""
    values, tensors, fields = open_gguf(path)
    if not tokenizer:
        folder = cache.absolute() / "tokenizers" / f"gguf-{_digest(fields)}"
        if not folder.exists():
            write_gguf_tokenizer(fields, folder)
        tokenizer = f"hf:{folder / 'tokenizer.json'}"
    return import_weights("llama", path.stem, values, tensors, runs, tokenizer)


def _digest(fields: Mapping[str, Any]) -> str:
    own = {name: value for name, value in fields.items() if name.startswith("tokenizer.")}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]


def import_weights(
    family: str,
    name: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    runs: Path,
    spec: str,
    workdir: Path | None = None,
) -> Path:
    """The same of a config.json and tensors by their names."""
    words = open_tokenizer(spec, cache_dir=runs, data_dir=None, corpus_fingerprint="", texts=_no_texts)
    kind, tensors = FAMILIES[family], FAMILIES[family].names(tensors)
    model, length = kind.model_config(values), int(values.get(kind.length, 2048))
    config = Config(name=f"imported/{name}", data=Data(tokenizer=spec, row_length=length), model=model)
    mesh = make_mesh(Runtime.mesh)
    weights = load_model(
        tensors, model, kind.layout, vocab_size=words.vocabulary.size, max_length=length, runtime=config.runtime,
        shardings=lambda abstract: param_shardings(abstract, mesh),
    )  # fmt: skip
    rows = tensors[kind.layout.embedding].shape[0]
    if words.vocabulary.base > rows:
        warn(
            f"tokenizer {spec} has {words.vocabulary.base} tokens, the checkpoint {rows}: those from {rows} on have zero vectors"
        )
    origin = {"family": family, "config": dict(values), "rows": rows, "tied_head": model.tied and HEAD in tensors}
    return _write(config, words, weights, origin, workdir or default_workdir(config, runs))


def _write(config: Config, tokenizer: Tokenizer, model: Any, origin: dict[str, Any], workdir: Path) -> Path:
    require(not (workdir / "config.json").exists(), f"{workdir} is there already; delete it, or choose another --runs-dir")
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
    return workdir


def _tokenizer_spec(folder: Path) -> str:
    for name, kind in TOKENIZER_FILES.items():
        if (folder / name).exists():
            return f"{kind}:{(folder / name).absolute()}"
    raise UserError(f"{folder} has no {' and no '.join(TOKENIZER_FILES)}; copy one there, or name one with --tokenizer")


def _no_texts() -> list[str]:
    raise UserError("--tokenizer bpe:N would be trained on a corpus; name the checkpoint's own tokenizer")
