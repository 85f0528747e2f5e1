"""`generate`: text from a run's newest checkpoint."""

from __future__ import annotations

import argparse
import sys
from typing import Annotated

from metajax.cli import common
from metajax.cli.arguments import add_number, add_place, add_run_word
from metajax.cli.verb import verb
from metajax.config import Guidance, Temperature, TopK, TopP
from metajax.core.fields import Range, Seed
from metajax.core.progress import echo


def add_generate(parser: argparse.ArgumentParser) -> None:
    add_run_word(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument("--context", metavar="TEXT", help="metadata before the prompt, between the context delimiters")
    markers = "read control tokens in prompt and context, such as a chat's turn markers, as tokens (as text)"
    parser.add_argument("--markers", action="store_true", help=markers)
    text = "with --context: 0 draws as without the context, 1 as with it, more than 1 goes further"
    add_number(parser, "--guidance", Guidance, None, text, "none", "G")
    add_number(parser, "--tokens", Annotated[int, Range(1, 2**20)], 64, "length of the continuation")
    add_number(parser, "--temperature", Temperature, 0.8, "0 takes the most likely token", metavar="T")
    add_number(parser, "--top-k", TopK, 0, "draw from so many most likely tokens; 0: from all")
    add_number(parser, "--top-p", TopP, 1.0, "draw from the fewest tokens that have this probability together", metavar="P")
    window = "newest keys that a drawn token sees in a window: W+1 as in training, W as in Hymba's released code (W+1)"
    parser.add_argument("--decode-window", choices=["W+1", "W"], default="W+1", help=window)
    add_number(parser, "--seed", Seed, 0, "of the sampling")
    add_place(parser)


@verb("generate", add_generate)
def generate(options: argparse.Namespace, started: float) -> int:
    """Text from a run's newest checkpoint.

    python run.py generate quickstart/plain --prompt "Return the"
        continue a prompt
    python run.py generate RUN --prompt "This package" --context "https://www.example.org/" --guidance 2
        after metadata, with guidance
    """
    from metajax.inference.decoding import Sampling
    from metajax.inference.forward import prepare
    from metajax.inference.generation import stream

    opened = common.open_run(options)
    model, config = prepare(opened.model, options.decode_window), opened.config
    pieces = stream(
        model,
        config,
        opened.tokenizer.marked() if options.markers else opened.tokenizer,
        [options.prompt],
        count=options.tokens,
        context=options.context,
        guidance=options.guidance,
        sampling=Sampling(options.temperature, options.top_k, options.top_p),
        seed=options.seed,
        stride=1 if sys.stdout.isatty() else config.row_positions,
    )
    echo(options.prompt, end="")
    for (piece,) in pieces:
        echo(piece, end="")
    echo()
    return 0
