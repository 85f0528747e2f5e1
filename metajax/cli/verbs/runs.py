"""`runs`: what has been run."""

from __future__ import annotations

import argparse

from metajax.cli.arguments import add_place
from metajax.cli.verb import verb


@verb("runs", add_place)
def list_runs(options: argparse.Namespace, started: float) -> int:
    """The runs that exist.

    python run.py runs                                       all below --runs-dir
    python run.py runs --runs-dir DIR                        those below DIR
    """
    from metajax.reporting.terminal import print_runs

    print_runs(options.runs_dir)
    return 0
