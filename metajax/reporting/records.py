"""The run directory: what a run writes, who may write there, and how runs are found again.

config.json (resolved, with its hash), environment.json, data.json, metrics.jsonl, checkpoints/, report.json, report.html;
failure.log where a table saw the run fail.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from metajax.atomic import strict, write_text
from metajax.buckets import SCHEME, fill, home, outages, publish, stage
from metajax.config import UserError, config_hash, difference, nearest, require, to_dict
from metajax.families import AnyConfig, config_from
from metajax.progress import warn

RUN_LOG = "run.log"  # of a run that is made beside others
FAILURE_LOG = "failure.log"  # of a row that failed in a table; it may be there before the run is
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


def default_workdir(config: AnyConfig, root: Path) -> Path:
    """ROOT/NAME/SCALE/HASH8-sSEED."""
    return root / config.name / config.scale / f"{config_hash(config)}-s{config.seed}"


def write_json(path: Path, value: Any) -> None:
    """Write JSON, the old file or the new one whole."""
    write_text(path, json.dumps(strict(value), indent=1) + "\n")


def read_config(workdir: Path) -> AnyConfig:
    """The config a workdir was made for.

    Raises:
      UserError: no readable config.json there.
    """
    path = workdir / "config.json"
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a run: it has no config.json") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); delete that file if the run can be made again") from None
    require("config" in saved, f"{workdir} is not a run: its config.json is another program's, such as that of an exported model")
    return config_from(saved["config"])


def environment() -> dict[str, Any]:
    """Versions, devices and git state: what a number may depend on besides the config."""
    import jax

    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "devices": {"kind": devices[0].device_kind, "count": len(devices), "hosts": jax.process_count()},
        "cpu_count": os.cpu_count(),
        "git": git_state(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def git_state() -> dict[str, Any]:
    """The commit of the code, and whether it has been changed since."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _is_first() -> bool:
    from metajax.pods.hosts import is_first  # starts with JAX, which finding runs does without

    return is_first()


@dataclass
class RunDirectory:
    """A workdir opened for one run, locked against a second process."""

    path: Path
    config: AnyConfig
    warnings: list[str] = field(default_factory=list)
    _lock: Any = None

    @classmethod
    def open(cls, path: Path, config: AnyConfig) -> RunDirectory:
        """Create the workdir or return to it; of several processes the first alone does so, and writes there.

        Raises:
          UserError: it holds another experiment, something that is no run, or a process that is still running.
        """
        if not _is_first():
            return cls(path, config)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with outages():
                _require_run_or_empty(home(path))
            lock = _lock(path)
        except OSError as error:
            raise UserError(f"{path} cannot be a run directory ({error.strerror or error}); choose another --workdir") from None
        require(lock is not None, f"another process is running in {path}; wait for it or choose another --workdir")
        fill(path)
        run = cls(path, config, _lock=lock)
        if (path / "config.json").exists():
            _require_same(read_config(path), config, path)
            run.warnings = list(run.read("warnings.json", []))
        return run

    def begin(self, key: str, tokenizer: str) -> None:
        """Hold the data against what the run began with, then write what the run is and where it runs.

        config.json comes first, because a folder without it is not taken for a run; a later start refreshes it and warns
        of other library versions. `key` and `tokenizer` identify the corpus and the tokenizer; see `check_data`.
        """
        if not _is_first():
            return
        known = check_data(self.path, key, tokenizer)
        self.write("config.json", {"hash": config_hash(self.config), "config": to_dict(self.config)})
        here, before = environment(), self.read("environment.json")
        if before is not None and before["libraries"] != here["libraries"]:
            then, now = before["libraries"], here["libraries"]
            changed = ", ".join(f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name])
            self.warn(f"taken up with other versions ({changed}): numbers may differ from those of an undisturbed run")
        if before is not None and before["git"]["commit"] != here["git"]["commit"]:
            then, now = (str(found["git"]["commit"])[:9] for found in (before, here))
            self.warn(f"taken up with other code (commit {then} -> {now}): numbers may differ from those of an undisturbed run")
        self.write("environment.json", here)
        if known is None:
            self.write("data.json", {"key": key, "tokenizer": tokenizer})
        publish(self.path)

    def close(self) -> None:
        """Publish what a stage holds, and release the lock."""
        if self._lock is not None:
            publish(self.path)
            self._lock.close()

    def read(self, name: str, default: Any = None) -> Any:
        """A JSON file of the run, or `default` when it is not there."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else default

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the run atomically."""
        if _is_first():
            write_json(self.path / name, value)

    def warn(self, message: str) -> None:
        """Say a warning and record it, so that it reaches report.json also when this process dies first."""
        warn(message)
        if message not in self.warnings:  # a start after the first says it again
            self.warnings.append(message)
            self.write("warnings.json", self.warnings)


