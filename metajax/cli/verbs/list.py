"""`list`: tables and experiments."""

from __future__ import annotations

import argparse

from metajax.cli.verb import verb


def add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="only names that contain this")


@verb("list", add_list)
def list_all(options: argparse.Namespace, started: float) -> int:
    """Tables and experiments with their scales and expected times.

    python run.py list                                       everything
    python run.py list hymba                                 names that contain hymba
    """
    from metajax.tables.listing import print_list

    print_list(options.pattern)
    return 0
