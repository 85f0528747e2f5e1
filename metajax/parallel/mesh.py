"""The device mesh from a one-line description such as "data=2,fsdp=-1"."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh

from metajax.config import UserError, nearest, require

AXES = ("data", "fsdp")


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """Axis sizes for `devices` devices; one size may be -1 and takes what is left.

    Raises:
      UserError: unknown axis, not a number, or sizes that do not multiply to the number of devices.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        require(name in AXES, f"runtime.mesh = {text!r}: unknown axis {name!r}{nearest(name, AXES)}; axes: {', '.join(AXES)}")
        try:
            sizes[name] = int(size)
        except ValueError:
            raise UserError(f"runtime.mesh = {text!r}: {name} needs a whole number, such as {name}=2") from None
    free = [name for name, size in sizes.items() if size == -1]
    require(len(free) <= 1, f"runtime.mesh = {text!r}: only one axis can be -1")
    if free:
        sizes[free[0]] = max(1, devices // math.prod(s for s in sizes.values() if s != -1))
    require(
        math.prod(sizes.values()) == devices,
        f"runtime.mesh = {text!r} is {' x '.join(map(str, sizes.values()))} = {math.prod(sizes.values())}, but there are {devices} devices",
    )
    return sizes


def make_mesh(text: str, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or the given ones), axes named `AXES`, sharding left to the compiler within the rules."""
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(text, len(devices))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)
