"""The two families of runs, language models and images, and the one place that tells which config belongs to which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metajax.config.experiment import Config
from metajax.config.images import ImageConfig
from metajax.core.errors import require
from metajax.core.fields import from_dict

AnyConfig = Config | ImageConfig


def config_from(values: Mapping[str, Any]) -> AnyConfig:
    """The config of a saved `to_dict`; UserError for fields that neither family has."""
    return from_dict(ImageConfig if "images" in values else Config, values)


def require_text(config: AnyConfig, what: str) -> Config:
    """The config of a language model; UserError where `what` is asked of a run on images."""
    require(isinstance(config, Config), f"{config.name} is a run on images; `{what}` is for language models")
    return config
