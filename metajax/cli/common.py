"""Functions that several verbs use: the config that a command asks for, the start of JAX, an opened run."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from metajax import registry
from metajax.config import AnyConfig, Config, Runtime, require_text
from metajax.core.fields import override
from metajax.core.progress import say


def paths_of(options: argparse.Namespace) -> Any:
    from metajax.data.pipeline import Paths

    return Paths(cache=options.cache_dir, data=options.data_dir, runs=options.runs_dir)


def config_of(experiment: registry.Experiment, options: argparse.Namespace) -> tuple[AnyConfig, tuple[AnyConfig, ...]]:
    """The experiment as this command asks for it, and the runs that it starts from, oldest first."""
    from metajax.runs.parents import parse_changes, resolve_parents

    changes = parse_changes(options.changes, options.runs_dir)
    config = override(experiment.build(options.scale), {**changes, "seed": options.seed})
    return resolve_parents(config, changes, options.runs_dir)


def start_jax(cache: Path) -> None:
    """Keep compiled programs between runs. Call this before the first use of a device."""
    import jax

    from metajax.core.compat import keep_programs
    from metajax.distributed.hosts import has_tpu

    # Without a chip, an installed TPU compiler would cost seconds and print many warnings.
    chips = has_tpu() or any(Path("/dev").glob("nvidia[0-9]*"))
    if not chips and find_spec("libtpu") and "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    keep_programs(cache / "jax")


def connect(options: argparse.Namespace) -> None:
    """Start JAX, and join the other processes of this run, if any."""
    start_jax(options.cache_dir)
    from metajax.distributed import hosts

    hosts.connect(hosts.find_place(options.coordinator, options.processes, options.process_id))


def config_of_run(options: argparse.Namespace) -> Config:
    """The config of the run that a command names, for the available devices."""
    from metajax.runs.directory import find_run, read_config

    config = require_text(read_config(find_run(options.run, options.runs_dir)), options.verb)
    return override(config, {"runtime.mesh": Runtime.mesh})


def open_run(options: argparse.Namespace) -> Any:
    """Open the newest checkpoint of the run that a command names."""
    start_jax(options.cache_dir)
    from metajax.runs.directory import find_run
    from metajax.training import opened

    workdir = find_run(options.run, options.runs_dir)
    say(f"run: {workdir}")
    return opened.open_run(workdir)
