"""Metrics of a run: metrics.jsonl always, TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from metajax.config import AnyConfig
from metajax.core.atomic import strict, write_text
from metajax.core.fields import to_dict
from metajax.core.progress import shown, warn
from metajax.core.storage import home
from metajax.runs.files import DIGEST, Mark, mark_of, parse_lines, read_json, recall, set_aside, write_json


class MetricsFile:
    """metrics.jsonl, one JSON object per line. Opening it at step s drops the lines after s, which training writes again.

    `mark` is that of the lines up to s in the checkpoint; None if an earlier version wrote it. `on_warning` reports lost lines.
    """

    def __init__(self, path: Path, start_step: int, mark: Mark | None = None, on_warning: Callable[[str], None] = warn):
        kept = _lines_until(path, start_step, mark, on_warning) if start_step else b""
        write_text(path, kept.decode())
        self._mark, self._hash = mark_of(kept), hashlib.sha256(kept)
        self._file = open(path, "ab")  # noqa: SIM115 - held for the life of the run

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(strict(record)).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._hash.update(line)
        self._mark = {"lines": self._mark["lines"] + 1, "bytes": self._mark["bytes"] + len(line)}

    def mark(self) -> Mark:
        """Write all lines to disk and return their mark, for a checkpoint."""
        os.fsync(self._file.fileno())
        return {**self._mark, DIGEST: self._hash.hexdigest()}

    def close(self) -> None:
        self._file.close()


def _lines_until(path: Path, step: int, mark: Mark | None, on_warning: Callable[[str], None]) -> bytes:
    """The lines of a metrics file up to a step; if they were changed later, those that can still be read."""
    data = path.read_bytes() if path.is_file() else b""
    if mark is not None and mark_of(data[: mark["bytes"]]) == mark:
        return data[: mark["bytes"]]
    records, unread = parse_lines(data)
    once = {(record["step"], *record): record for record in records if 0 < record["step"] <= step}
    trained = {record["step"] for record in once.values() if {"loss", "left_out"} & record.keys()}
    kept = b"".join(json.dumps(record).encode() + b"\n" for record in once.values())
    whole = not unread and len(trained) == step and len(once) == sum(record["step"] <= step for record in records)
    if mark is not None or not whole:
        if path.exists():
            set_aside(path)
        lost = f"{step - len(trained)} of these steps are missing, {len(unread)} lines cannot be read"
        where = f"curves show what is left; the file is kept in {path.parent / 'damaged'}"
        on_warning(f"{path} is not what was written until step {step}: {lost}; {where}")
    return kept


class Loggers:
    """Loggers that get the scalars in addition to the file."""

    def __init__(self, config: AnyConfig, workdir: Path, start_step: int):
        self._tensorboard, self._wandb = None, None
        if "tensorboard" in config.runtime.loggers:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        if "wandb" in config.runtime.loggers:
            import wandb

            name, folder = shown(f"{config.name}-s{config.seed}", keep=""), str(workdir)
            which = {"project": "metajax", "name": name, "id": logger_id(workdir), "resume": "allow"}
            self._wandb = wandb.init(**which, dir=folder, config=to_dict(config))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        scalars = {shown(name, keep=""): value for name, value in scalars.items()}
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def logger_id(workdir: Path) -> str:
    """The id of a run in Weights & Biases: made once and stored in its folder; a copy of the folder gets another id."""
    path, here = workdir / "wandb.json", home(workdir)
    saved = recall(path, warn, "Weights & Biases gets a new curve")
    if saved is not None and saved["folder"] != str(here):
        there = type(here)(saved["folder"]) / path.name
        moved = not there.exists() or (str(there).startswith("/") and os.path.samefile(there, path))
        saved = saved if moved or read_json(there).get("id") != saved["id"] else None
    made = {"id": saved["id"] if saved else secrets.token_hex(6), "folder": str(here)}
    if made != saved:
        write_json(path, made)
    return made["id"]


class Nowhere:
    """Replaces `MetricsFile` and `Loggers` in processes that do not write."""

    def write(self, *_: Any) -> None: ...

    def mark(self) -> None: ...

    def close(self) -> None: ...


def memory_use() -> dict[str, float]:
    """{hbm_gib, hbm_share} at the peak of the fullest device of this process; {} if the backend does not report it."""
    found = [stats for device in jax.local_devices() if (stats := device.memory_stats()) and "bytes_limit" in stats]
    if not found:
        return {}
    peak, limit = max((stats["peak_bytes_in_use"], stats["bytes_limit"]) for stats in found)
    return {"hbm_gib": peak / 2**30, "hbm_share": peak / limit}
