"""How a run is carried out; nothing here changes a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from metajax.core.errors import nearest, require
from metajax.core.fields import Count, CountOrZero, NotNegative, Part, Range, Size, convert

# Of the device mesh. Rows of a batch are spread over data and fsdp, parameters and optimiser over fsdp, long rows over context, and heads,
# channels and the hidden units of feed-forward networks over tensor. Neighbours in the last axes are neighbours in the hardware.
AXES = ("data", "fsdp", "context", "tensor")
Seconds = Annotated[float, Range(0, 10**9)]
Processes = Annotated[int, Range(1, 10**6)]


def mesh_axes(text: str) -> dict[str, int]:
    """{axis: size} that `runtime.mesh` names, such as "data=2,fsdp=-1", where -1 takes the devices that are left.

    Raises:
      UserError: another form, an unknown axis or one that is named twice, or two sizes of -1.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = (word.strip() for word in part.partition("="))
        require(name in AXES, f"runtime.mesh = {text!r}: unknown axis {name!r}{nearest(name, AXES)}; axes: {', '.join(AXES)}")
        require(name not in sizes, f"runtime.mesh = {text!r}: {name} is there twice")
        sizes[name] = -1 if size == "-1" else convert(size, Size, f"runtime.mesh = {text!r}: {name}")
    require(list(sizes.values()).count(-1) < 2, f"runtime.mesh = {text!r}: only one axis can be -1")
    return sizes


@dataclass(frozen=True)
class Runtime(Part, path="runtime"):
    """How a run is carried out. Nothing here changes what is computed, so the identity hash leaves it out."""

    log_every: Count = 10
    save_every: Count = 50
    keep: Count = 2  # newest checkpoints kept, beside the best
    # A step that is not finite, or whose gradient norm is above the limit: stop with a replay bundle, or leave it out and say so in the
    # report. Outside the hash, for a run that meets no such step is the same.
    on_bad_step: Literal["stop", "skip"] = "stop"
    max_grad_norm: NotNegative = 0.0  # before clipping; 0: no limit
    max_skipped: Count = 10  # steps left out in a row, at which a run stops after all
    profile: tuple[Count, ...] = ()  # first and last step of a profile for xprof
    # Without a step, save or evaluation the process ends with its stacks; 0: never. The second is for restoring, compiling and the first step.
    hang_seconds: Seconds = 1800.0
    startup_seconds: Seconds = 7200.0
    loggers: tuple[str, ...] = ()  # tensorboard, wandb
    workers: Annotated[int, Range(0, 1024)] = 0  # grain reader processes; 0: threads
    mesh: str = "data=1,fsdp=-1"  # axis=size; one -1 takes the devices that are left
    remat: Literal["none", "full", "dots"] = "none"
    unroll: CountOrZero = 0  # layers unrolled in one scan step; 0: all (fastest on CPU), 1: fastest to compile
    implementation: Literal["auto", "reference", "xla", "pallas_tpu"] = "auto"

    def __post_init__(self) -> None:
        profile = self.profile
        require(
            not profile or (len(profile) == 2 and profile[0] <= profile[1]),
            f"runtime.profile = {profile}: the first and the last step of the profile, such as 20,25",
        )
        require(mesh_axes(self.mesh) != {}, "runtime.mesh is empty; name an axis and its size, such as data=1,fsdp=-1")
        for logger in self.loggers:
            known = ("tensorboard", "wandb")
            require(logger in known, f"runtime.loggers: unknown {logger!r}{nearest(logger, known)}; known: {', '.join(known)}")
