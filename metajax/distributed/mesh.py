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
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices <= 1:
        return jax.make_mesh(shape, tuple(sizes), axis_types=types, devices=devices)
    spread = f"runtime.mesh = {text!r}: {slices} slices are spread over data; give it a multiple, such as data={slices},fsdp=-1"
    require(shape[0] % slices == 0, spread)
    within, between = (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
    return Mesh(create_hybrid_device_mesh(within, between, devices), tuple(sizes), axis_types=types)


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
