"""`import` and `export`: published checkpoints as runs, and runs as Hugging Face folders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated

from metajax.cli import common
from metajax.cli.arguments import add_number, add_place, add_run_word
from metajax.cli.verb import verb
from metajax.core.fields import Range
from metajax.core.progress import say

FAMILIES = ("hymba", "gpt2", "llama")


def add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", choices=[*FAMILIES, "gguf"], help="whose layout it has; gguf: a Llama in one file")
    parser.add_argument("source", type=Path, metavar="DIR|FILE", help="config.json, safetensors and a tokenizer, or a .gguf file")
    parser.add_argument("--tokenizer", default="", metavar="SPEC", help="such as sentencepiece:FILE (the checkpoint's own)")
    add_place(parser)


@verb("import", add_import)
def import_model(options: argparse.Namespace, started: float) -> int:
    """A published checkpoint as a run.

    python run.py import hymba DIR                           Hymba's released folder as a run
    python run.py import llama DIR --tokenizer sentencepiece:tokenizer.model
        with a tokenizer of your own
    python run.py import gguf MODEL.gguf                     a quantised Llama with its tokenizer
    """
    common.start_jax(options.cache_dir)
    from metajax.interop.imports import import_directory, import_gguf

    if options.family == "gguf":
        workdir = import_gguf(options.source, options.runs_dir, options.cache_dir, options.tokenizer)
    else:
        workdir = import_directory(options.family, options.source, options.runs_dir, options.tokenizer)
    say(f"imported as {workdir}")
    return 0


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", choices=FAMILIES, help="whose layout to write; what has no place in it is refused by name")
    add_run_word(parser)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder: config.json, safetensors, tokenizer")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights (float32)")
    size = Annotated[float, Range(1e-6, 1e6)]
    add_number(parser, "--shard-gb", size, 5.0, "10^9 bytes of the largest file; more become shards", metavar="GB")
    add_place(parser)


@verb("export", add_export)
def export_model(options: argparse.Namespace, started: float) -> int:
    """A run's newest checkpoint as a Hugging Face folder.

    python run.py export gpt2 RUN DIR                        for programs that read Hugging Face folders
    python run.py export hymba RUN DIR --dtype bfloat16 --shard-gb 2
        in shards
    """
    from metajax.interop.exports import export_run

    opened = common.open_run(options)
    export_run(opened, options.family, options.folder, options.dtype, round(options.shard_gb * 1e9))
    say(f"exported to {options.folder}")
    return 0
