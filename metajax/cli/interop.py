"""The verbs `import` and `export`: their arguments, and what they do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Any

from metajax.cli.arguments import add_number, word
from metajax.core.fields import Range
from metajax.core.progress import say

FAMILIES = ("hymba", "gpt2", "llama")
EXAMPLES = """examples:
  python run.py import hymba DIR                    Hymba's released folder as a run
  python run.py import llama DIR --tokenizer sentencepiece:tokenizer.model
  python run.py import gguf MODEL.gguf              a quantised Llama, its tokenizer included
  python run.py generate imported/NAME --prompt "The capital of France is" --temperature 0
  python run.py export gpt2 RUN DIR                 for programs that read Hugging Face folders
  python run.py export hymba RUN DIR --dtype bfloat16 --shard-gb 2
"""


def add_import(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Its own arguments."""
    parser.epilog = EXAMPLES
    parser.add_argument("family", choices=[*FAMILIES, "gguf"], help="whose layout it has; gguf: a Llama in one file")
    parser.add_argument("source", type=Path, metavar="DIR|FILE", help="config.json, safetensors and a tokenizer, or a .gguf file")
    parser.add_argument("--tokenizer", default="", metavar="SPEC", help="such as sentencepiece:FILE (the checkpoint's own)")
    return parser


def add_export(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Its own arguments."""
    parser.epilog = EXAMPLES
    parser.add_argument("family", choices=FAMILIES, help="whose layout to write; what has no place in it is refused by name")
    parser.add_argument("run", type=word, metavar="RUN", help="workdir, its prefix, or an experiment's name (its newest run)")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder: config.json, safetensors, tokenizer")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights (float32)")
    size = Annotated[float, Range(1e-6, 1e6)]
    add_number(parser, "--shard-gb", size, 5.0, "10^9 bytes of the largest file; more become shards", metavar="GB")
    return parser


def run_import(options: argparse.Namespace) -> None:
    """A published checkpoint as a run."""
    from metajax.interop.imports import import_directory, import_gguf

    if options.family == "gguf":
        workdir = import_gguf(options.source, options.runs_dir, options.cache_dir, options.tokenizer)
    else:
        workdir = import_directory(options.family, options.source, options.runs_dir, options.tokenizer)
    say(f"imported as {workdir}")


def run_export(options: argparse.Namespace, opened: Any) -> None:
    """A run that was opened, as a model directory."""
    from metajax.interop.exports import export_run

    export_run(opened, options.family, options.folder, options.dtype, round(options.shard_gb * 1e9))
    say(f"exported to {options.folder}")
