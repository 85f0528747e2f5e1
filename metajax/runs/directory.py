"""The folder of a run and its lock, and finding runs.

It holds config.json (resolved, with its hash), environment.json, data.json, metrics.jsonl, checkpoints/, report.json and report.html;
failure.log if the run failed in a table.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import platform
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from metajax.config import CONFIG_VERSION, AnyConfig, config_from, config_hash, difference
from metajax.core.errors import UserError, nearest, require
from metajax.core.fields import require_all_read, to_dict
from metajax.core.progress import warn
from metajax.core.storage import SCHEME, fill, home, outages, publish, stage
from metajax.runs.files import CONFIG, Mark, find_json, read_json, recall, write_json

T = TypeVar("T")
LOCK = ".lock"  # the file of a process that has ended locks nothing
RUN_LOG = "run.log"  # output of a run that is made beside others
FAILURE_LOG = "failure.log"  # of a row that failed in a table; it may exist before the run does
ORIGIN = "imported.json"  # of an imported run: its original config.json, rows, ids that end a text, whether its head was tied
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


def default_workdir(config: AnyConfig, root: Path) -> Path:
    """ROOT/NAME/SCALE/HASH8-sSEED."""
    return root / config.name / config.scale / f"{config_hash(config)}-s{config.seed}"


def read_config(workdir: Path) -> AnyConfig:
    """The config of a workdir; raises UserError if it has no readable config.json."""
    path = workdir / CONFIG
    require(path.exists(), f"{workdir} is not a run: it has no {CONFIG}")
    saved = read_json(path)
    require("config" in saved, f"{workdir} is not a run: its {CONFIG} is another program's, such as that of an exported model")
    try:
        return config_from(saved["config"])
    except UserError as error:
        raise UserError(f"{path}: {error}; another version of metajax wrote it and can read this run") from None


def read_report(workdir: Path) -> dict[str, Any] | None:
    """The report of a run; None if the run is not complete."""
    return find_json(workdir / "report.json")


def readable(runs: Iterable[Path], read: Callable[[Path], T]) -> list[tuple[Path, T]]:
    """(run, result of `read`) for every run whose files can be read; prints one line for each other run."""
    found = []
    for run in runs:
        try:
            found.append((run, read(run)))
        except UserError as error:
            warn(f"left out: {error}")
    return found


def environment() -> dict[str, Any]:
    """Versions, devices and git state, on which a result may depend besides the config."""
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
    """The commit of the code, and whether there are uncommitted changes; None if git cannot tell."""
    found: list[str | None] = []
    for words in (("rev-parse", "HEAD"), ("status", "--porcelain")):
        try:
            done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
            found.append(done.stdout.strip() if done.returncode == 0 else None)
        except (OSError, subprocess.TimeoutExpired):
            found.append(None)
    commit, status = found
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _is_first() -> bool:
    from metajax.distributed.hosts import is_first  # slow to import, and not needed for finding runs

    return is_first()


class Gone(UserError):
    """The folder that a process works in was moved or deleted; another run cannot recover from that."""


class Place:
    """A folder that is held open, so that a replacement of the same name is recognised."""

    def __init__(self, path: Path):
        self.path, self._held = path, os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self._held)

    def require_there(self) -> None:
        """Raise Gone if the folder was moved, deleted or replaced."""
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self._held))
        except OSError:
            there = False
        if not there:
            raise Gone(f"{self.path} was moved, deleted or replaced during the run; put it back and give the same command again")

    @contextlib.contextmanager
    def while_there(self) -> Iterator[None]:
        """Raise Gone for a failure inside that happens because this folder, or another file that is read, no longer exists."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.require_there()
            if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
                which = error.filename2 or error.filename or self.path
                raise Gone(f"{which}: {error.strerror}; restore it, and give the same command again") from error
            raise


