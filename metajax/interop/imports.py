"""Imported checkpoints as run directories: what `generate` and `eval` open, without a training behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from metajax.config import Config, Data, UserError, config_hash, require, to_dict
from metajax.data.tokenizers import Tokenizer, open_tokenizer
from metajax.interop.hymba import from_hymba, model_config, open_directory
from metajax.parallel.rules import param_shardings
from metajax.progress import warn
from metajax.reporting.records import RunDirectory, default_workdir, environment
from metajax.training.checkpoints import Checkpoints
from metajax.training.program import Program
from metajax.training.state import State

TOKENIZER_FILES = {"tokenizer.json": "hf", "tokenizer.model": "sentencepiece"}


def import_hymba(folder: Path, runs: Path, tokenizer: str, workdir: Path | None = None) -> Path:
    """Write a Hymba model directory as a run at step 0 and return its workdir; weights go straight into the sharded layout.

    tokenizer: a tokenizer's spec, or "" for the file in the folder. The embedding is filled up with zeros to the tokenizer's table.

    Raises:
      UserError: a file, tensor or setting that is missing or that this model cannot follow; a workdir that holds something else.
    """
    values, tensors = open_directory(folder)
    spec = tokenizer or _tokenizer_spec(folder)
    words = open_tokenizer(spec, cache_dir=runs, data_dir=None, corpus_fingerprint="", texts=_no_texts)
    model, length = model_config(values), int(values.get("max_position_embeddings", 2048))
    config = Config(name=f"imported/{folder.resolve().name}", data=Data(tokenizer=spec, row_length=length), model=model)
    program = Program.build(config, words.vocabulary.size, jax.devices()[:1])
    shardings = lambda abstract: param_shardings(abstract, program.mesh)  # noqa: E731
    weights = from_hymba(tensors, model, vocab_size=words.vocabulary.size, runtime=config.runtime, shardings=shardings)
    rows = tensors["model.embed_tokens.weight"].shape[0]
    if words.vocabulary.base > rows:
        warn(
            f"tokenizer {spec} has {words.vocabulary.base} tokens, the checkpoint {rows}: those from {rows} on have zero vectors"
        )
    return _write(config, words, weights, workdir or default_workdir(config, runs))


def _write(config: Config, tokenizer: Tokenizer, model: Any, workdir: Path) -> Path:
    require(not (workdir / "config.json").exists(), f"{workdir} is there already; delete it, or choose another --workdir")
    run = RunDirectory.open(workdir, config)
    try:
        run.write("config.json", {"hash": config_hash(config), "config": to_dict(config)})
        run.write("environment.json", environment())
        tokenizer.save(workdir)
        checkpoints = Checkpoints(workdir, keep=1)
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
