"""Families of runs, such as text and images: finding the family of a saved config, and the identity of a run."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metajax.config.experiment import AnyConfig, Config
from metajax.core.errors import UserError
from metajax.core.fields import changed, field_types, flatten, from_dict

CONFIG_VERSION = 1  # part of every hash; raise it when a default changes
NOT_HASHED = ("name", "scale", "seed", "runtime")  # `runtime` changes no number; the others are in the run's path


def config_from(values: Mapping[str, Any]) -> AnyConfig:
    """The config of a saved `to_dict`, of the family that has most of its fields; UserError if that one lacks a field."""
    for file in Path(__file__).parents[1].glob("*/config.py"):  # a unit of metajax with a family has its config there
        importlib.import_module(f"metajax.{file.parent.name}.config")
    families = sorted(AnyConfig.__subclasses__(), key=lambda cls: len(values.keys() - field_types(cls)))
    return from_dict(families[0], values)


def require_text(config: AnyConfig, what: str) -> Config:
    """Return the config of a language model; raise UserError for another family, for which `what` is not available."""
    if isinstance(config, Config):
        return config
    raise UserError(f"{config.name} is a run on {config.family}; `{what}` is for language models")


def config_hash(config: AnyConfig) -> str:
    """Eight hex digits over the config version and the fields that differ from their defaults, except those of NOT_HASHED.

    A new field therefore renames no run. A changed default would give old hashes a new meaning, so raise CONFIG_VERSION with it.
    """
    identity = {name: value for name, value in changed(config).items() if name.partition(".")[0] not in NOT_HASHED}
    return hashlib.sha256(json.dumps([CONFIG_VERSION, identity], sort_keys=True).encode()).hexdigest()[:8]


def difference(a: AnyConfig, b: AnyConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted fields whose values differ, as (value in a, value in b); absent fields read as None."""
    fa, fb = flatten(a), flatten(b)
    return {k: (fa.get(k), fb.get(k)) for k in sorted(fa.keys() | fb.keys()) if fa.get(k) != fb.get(k)}
