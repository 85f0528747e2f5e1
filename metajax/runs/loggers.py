"""Check whether the loggers of a run can log, before anything is computed, without a network or a prompt."""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from metajax.core.errors import UserError, require


def check_loggers(names: Iterable[str]) -> None:
    """Raise UserError if Weights & Biases is among the loggers and would ask for a key."""
    if "wandb" not in names:
        return
    require(find_spec("wandb") is not None, "runtime.loggers names wandb, which is not installed; pip install wandb")
    remedy = "wandb login, or WANDB_API_KEY; WANDB_MODE=offline needs none"
    try:
        ready = _settings("mode") in ("offline", "dryrun", "disabled") or _has_key()
    except (OSError, configparser.Error, netrc.NetrcParseError) as error:
        raise UserError(f"runtime.loggers names wandb, whose settings cannot be read ({error}): {remedy}") from None
    require(ready, f"runtime.loggers names wandb, but there is no key: {remedy}")


def _settings(name: str) -> str:
    """Settings of Weights & Biases, from the environment or else from its settings files."""
    if f"WANDB_{name.upper()}" in os.environ:
        return os.environ[f"WANDB_{name.upper()}"]
    home = Path(os.environ.get("WANDB_CONFIG_DIR", Path.home() / ".config" / "wandb"))
    found = configparser.ConfigParser(interpolation=None)
    found.read([home / "settings", Path("wandb", "settings")])
    return found.get("default", name, fallback="")


def _has_key() -> bool:
    if _settings("api_key") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(_settings("base_url") or "https://api.wandb.ai").hostname or ""
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else [Path.home() / ".netrc", Path.home() / "_netrc"]
    return any(os.path.exists(file) and netrc.netrc(file).authenticators(host) is not None for file in files)
