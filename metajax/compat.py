"""The one file for what differs between versions of JAX, or has no public door in them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from jax._src import clusters


def detect_cluster(timeout: int) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """(coordinator, processes, process, local devices) as JAX reads them off Cloud TPU, GKE, Slurm or Open MPI; None where it cannot.

    `jax.distributed.initialize` does the same, but tells no one: a check before the start needs the address.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a Kubernetes pod without its client library, which hosts.py speaks of
        return clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout)
