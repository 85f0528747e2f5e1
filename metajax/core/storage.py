"""Runs on a bucket, `--workdir gs://BUCKET/PATH`.

Checkpoints, their hashes and replay bundles are written to the bucket directly. All other files of a run are small: they are
written to a local folder, the stage, and process 0 copies them to the bucket. The bucket is the source of truth: the stage is
synced from it on start, and uploaded before a checkpoint counts as complete. So a run can resume on any machine, with the metrics
up to the step of its checkpoint. Every object on the bucket is complete; config.json is uploaded first.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from metajax.core.errors import Stopped, UserError, first_line, require

SCHEME = "gs://"
MARK = ".bucket"  # a file in a stage with the URL of the run
ONLY_ON_BUCKET = ("checkpoints", "hashes", "damaged", "replay-step-")  # prefixes of names that are only on the bucket
PATTERNS = "[]*?#"  # characters that gcsfs or GCS takes for a pattern or a version
SIGN_IN = "gcloud auth application-default login, or give this machine's service account roles/storage.admin on the bucket"


def storage(path: Any) -> tuple[Any, str]:
    """(file system, path in it) of a local or bucket path. Listings are not cached: other programs and hosts write there too."""
    import fsspec  # imported here: it is slow to import, and few commands need it

    if os.fspath(path).startswith(SCHEME):
        require(find_spec("gcsfs") is not None, f"{path}: buckets are reached through gcsfs; pip install gcsfs")
        fsspec.config.conf["gcs"] = {"use_listings_cache": False}  # etils and Orbax open it too
    return fsspec.url_to_fs(os.fspath(path))


def require_bucket(path: Any) -> None:
    """Raise UserError if the bucket of a path does not exist: gcsfs and Orbax would create it, even under a misspelt name."""
    system, inside = storage(path)
    bucket = SCHEME + inside.partition("/")[0]
    require(system.exists(bucket), f"{path}: there is no bucket {bucket}; gcloud storage buckets create {bucket}")


def files(folder: Any) -> dict[str, dict[str, Any]]:
    """{relative path: `size`, `mtime` and more} of all files below a folder, local or on a bucket, sorted by path."""
    if _on_bucket(folder):
        system, root = storage(folder)
        return {name.removeprefix(f"{root}/"): info for name, info in sorted(system.find(root, detail=True).items())}
    found = {}
    for path in sorted(os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names):
        with contextlib.suppress(FileNotFoundError):  # a running process may have deleted it
            stat = os.lstat(path)
            found[os.path.relpath(path, folder)] = {"size": stat.st_size, "mtime": stat.st_mtime}
    return found


def move(source: Any, target: Any) -> None:
    """Move a file or folder; on a bucket, object by object."""
    if _on_bucket(source):
        system, _ = storage(source)
        system.copy(os.fspath(source), os.fspath(target), recursive=True)
        system.rm(os.fspath(source), recursive=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def stage(url: str, runs: Path) -> Path:
    """The local folder of a run on a bucket, RUNS/gs/BUCKET/PATH. It may hold files of an earlier use, see `fill`."""
    where = url.rstrip("/")
    require(len(where.removeprefix(SCHEME).split("/")) > 1, f"{url}: a run needs a path in the bucket, gs://BUCKET/PATH")
    is_plain = not set(PATTERNS) & set(where)
    require(is_plain, f"{url}: {' '.join(PATTERNS)} in the path of a bucket are taken for patterns; name another")
    folder = runs / "gs" / where.removeprefix(SCHEME)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARK).exists():
        (folder / MARK).write_text(where)
    return folder


def _on_bucket(path: Any) -> bool:
    return os.fspath(path).startswith(SCHEME)


@functools.cache
def _literal() -> type:
    from etils import epath

    class Literal(type(epath.Path())):
        """A local path that Orbax's glob for `process_*` takes literally; backup copies such as `process_0~` are skipped."""

        def glob(self, pattern: str) -> Iterator[Literal]:
            return (type(self)(path) for path in Path(self).glob(pattern) if re.fullmatch(r"[\w.]*_\w+", path.name))

    return Literal


def literal(path: Path) -> Any:
    """A local path for Orbax, absolute. Raises UserError for a name that Orbax or TensorStore takes for something else."""
    where = Path(path).absolute()
    is_plain = "\\" not in str(where)
    require(is_plain, f"{where}: TensorStore, which writes checkpoints, takes a backslash for a slash; name another")
    scheme = where.parts[1] if len(where.parts) > 1 else ""
    require(scheme not in ("gs", "s3", "az", "hf"), f"{where}: Orbax takes {scheme} for a bucket; name another folder")
    return _literal()(where)


