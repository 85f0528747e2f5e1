"""TPU slices that are not there, through the compiler in the libtpu wheel, and what their chips can do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from metajax.config import UserError, nearest, require
from metajax.planning.buffers import FLAGS


class Chip(NamedTuple):
    """Peak figures of one chip as its maker publishes them."""

    flops: float  # bf16 operations per second
    memory: float  # bytes of HBM
    bandwidth: float  # bytes per second of HBM
    links: float  # bytes per second between chips, all links together
    clock: float  # cycles per second, of XLA's estimates


CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 1.5e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 1.75e9),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 448e9, 1.75e9),
}


def chip_of(topology: str) -> Chip:
    """The chip of a slice named KIND:SIZE, such as v5e:4x4 or v5p:2x2x2; UserError for an unknown kind."""
    kind, colon, size = topology.partition(":")
    require(kind in CHIPS, f"--topology {topology}: unknown kind {kind!r}{nearest(kind, CHIPS)}; known: {', '.join(CHIPS)}")
    require(
        bool(colon) and all(part.isdigit() for part in size.split("x")),
        f"--topology {topology}: expected KIND:SIZE, such as v5e:4x4",
    )
    return CHIPS[kind]


def allow_compiler(dump: Path) -> None:
    """Settings of the TPU compiler on a machine without a TPU, which writes what it does to `dump`; before JAX is imported.

    libtpu asks who and where the TPU of this machine is, and complains at length when there is no answer: it gets one that no
    described slice depends on.
    """
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} {FLAGS}"
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}


def slice_devices(topology: str) -> list[Any]:
    """The devices of a slice; UserError where libtpu is not installed or has no such slice."""
    from jax.experimental import topologies

    options = {"chips_per_host_bounds": (1, 1, 1)} if topology.partition(":")[2].replace("x", "").strip("1") == "" else {}
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology {topology}: {reason}; the TPU compiler comes with requirements-dev.txt (libtpu, Linux x86-64)"
        ) from None
