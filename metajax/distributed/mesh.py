"""The device mesh from a one-line description such as "data=2,fsdp=-1"."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

import jax
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh

from metajax.config import AXES, mesh_axes
from metajax.core.errors import require
from metajax.distributed.rules import RULES, batch_sharding

SMALL_STATE = 1 << 30  # bytes; a state up to this size is held whole by every device


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """The sizes of all `AXES`, whose product is `devices`, or UserError; a size of -1 takes the devices that are left."""
    sizes = dict.fromkeys(AXES, 1) | mesh_axes(text)
    free = [name for name, size in sizes.items() if size == -1]
    if free:
        sizes[free[0]] = max(1, devices // math.prod(s for s in sizes.values() if s != -1))
    product = " x ".join(str(size) for size in sizes.values() if size > 1) or "1"
    total = math.prod(sizes.values())
    require(total == devices, f"runtime.mesh = {text!r} is {product} = {total}, but there are {devices} devices")
    return sizes


def make_mesh(text: str, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or the given ones), axes named `AXES`, sharding left to the compiler within the rules.

    Several TPU slices, joined by a slower network, are spread over `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(text, len(devices))
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(sizes)
    slices = slice_count(devices)
    if slices == 1:
        return jax.make_mesh(shape, tuple(sizes), axis_types=types, devices=devices)
    spread = f"runtime.mesh = {text!r}: {slices} slices are spread over data; give it a multiple, such as data={slices},fsdp=-1"
    require(shape[0] % slices == 0, spread)
    within, between = (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
    return Mesh(create_hybrid_device_mesh(within, between, devices), tuple(sizes), axis_types=types)


class MeshOption(NamedTuple):
    """A mesh for a model and a batch, with what it costs each device."""

    mesh: str  # as of `runtime.mesh`
    state: float  # bytes of parameters, moments and gradients
    links: float  # bytes sent per step for parameters and gradients, at least


def auto_meshes(
    parameters: int, rows: int, devices: list[jax.Device], *, gathers: int, pieces: int, weight_bytes: int
) -> list[MeshOption]:
    """The meshes that `runtime.mesh=auto` considers, the chosen one first.

    Rows go to as many devices as divide them; the others take parts of each row. A small state is held whole by every device,
    which saves the messages of each layer. A larger one is spread over fsdp, within the slices if there are several.

    Args:
      parameters: number of parameters; AdamW's state and the gradient take 16 bytes for each.
      rows: of a micro-batch.
      gathers: how often a micro-batch gathers each weight, once more for rematerialisation.
      pieces: number of micro-batches in a step.
      weight_bytes: of a weight in the compute dtype.
    """
    shards, slices = math.gcd(len(devices), rows), slice_count(devices)
    context, state, weights = len(devices) // shards, 16 * parameters, weight_bytes * parameters
    options = []
    for data in dict.fromkeys((shards, slices if shards % slices == 0 else 1)):
        sizes = {"data": data, "fsdp": shards // data, "context": context}
        text = ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "data=1"
        spread = sizes["fsdp"] * context
        links = (gathers + 1) * pieces * weights * (spread - 1) / spread + 2 * weights / spread * (data - 1) / data
        options.append(MeshOption(text, state / spread, links))
    return options if options[0].state <= SMALL_STATE else options[::-1]


def slice_count(devices: list[jax.Device]) -> int:
    """Number of TPU slices that the devices belong to; 1 for other devices."""
    return max(1, len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}))


class HostRows(NamedTuple):
    """The slice of a batch that a process reads, of `count` equal ones; one of the processes that read the same slice `counts` it."""

    index: int
    count: int
    counts: bool

    @classmethod
    def of(cls, mesh: Mesh, process: int) -> HostRows:
        """The slice of rows that the devices of a process hold; UserError if two processes share only some of their rows."""
        shards, starts = row_shards(mesh), defaultdict(set)
        for device, (rows,) in batch_sharding(mesh).devices_indices_map((shards,)).items():
            starts[device.process_index].add(rows.start or 0)
        held = {process: tuple(sorted(rows)) for process, rows in starts.items()}
        slices = sorted(set(held.values()))
        askew = "runtime.mesh spreads the rows unevenly over processes; let context and tensor stay inside a process, or span whole ones"
        require(len({len(rows) for rows in slices}) == 1 and sum(map(len, slices)) == shards, askew)
        first = min(other for other, rows in held.items() if rows == held[process])
        return cls(slices.index(held[process]), len(slices), process == first)


def row_shards(mesh: Mesh) -> int:
    """The number of devices over which the rows of a batch are sharded."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])
