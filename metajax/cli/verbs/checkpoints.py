"""`checkpoints`: list, verify and prune the checkpoints of a run."""

from __future__ import annotations

import argparse

from metajax.cli.arguments import add_number, add_place, add_run_word
from metajax.cli.verb import verb
from metajax.core.errors import require
from metajax.core.fields import Count
from metajax.core.progress import echo


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    add_run_word(parser)
    parser.add_argument("--verify", action="store_true", help="check every file against its hash; exit code 1 if one is damaged")
    keep = "newest checkpoints to keep; delete the others and the damaged ones"
    add_number(parser, "--prune", Count, None, keep, "delete none")
    add_place(parser)


@verb("checkpoints", add_checkpoints)
def list_checkpoints(options: argparse.Namespace, started: float) -> int:
    """A run's checkpoints: list, verify, prune.

    python run.py checkpoints RUN --verify                   check every file against its hash
    python run.py checkpoints RUN --prune 1                  keep only the newest good one
    """
    from metajax.runs.directory import RunDirectory, find_run, read_config
    from metajax.training.inventory import inventory, prune

    workdir = find_run(options.run, options.runs_dir)
    if options.prune is not None:
        run = RunDirectory.open(workdir, read_config(workdir))  # not while it is running
        for folder in prune(workdir, options.prune):
            echo(f"deleted {folder}")
        run.close()
    kept = inventory(workdir, options.verify)
    require(bool(kept), f"{workdir} has no checkpoint yet; run the experiment first")
    for one in kept:
        echo(f"step {one.step:>8}  {one.bytes / 1e6:10.1f} MB  {one.written}  {one.state}")
    return 1 if any(one.damaged for one in kept) else 0
