"""Several processes as one run: how they find each other, agree, and which of them writes.

Every process runs the same command. Process 0 writes logs and reports, and each process reads its own slice of every batch. An error of
one process is raised on all of them, so that none waits for a process that has left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Annotated, Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from metajax.config import Processes
from metajax.core.compat import detect_cluster
from metajax.core.errors import Stopped, UserError, require
from metajax.core.fields import CountOrZero, Range, convert
from metajax.core.progress import PROGRAM, console

T = TypeVar("T")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Set by launchers of several processes: Slurm's srun, GKE's TPU pods, Cloud TPU virtual machines with chips, Open MPI.
LAUNCHERS = ("SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "MEGASCALE_NUM_SLICES", "OMPI_MCA_orte_hnp_uri")
CONNECT_SECONDS = 300  # until all processes have connected; a launcher may start them minutes apart
HEARTBEAT_SECONDS = 60  # without a sign of life a process counts as dead, and the others end with SIGABRT


@dataclass(frozen=True)
class Place:
    """This process among those of a run."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process: int
    local_devices: Sequence[int] | None = None

    def __post_init__(self) -> None:
        host, colon, port = self.coordinator.rpartition(":")
        require(bool(host and colon), f"coordinator {self.coordinator!r}: expected HOST:PORT")
        convert(port, Annotated[int, Range(1, 65_535)], f"coordinator {self.coordinator!r}: port")
        require(
            0 <= self.process < self.processes,
            f"process {self.process} of {self.processes}: processes are numbered from 0 to {self.processes - 1}",
        )


def find_place(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Place | None:
    """This process's place, from the arguments, else from `VARIABLES`, else from the launcher's environment; None: it is alone.

    Raises UserError if only some of the three are given, or if they are not numbers.
    """
    given = (coordinator, processes, process)
    if all(value is None for value in given):
        given = tuple(os.environ.get(name) for name in VARIABLES)
    if any(value is not None for value in given):
        require(
            None not in given,
            f"--coordinator HOST:PORT, --processes N and --process-id I (or {', '.join(VARIABLES)}) go together; some are missing",
        )
        return Place(str(given[0]), convert(given[1], Processes, "processes"), convert(given[2], CountOrZero, "process-id"))
    if not any(name in os.environ for name in LAUNCHERS) and not has_tpu():
        return None
    address, count, number, devices = detect_cluster(CONNECT_SECONDS)
    return Place(address, count, number, devices) if address and (count or 1) > 1 else None


def has_tpu() -> bool:
    """Whether this machine has the device files of a TPU, without starting JAX."""
    return any(name.startswith("accel") for name in os.listdir("/dev")) or os.path.exists("/dev/vfio/0")


def connect(place: Place | None, seconds: int = CONNECT_SECONDS) -> None:
    """Join the other processes; call it before the first use of a device. A single process needs nothing.

    Raises Stopped if the others did not come in time, or if one of them still belongs to an earlier start; a later start may succeed.
    """
    if place is None or place.processes == 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        heartbeat = dict.fromkeys(("heartbeat_timeout_seconds", "shutdown_timeout_seconds"), HEARTBEAT_SECONDS)
        options = {"cluster_detection_method": "deactivate", "initialization_timeout": seconds, **heartbeat}
        jax.distributed.initialize(*astuple(place), **options)
    except jax.errors.JaxRuntimeError as error:
        raise Stopped(
            f"process {place.process}: not all {place.processes} processes met at {place.coordinator} within {seconds} s "
            f"({str(error).splitlines()[0]}); `{PROGRAM} preflight` on every host names the missing one"
        ) from None
    console.quiet = not is_first()


def is_first() -> bool:
    """Whether this process writes logs and reports."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """The texts of all processes, in order, on every process."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data), np.int32))
    padded = np.pad(data, (0, int(sizes.max()) + 1 - len(data)))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def together(act: Callable[[], T]) -> T:
    """act() on every process; a UserError of one process is raised on all."""
    value, problem = None, ""
    try:
        value = act()
    except UserError as error:
        problem = str(error)
    problems = gather(problem)
    for process, text in enumerate(problems):
        if text:
            raise UserError(text if len(set(problems)) == 1 else f"process {process}: {text}")
    return value  # type: ignore[return-value]


def of_first(value: Any) -> Any:
    """Process 0's JSON-ready value, on every process."""
    return json.loads(gather(json.dumps(value) if is_first() else "null")[0])


def agree(what: str, value: str) -> None:
    """UserError on every process if one of them has another `value` than process 0."""
    first, *others = gather(value)
    for process, other in enumerate(others, 1):
        require(
            other == first,
            f"process {process} has another {what} ({other}) than process 0 ({first}); start the same code and command with the same data "
            "on every host",
        )
