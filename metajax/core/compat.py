"""The one file for what differs between versions of JAX, or has no public door in them."""

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
    """(coordinator, processes, process, local devices) as JAX reads them off Cloud TPU, GKE, Slurm or Open MPI; None where it cannot.

    `jax.distributed.initialize` does the same, but tells no one: a check before the start needs the address.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a Kubernetes pod without its client library, which hosts.py speaks of
        return clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout)


def keep_programs(folder: Path) -> None:
    """Keep compiled programs in a folder between runs; to be called before the first use of a device."""
    compilation_cache.LRUCache = _CheckedPrograms
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class _CheckedPrograms(LRUCache):
    """JAX's own cache runs a program whose bytes have changed. Here each begins with its hash, and one that is damaged is made again."""

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