def _lock(path: Path) -> Any:
    """A lock held until it is closed, None where another process has it."""
    lock = open(path / ".lock", "w")  # noqa: SIM115 - held for the life of the run
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock


def _require_run_or_empty(there: Any) -> None:
    if not there.exists() or (there / "config.json").exists():
        return
    present = sorted(p.name for p in there.iterdir() if not p.name.startswith(".") and p.name not in (FAILURE_LOG, RUN_LOG))
    kept = ", ".join(present[:3])
    require(not present, f"{there} is not empty and is not a run (it holds {kept}); choose another --workdir")


def check_data(workdir: Path, key: str, tokenizer: str) -> dict[str, str] | None:
    """The data a run began with, None when it has not begun.

    Raises:
      UserError: the tokenizer or the corpus is another one now.
    """
    path = workdir / "data.json"
    if not path.exists():
        return None
    saved = json.loads(path.read_text())
    require(
        saved["tokenizer"] == tokenizer,
        f"the tokenizer is not the one {workdir} was trained with ({tokenizer[:12]} now, {saved['tokenizer'][:12]} then); "
        "restore it, or start a new run with another --workdir",
    )
    require(
        saved["key"] == key,
        f"the corpus has changed since {workdir} began ({key} now, {saved['key']} then: other files or library versions); "
        "start a new run with another --workdir",
    )
    return saved


def _require_same(saved: AnyConfig, config: AnyConfig, path: Path) -> None:
    if (saved.name, saved.scale, saved.seed) != (config.name, config.scale, config.seed):
        raise UserError(
            f"{path} holds {saved.name} at scale {saved.scale} with seed {saved.seed}, "
            f"not {config.name} at {config.scale} with seed {config.seed}; choose another --workdir"
        )
    if config_hash(saved) != config_hash(config):
        changed = {k: v for k, v in difference(saved, config).items() if not k.startswith("runtime.")}
        name, (then, now) = next(iter(changed.items()))
        raise UserError(
            f"{path} holds another configuration of {config.name} ({len(changed)} fields differ, first {name}: {then!r} there, {now!r} now); "
            "choose another --workdir"
        )


def conditions(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The held-out results of a report's `eval`, by condition; what it has on tasks and choices stands beside them, images have none."""
    return {name: result for name, result in results.items() if isinstance(result, dict) and "bpb" in result}


# ----------------------------------------------------------------------------------------------- finding runs


def list_runs(root: Path) -> list[Path]:
    """Workdirs below `root`, oldest first."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name != "checkpoints"]  # of a run that goes on they vanish while one looks
        if "config.json" in files and _readable(Path(folder)):
            found.append(Path(folder))
    return sorted(found, key=lambda p: (p / "environment.json").stat().st_mtime if (p / "environment.json").exists() else 0.0)


def _readable(workdir: Path) -> bool:
    try:
        read_config(workdir)
    except UserError as error:
        warn(f"left out: {error}")
        return False
    return True


def _find_on_bucket(url: str, root: Path) -> Path:
    folder = stage(url, root)
    lock = _lock(folder)
    if lock is not None:  # else it is running on this machine, and what it has staged is newer
        with lock:
            fill(folder)
    require((folder / "config.json").exists(), f"{url} is not a run: it has no config.json")
    return folder


def find_run(word: str, root: Path) -> Path:
    """The workdir that `word` means: a path, from `root` or from here, a unique prefix of HASH-sSEED, an experiment's name (its newest run),
    or gs://BUCKET/PATH, whose stage is brought up to date.

    Raises:
      UserError: none, or more than one.
    """
    if word.startswith(SCHEME):
        return _find_on_bucket(word, root)
    for folder in (root / word, Path(word)):
        if (folder / "config.json").exists():
            return folder
    runs = list_runs(root)
    by_name = [run for run in runs if read_config(run).name == word]
    if by_name:
        return by_name[-1]
    matches = [run for run in runs if run.name.startswith(word) or str(run.relative_to(root)).startswith(word)]
    require(
        len(matches) < 2,
        f"{word!r} is the start of {len(matches)} runs: {', '.join(str(m) for m in matches[:4])}; give more of it",
    )
    if not matches:
        names = [read_config(run).name for run in runs] + [run.name for run in runs]
        raise UserError(f"no run {word!r} under {root}{nearest(word, names)}; `runs` lists what there is")
    return matches[0]