@dataclass
class RunDirectory:
    """A workdir opened for one run, locked against a second process."""

    path: Path
    config: AnyConfig
    warnings: list[str] = field(default_factory=list)
    id: str = ""  # made once and stored in config.json; the digests of other files include it
    data: dict[str, str] = field(default_factory=dict)  # {key, tokenizer}, known once the run begins
    logged: Mark | None = None  # mark of metrics.jsonl in the checkpoint that the run resumes from
    _lock: Any = None
    _place: Place | None = None

    @classmethod
    def open(cls, path: Path, config: AnyConfig) -> RunDirectory:
        """Create the workdir or open an existing one. With several processes only the first does so and writes there.

        Raises UserError if it holds another experiment or other files, or another process is still running in it.
        """
        if not _is_first():
            return cls(path, config)
        try:
            with outages():
                there = home(path)  # first, so that an impossible name is refused before anything is created
                path.mkdir(parents=True, exist_ok=True)
                _require_run_or_empty(there)
            lock = _lock(path)
        except OSError as error:
            raise UserError(f"{path} cannot be a run directory ({error.strerror or error}); choose another --workdir") from None
        require(lock is not None, f"another process is running in {path}; wait for it or choose another --workdir")
        fill(path)
        run = cls(path, config, _lock=lock)
        if (path / CONFIG).exists():
            _require_same(read_config(path), config, path)
            run.id = read_json(path / CONFIG).get("id", "")
            found = recall(path / "warnings.json", run.warn, "the warnings of earlier starts are lost")
            run.warnings = [*(found or {}).get("warnings", []), *run.warnings]
        else:
            require_all_read(config)
            run.id = secrets.token_hex(4)
        run._place = Place(path)
        return run

    def begin(self, key: str, tokenizer: str) -> None:
        """Check that the data is that of the run's first start, then write config.json and the environment.

        config.json comes first, because a folder without it does not count as a run. A later start updates it and warns
        if library versions differ. `key` and `tokenizer` identify the corpus and the tokenizer; see `check_data`.
        """
        self.data = {"key": key, "tokenizer": tokenizer}
        if not _is_first():
            return
        found = recall(self.path / "data.json", self.warn, "the checkpoints show which data it was")
        require_data(found or {}, self.data, self.path)
        self.write_config()
        now = environment()
        then = recall(self.path / "environment.json", self.warn, "a change of versions is not reported")
        if then is not None:
            old, new = then["libraries"], now["libraries"]
            versions = ", ".join(f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name])
            old, new = then["git"]["commit"], now["git"]["commit"]
            code = f"commit {old!s:.9} -> {new!s:.9}" if old != new else ""
            for kind, change in (("versions", versions), ("code", code)):
                if change:
                    self.warn(f"resumed with other {kind} ({change}): numbers may differ from those of an undisturbed run")
        self.write("environment.json", now)
        if found is None:
            self.write("data.json", self.data)
        publish(self.path)

    def go_on_from(self, meta: Mapping[str, Any]) -> None:
        """Restore from a checkpoint the mark of metrics.jsonl and the warnings up to that step."""
        self.logged = meta.get("metrics")
        before = [*dict.fromkeys([*meta.get("warnings", ()), *self.warnings])]
        if before != self.warnings:
            self.warnings = before
            self.write("warnings.json", {"warnings": before})

    def write_config(self) -> None:
        """Write config.json, without which a folder is not taken for a run."""
        hash_, version_ = _hash_and_version(self.path, self.config)
        self.write(CONFIG, {"id": self.id, "hash": hash_, "version": version_, "config": to_dict(self.config)})

    @property
    def identity(self) -> dict[str, Any]:
        """The identity that every checkpoint of this run stores; see `require_same_run`."""
        return _identity(self.path, self.config) | self.data

    @property
    def hash(self) -> str:
        """The hash of the config, under the config version that the run began with."""
        return _hash_and_version(self.path, self.config)[0]

    def close(self) -> None:
        """Upload the files of a staging folder, and release the lock."""
        if self._lock is not None:
            publish(self.path)
            self._lock.close()
            self._place.close()

    def require_there(self) -> None:
        """Raise UserError, before anything is written, if the run's folder is gone or has been replaced."""
        if self._place is not None:
            self._place.require_there()

    def while_there(self) -> contextlib.AbstractContextManager[None]:
        """See `Place.while_there`."""
        return contextlib.nullcontext() if self._place is None else self._place.while_there()

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the run atomically."""
        if _is_first():
            self.require_there()
            write_json(self.path / name, value)

    def warn(self, message: str) -> None:
        """Print a warning and record it, so that it reaches report.json even if this process dies first."""
        warn(message)
        if message not in self.warnings:  # a later start may repeat a warning
            self.warnings.append(message)
            self.write("warnings.json", {"warnings": self.warnings})


def _lock(path: Path) -> Any:
    """A lock held until it is closed; None if another process holds it."""
    lock = open(path / LOCK, "w")  # noqa: SIM115 - held for the life of the run
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _require_run_or_empty(there: Any) -> None:
    if not there.exists() or (there / CONFIG).exists():
        return
    present = sorted(p.name for p in there.iterdir() if not p.name.startswith(".") and p.name not in (FAILURE_LOG, RUN_LOG))
    kept = ", ".join(present[:3])
    require(not present, f"{there} is not empty and is not a run (it holds {kept}); choose another --workdir")


def check_data(workdir: Path, **now: str) -> None:
    """Raise UserError if the `tokenizer` or the corpus `key` differs from that of the run's first start."""
    require_data(find_json(workdir / "data.json") or {}, now, workdir)


def require_data(saved: Mapping[str, Any], now: Mapping[str, Any], workdir: Path) -> None:
    """Likewise for {key, tokenizer} stored by part of the run; an entry missing on either side is not compared."""
    remedy = "start a new run with another --workdir"
    key, tokenizer = (now.get(name, saved.get(name)) for name in ("key", "tokenizer"))
    old_key, old_tokenizer = saved.get("key", key), saved.get("tokenizer", tokenizer)
    tokenizers = f"{tokenizer!s:.12} now, {old_tokenizer!s:.12} then"
    is_same = old_tokenizer == tokenizer
    require(is_same, f"the tokenizer is not the one {workdir} was trained with ({tokenizers}); restore it, or {remedy}")
    keys = f"{key} now, {old_key} then: other files or library versions"
    require(old_key == key, f"the corpus has changed since {workdir} began ({keys}); {remedy}")