def home(workdir: Path) -> Any:
    """Where the checkpoints of a workdir are: on the bucket if the workdir is a stage, otherwise in the workdir."""
    from etils import epath

    mark = Path(workdir, MARK)
    if not mark.exists():
        return literal(workdir)
    where = mark.read_text(errors="replace")
    remedy = "delete that file, and name the run as gs://BUCKET/PATH again"
    require(where.startswith(SCHEME), f"{mark} does not name a bucket; {remedy}")
    storage(where)
    return epath.Path(where)


def steps_of(workdir: Path) -> list[int]:
    """Steps of the checkpoints of a run, oldest first, including those that are being written."""
    folder = home(workdir) / "checkpoints"
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in there if re.fullmatch("0|[1-9][0-9]*", path.name) and path.is_dir())


def hashes_of(workdir: Path, step: int | None = None) -> list[Path]:
    """The files with the hashes of one checkpoint, or of all. Other files in their folder are ignored."""
    folder = home(workdir) / "hashes"
    of = re.compile(rf"{r'[0-9]+' if step is None else step}-p[0-9]+\.json")
    return sorted(path for path in folder.iterdir() if of.fullmatch(path.name)) if folder.is_dir() else []


def fill(workdir: Path) -> None:
    """Sync a stage from its bucket, or empty it if the bucket has no run. A workdir that is no stage is left alone.

    Raises UserError if the bucket does not exist.
    """
    if not (workdir / MARK).exists():
        return
    there = home(workdir)
    system, root = storage(there)
    require_bucket(there)
    staged, kept = _staged(workdir), _kept(there) if (there / "config.json").exists() else {}
    for name in staged.keys() - kept.keys():
        (workdir / name).unlink()
    for name, digest in kept.items():
        if digest != staged.get(name):
            (workdir / name).parent.mkdir(parents=True, exist_ok=True)
            system.get_file(f"{root}/{name}", str(workdir / name))


def publish(workdir: Path) -> None:
    """Copy the new files of a stage to its bucket. Does nothing for a workdir that is no stage."""
    if not (workdir / MARK).exists():
        return
    there = home(workdir)
    (system, root), staged, kept = storage(there), _staged(workdir), _kept(there)
    for name in sorted(staged, key=lambda name: (name != "config.json", name)):
        if kept.get(name) != staged[name]:
            system.pipe_file(f"{root}/{name}", (workdir / name).read_bytes())


def _kept(there: Any) -> dict[str, str]:
    """{name: MD5 in base64, as buckets give it} of the files on the bucket that the stage has too."""
    system, root = storage(there)
    tops = [path.name for path in there.iterdir() if not path.name.startswith(ONLY_ON_BUCKET)] if there.exists() else []
    found = [item for top in tops for item in system.find(f"{root}/{top}", detail=True).items()]
    return {name.removeprefix(f"{root}/"): info.get("md5Hash", "") for name, info in found}


def _staged(workdir: Path) -> dict[str, str]:
    """{name: MD5 in base64} of the files of a stage except hidden ones and those of Weights & Biases."""
    names = [name for name in files(workdir) if not os.path.basename(name).startswith(".") and not name.startswith("wandb/")]
    digests = (hashlib.md5((workdir / name).read_bytes(), usedforsecurity=False).digest() for name in names)
    return {name: base64.b64encode(digest).decode() for name, digest in zip(names, digests, strict=True)}


@contextlib.contextmanager
def outages() -> Iterator[None]:
    """Raise Stopped if a bucket does not answer now, and UserError if it denies access. The libraries have retried before."""
    try:
        yield
    except Exception as error:
        if "gcsfs" not in sys.modules:
            raise
        from gcsfs.retry import HttpError, is_retriable
        from google.api_core.exceptions import GoogleAPIError, RetryError, ServerError
        from google.auth.exceptions import GoogleAuthError

        problem = f"the bucket: {first_line(error)}"
        if is_retriable(error) or isinstance(error, (RetryError, ServerError)):
            raise Stopped(f"{problem}; the same command continues") from error
        forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden")  # the wording of gcsfs
        if forbidden or isinstance(error, (HttpError, GoogleAPIError, GoogleAuthError)):
            raise UserError(f"{problem}; {SIGN_IN}") from error
        raise
