"""`plan`: the train step of an experiment compiled for a TPU slice that is absent."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Annotated

from metajax import registry
from metajax.cli import arguments as checked
from metajax.cli import common
from metajax.cli.arguments import add_config, add_number, add_place
from metajax.cli.verb import verb
from metajax.core.errors import require
from metajax.core.fields import Range


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="experiment; with --all: what names contain")
    parser.add_argument("--all", action="store_true", help="all experiments of the scale, one of each distinct program")
    slices = "such as v5e:4x4, v5p:2x2x2, v6e:8x8; with --all several, tried in this order until it fits (slices of v5p)"
    parser.add_argument("--topology", type=checked.word, metavar="KIND:SIZE", help=slices)
    size = Annotated[int, Range(1, 10**7)]
    add_number(parser, "--vocabulary", size, None, "tokens, if the tokenizer is a file of yours", "its own")
    parser.add_argument("--json", action="store_true", help="the plan as data")
    page = "write the plan also as a page with a picture of the memory"
    parser.add_argument("--html", type=checked.new_file, metavar="FILE", help=page)
    batch = "find the most rows that fit, by bisection: a compilation for each trial"
    parser.add_argument("--largest-batch", action="store_true", help=batch)
    cycles = "count the kernels' cycles too: each is compiled once more, alone"
    parser.add_argument("--schedules", action="store_true", help=cycles)
    add_config(parser)
    add_place(parser)


@verb("plan", add_plan)
def plan(options: argparse.Namespace, started: float) -> int:
    """Compile an experiment's train step for a TPU slice that is absent.

    python run.py plan learned_meta_tokens/pretrain/meta_rope --scale paper --topology v5e:8x8
        memory, collectives, kernels, least time
    python run.py plan hymba --all --scale paper             every distinct program of the names that contain hymba
    """
    require(options.all or bool(options.name and options.topology), "name an experiment and its --topology, or give --all")
    for name in ("json", "html", "largest_batch", "schedules", "changes") if options.all else ():
        flag = "--set" if name == "changes" else f"--{name.replace('_', '-')}"
        remedy = "which plans unchanged experiments; name one, or leave it out"
        require(not getattr(options, name), f"{flag} does not go with --all, {remedy}")
    from metajax.planning.topology import allow_compiler, parse_topology

    for topology in options.topology.split(",") if options.topology else ():
        parse_topology(topology)
    with tempfile.TemporaryDirectory(prefix="plan-") as dump:
        allow_compiler(Path(dump))
        from metajax.cli.plans import run_plan, run_survey

        if options.all:
            return run_survey(options, common.paths_of(options), Path(dump))
        config, parents = common.config_of(registry.find_experiment(options.name), options)
        return run_plan(options, config, parents, common.paths_of(options), Path(dump))