def _hash_and_version(workdir: Path, config: AnyConfig) -> tuple[str, int]:
    """The hash of a run and its config version (0: before there were versions). The hash of an earlier version is kept as saved,
    because it cannot be computed any more."""
    saved = find_json(workdir / CONFIG) or {}
    version_ = saved.get("version", 0) if "hash" in saved else CONFIG_VERSION
    return config_hash(config) if version_ == CONFIG_VERSION else saved["hash"], version_


def _identity(workdir: Path, config: AnyConfig) -> dict[str, Any]:
    hash_, _ = _hash_and_version(workdir, config)
    return {"name": config.name, "scale": config.scale, "seed": config.seed, "hash": hash_}


def identity_of(workdir: Path) -> dict[str, Any]:
    """`RunDirectory.identity` of a run that is not open."""
    return _identity(workdir, read_config(workdir)) | (find_json(workdir / "data.json") or {})


def require_same_run(saved: Mapping[str, Any], mine: Mapping[str, Any], what: str, workdir: Path) -> None:
    """Raise UserError if the checkpoint `what` belongs to another run; `saved` is the identity stored in it. Checkpoints of
    earlier versions store only the hash, which is then compared, or nothing."""
    names = [name for name in ("name", "scale", "seed", "hash") if name in saved]
    differing = [name for name in names if saved[name] != mine[name]]
    kind = "configuration" if differing == ["hash"] else "run"
    theirs, ours = (", ".join(f"{name} {found[name]}" for name in names) for found in (saved, mine))
    remedy = "move it away to use the one before, or put back that of this run"
    require(not differing, f"{what} belongs to another {kind} ({theirs}; this run: {ours}); {remedy}")
    require_data(saved, mine, workdir)


def _require_same(saved: AnyConfig, config: AnyConfig, path: Path) -> None:
    there, now = (f"{one.name} at scale {one.scale} with seed {one.seed}" for one in (saved, config))
    require(there == now, f"{path} holds {there}, not {now}; choose another --workdir")
    if config_hash(saved) != config_hash(config):
        changed = {k: v for k, v in difference(saved, config).items() if not k.startswith("runtime.")}
        name, (old, new) = next(iter(changed.items()))
        fields = f"{len(changed)} fields differ, first {name}: {old!r} there, {new!r} now"
        raise UserError(f"{path} holds another configuration of {config.name} ({fields}); choose another --workdir")


def conditions(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The validation results of a report's `eval` by condition, without tasks and choices; empty for images."""
    return {name: result for name, result in results.items() if isinstance(result, dict) and "bpb" in result}


def list_runs(root: Path) -> list[Path]:
    """Workdirs below `root`, oldest first."""

    def tell(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # no run yet, or a folder deleted during the search
            warn(f"left out: {error.filename}: {error.strerror}")

    found = []
    for folder, folders, files in os.walk(root, onerror=tell):
        if CONFIG in (*folders, *files) or {"checkpoints", "hashes"} <= set(folders):
            found.append(Path(folder))
        # Checkpoints of a running process may vanish during this search. Files that were set aside are not runs.
        folders[:] = [name for name in folders if name not in ("checkpoints", "damaged", CONFIG)]
    runs = [run for run, _ in readable(found, read_config)]
    starts = {run: path.stat().st_mtime for run in runs if (path := run / "environment.json").exists()}
    return sorted(runs, key=lambda run: starts.get(run, 0.0))


def find_run(word: str, root: Path) -> Path:
    """Find the workdir named by `word`; raises UserError if there is none, or more than one.

    `word` is a path (relative to `root` or the current folder), a unique prefix of HASH-sSEED, the name of an experiment (its
    newest run), or gs://BUCKET/PATH, whose staging folder is then updated.
    """
    if word.startswith(SCHEME):
        folder = stage(word, root)
        if (lock := _lock(folder)) is not None:  # otherwise it runs on this machine, and its staging folder is newer
            with lock:
                fill(folder)
        require((folder / CONFIG).exists(), f"{word} is not a run: it has no {CONFIG}")
        return folder
    for folder in (root / word, Path(word)):
        if (folder / CONFIG).exists():
            return folder
    runs = list_runs(root)
    by_name = [run for run in runs if read_config(run).name == word]
    if by_name:
        return by_name[-1]
    matches = [run for run in runs if run.name.startswith(word) or str(run.relative_to(root)).startswith(word)]
    if not matches:
        names = [read_config(run).name for run in runs] + [run.name for run in runs]
        raise UserError(f"no run {word!r} under {root}{nearest(word, names)}; `runs` lists all")
    some = ", ".join(str(match) for match in matches[:4])
    require(len(matches) == 1, f"{word!r} is the start of {len(matches)} runs: {some}; give more of it")
    return matches[0]
