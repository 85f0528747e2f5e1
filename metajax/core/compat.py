"""The only file for what differs between versions of JAX, or has no public API there."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
from jax._src import clusters, compilation_cache
from jax._src.lru_cache import LRUCache

from metajax.core.progress import warn


def detect_cluster(timeout: int) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """(coordinator, processes, process, local devices) as JAX detects them on Cloud TPU, GKE, Slurm or Open MPI; None if unknown.

    `jax.distributed.initialize` does the same but does not return them, and a check before the start needs the address.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a Kubernetes pod without its client library, which hosts.py reports
        return clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout)


def keep_programs(folder: Path) -> None:
    """Keep compiled programs in a folder between runs. Call it before the first use of a device."""
    compilation_cache.LRUCache = _CheckedPrograms
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class _CheckedPrograms(LRUCache):
    """A checked compilation cache: each program begins with its hash. JAX would run a damaged one; here it is compiled again."""

    _full = False

    def get(self, key: str) -> bytes | None:
        kept = super().get(key)
        if kept is None or hashlib.sha256(kept[32:]).digest() == kept[:32]:
            return kept and kept[32:]
        self._entry(key).unlink(missing_ok=True)
        return None

    def put(self, key: str, value: bytes) -> None:
        try:
            super().put(key, hashlib.sha256(value).digest() + value)
        except OSError as error:
            self._entry(key).unlink(missing_ok=True)
            if not self._full:
                warn(f"{self.path}: {error.strerror}; compiled programs are not kept, and the next run compiles them again")
            self._full = True

    def _entry(self, key: str) -> Path:
        return self.path / f"{key}-cache"
