"""TPU slices that are not available, described by the compiler in the libtpu wheel, and peak figures of their chips."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from metajax.core.errors import UserError, first_line, nearest, require
from metajax.core.fields import Range, convert
from metajax.planning.buffers import FLAGS


class Chip(NamedTuple):
    """Published peak figures of one JAX device: a chip, or for tpu7x one of the chip's two cores.

    The cores of a tpu7x exchange the data that one of them receives, so each core counts all links of the chip.
    """

    flops: float  # bf16 operations per second
    memory: float  # bytes of HBM
    bandwidth: float  # bytes per second of HBM
    links: float  # bytes per second between chips, all links together
    network: float  # bytes per second to other slices
    clock: float  # cycles per second, for XLA's estimates


# bf16 operations per second, GiB of HBM, bytes per second of all links together and of the network; the rest: `compiled.CHIPS`.
PEAKS = {
    "v5e": (197e12, 16, 200e9, 3.125e9),
    "v5p": (459e12, 95, 600e9, 6.25e9),
    "v6e": (918e12, 32, 448e9, 12.5e9),
    "tpu7x": (1153.5e12, 96, 600e9, 6.25e9),
}


def parse_topology(topology: str) -> tuple[int, str, str]:
    """(slices, kind, size) of [Nx]KIND:SIZE, such as v5e:4x4, v5p:2x2x2 or, two slices, 2xv5e:4x4; UserError for an unknown kind."""
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):(\d+(?:x\d+)*)", topology)
    require(found is not None, f"--topology {topology}: expected KIND:SIZE, such as v5e:4x4, or 2xv5e:4x4 for two slices of it")
    count, kind, size = found.groups()
    require(kind in PEAKS, f"--topology {topology}: unknown kind {kind!r}{nearest(kind, PEAKS)}; known: {', '.join(PEAKS)}")
    side = Annotated[int, Range(1, 65_536)]
    sizes = [convert(part, side, f"--topology {topology}") for part in (count or "1", *size.split("x"))]
    require(math.prod(sizes) <= 2**17, f"--topology {topology}: more chips than any slice has")
    return sizes[0], kind, "x".join(map(str, sizes[1:]))


def chip_of(topology: str) -> Chip:
    """The chip of a topology."""
    from kernels_pallas.bench.compiled import CHIPS  # imports JAX, so only after `allow_compiler`

    kind = parse_topology(topology)[1]
    flops, gib, links, network = PEAKS[kind]
    return Chip(flops, gib * 2**30, 1e9 * CHIPS[kind].bandwidth, links, network, 1e9 * CHIPS[kind].clock)


def allow_compiler(dump: Path) -> None:
    """Configure the TPU compiler for a machine without a TPU, with its dump in `dump`. Call it before JAX is imported.

    libtpu asks for the TPU of this machine and prints many warnings without an answer. The settings give an answer that
    does not affect the described slices.
    """
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} {FLAGS}"
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}


def slice_devices(topology: str) -> list[Any]:
    """The devices of a topology; UserError if libtpu is not installed or does not know the slice."""
    from jax.experimental import topologies

    slices, kind, size = parse_topology(topology)
    options = {"chips_per_host_bounds": (1, 1, 1)} if size.replace("x", "").strip("1") == "" else {}
    options |= {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(f"{kind}:{size}", "tpu", **options).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason, remedy = first_line(error), "the TPU compiler comes with requirements-dev.txt (libtpu, Linux x86-64)"
        raise UserError(f"--topology {topology}: {reason}; {remedy}") from None
