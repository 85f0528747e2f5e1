"""`compare`: runs side by side."""

from __future__ import annotations

import argparse

from metajax.cli import arguments as checked
from metajax.cli.arguments import add_place
from metajax.cli.verb import verb
from metajax.core.errors import require


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=checked.word, metavar="RUN", help="two or more runs")
    add_place(parser)


@verb("compare", add_compare)
def compare(options: argparse.Namespace, started: float) -> int:
    """Runs side by side.

    python run.py compare quickstart/plain quickstart/metadata
        the fields that differ, and the results
    python run.py compare 1a2b3c4d-s0 1a2b3c4d-s1            two seeds of one run
    """
    from metajax.reporting.terminal import print_comparison
    from metajax.runs.directory import find_run

    require(len(options.runs) >= 2, "compare needs at least two runs")
    print_comparison([find_run(word, options.runs_dir) for word in options.runs])
    return 0
