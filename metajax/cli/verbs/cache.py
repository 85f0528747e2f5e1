"""`cache`: tokenise the corpora of an experiment once."""

from __future__ import annotations

import argparse
import functools
import os

from metajax import registry
from metajax.cli import common
from metajax.cli.arguments import Jobs, add_config, add_number, add_place
from metajax.cli.verb import verb
from metajax.core.progress import echo


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="experiment, whose data.sources and data.tokenizer count")
    makers = parser.add_mutually_exclusive_group()
    add_number(makers, "--workers", Jobs, os.cpu_count(), "processes", "one for each core")
    beam_help = "use Apache Beam instead; all that follows are options of its runner: docs/data.md"
    makers.add_argument("--beam", nargs=argparse.REMAINDER, metavar="OPTION", help=beam_help)
    parser.add_argument("--measure", action="store_true", help="measure how fast one core reads, makes rows and tokenises")
    add_config(parser)
    add_place(parser)


@verb("cache", add_cache)
def cache(options: argparse.Namespace, started: float) -> int:
    """Tokenise an experiment's corpora once, with several processes; resumable.

    python run.py cache quickstart/metadata --workers 2      tokenise what it reads
    python run.py cache quickstart/metadata --measure        how fast one core reads it
    """
    from metajax.data import beam, tokenising
    from metajax.data.pipeline import open_corpora
    from metajax.reporting.feeding import feeding
    from metajax.reporting.terminal import print_cache

    local = functools.partial(tokenising.in_processes, workers=options.workers)
    make = local if options.beam is None else functools.partial(beam.on_beam, options=options.beam)
    config, _ = common.config_of(registry.find_experiment(options.name), options)
    corpora = open_corpora(config, common.paths_of(options), make)
    for found in corpora.caches:
        print_cache(found)
    if options.measure:
        echo("one core: " + ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in feeding(corpora).items()))
    return 0
