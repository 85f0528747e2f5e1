"""Metrics of a run: metrics.jsonl always, TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from metajax.atomic import strict, write_text
from metajax.config import Config, to_dict
from metajax.progress import shown


class MetricsFile:
    """metrics.jsonl, one JSON object a line. Opening it at step s drops the lines after s, which will be made again."""

    def __init__(self, path: Path, start_step: int):
        kept = [line for line in read_lines(path) if line["step"] <= start_step] if path.exists() else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(path, "a")  # noqa: SIM115 - held for the life of the run

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(strict(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file; a last line cut off by a kill is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Loggers:
    """Where scalars go besides the file."""

    def __init__(self, config: Config, workdir: Path, start_step: int):
        self._tensorboard, self._wandb = None, None
        if "tensorboard" in config.runtime.loggers:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        if "wandb" in config.runtime.loggers:
            import wandb

            self._wandb = wandb.init(
                project="metajax", name=shown(f"{config.name}-s{config.seed}", keep=""), dir=str(workdir), config=to_dict(config), resume="allow",
                id=f"{workdir.parent.parent.name}-{workdir.name}".replace("/", "-"),
            )  # fmt: skip

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(shown(name, keep=""), value, step)
        if self._wandb is not None:
            self._wandb.log({shown(name, keep=""): value for name, value in scalars.items()}, step=step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class Nowhere:
    """In place of either in the processes that do not write."""

    def write(self, *_: Any) -> None: ...

    def close(self) -> None: ...


def memory_use() -> dict[str, float]:
    """{hbm_gib, hbm_share} of the fullest device of this process at its peak; {} where the backend does not tell."""
    found = [stats for device in jax.local_devices() if (stats := device.memory_stats()) and "bytes_limit" in stats]
    if not found:
        return {}
    peak, limit = max((stats["peak_bytes_in_use"], stats["bytes_limit"]) for stats in found)
    return {"hbm_gib": peak / 2**30, "hbm_share": peak / limit}
