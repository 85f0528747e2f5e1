"""`preflight`: before a run on several hosts."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from typing import Annotated, Any

from metajax import registry
from metajax.cli import arguments as checked
from metajax.cli import common
from metajax.cli.arguments import add_config, add_number, add_place, add_processes
from metajax.cli.verb import verb
from metajax.core.fields import Range
from metajax.core.progress import echo


def add_preflight(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="the experiment, whose configuration and data are compared")
    where = "where it will run: written and read back (--runs-dir)"
    parser.add_argument("--workdir", type=checked.workdir, metavar="DIR", help=where)
    add_number(parser, "--seconds", Annotated[float, Range(0.1, 86_400)], 10.0, "for each check", metavar="S")
    add_config(parser)
    add_processes(parser)
    add_place(parser)


@verb("preflight", add_preflight)
def preflight(options: argparse.Namespace, started: float) -> int:
    """Check hosts, code, data and storage before a run on several hosts.

    python run.py preflight NAME --workdir gs://BUCKET/runs/NAME
        on every host at about the same time
    python run.py preflight                                  this machine alone
    """
    from importlib.metadata import version

    from metajax.cli.preflight import preflight as check_all
    from metajax.config import config_hash
    from metajax.runs.directory import LIBRARIES, git_state

    facts: dict[str, Any] = {name: version(name) for name in LIBRARIES}
    facts |= {"Python": platform.python_version(), "code": git_state()}
    sources: Sequence[str] = ()
    if options.name is not None:
        config, _ = common.config_of(registry.find_experiment(options.name), options)
        facts["configuration"], sources = config_hash(config), config.data.sources
    arguments = {
        "coordinator": options.coordinator,
        "processes": options.processes,
        "process": options.process_id,
        "workdir": str(options.workdir or options.runs_dir),
        "sources": sources,
        "data_dir": options.data_dir and str(options.data_dir),
        "cache_dir": str(options.cache_dir),
        "facts": facts,
    }
    findings = check_all(arguments, options.seconds)
    for check, good, text in findings:
        echo(f"{'ok    ' if good else 'FAILED'}  {check:<11} {text}")
    return 0 if all(good for _, good, _ in findings) else 1
