"""Checks the names in a config that registries of `metajax.data` hold."""

from __future__ import annotations

from metajax.config import Config
from metajax.data.positions import spots
from metajax.data.tasks import task


def check_names(config: Config) -> None:
    """Raise UserError for an unknown synthetic task or metadata position."""
    for name in config.tasks.names if config.tasks is not None else ():
        task.find(name, "tasks.names")
    if config.metadata is not None:
        spots(config.metadata)
