"""Config of how a run is executed; nothing here changes a result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from metajax.core.errors import nearest, require
from metajax.core.fields import Count, CountOrZero, NotNegative, OnlyWith, Part, Range, Size, convert

# Axes of the device mesh. Rows of a batch are sharded over data and fsdp, parameters and optimiser over fsdp and
# context, long rows over context, and heads, channels and feed-forward units over tensor. Neighbours in the last axes are neighbours in the hardware.
AXES = ("data", "fsdp", "context", "tensor")
AUTO_MESH = "auto"
Seconds = Annotated[float, Range(0, 10**9)]
Processes = Annotated[int, Range(1, 10**6)]


def mesh_axes(text: str) -> dict[str, int]:
    """{axis: size} of `runtime.mesh`, such as "data=2,fsdp=-1"; -1, for one axis at most, takes the remaining devices.

    "auto" is {"fsdp": -1} wherever nothing is known of the model.
    """
    if text == AUTO_MESH:
        return {"fsdp": -1}
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = (word.strip() for word in part.partition("="))
        require(name in AXES, f"runtime.mesh = {text!r}: unknown axis {name!r}{nearest(name, AXES)}; axes: {', '.join(AXES)}")
        require(name not in sizes, f"runtime.mesh = {text!r}: it names {name} twice")
        sizes[name] = -1 if size == "-1" else convert(size, Size, f"runtime.mesh = {text!r}: {name}")
    require(list(sizes.values()).count(-1) < 2, f"runtime.mesh = {text!r}: only one axis can be -1")
    return sizes


@dataclass(frozen=True)
class Runtime(Part, path="runtime"):
    """How a run is executed. Nothing here changes a result, so the identity hash leaves it out."""

    log_every: Count = 10
    save_every: Count = 50
    keep: Count = 2  # number of newest checkpoints kept, besides the best
    # On a step that is not finite, or whose gradient norm exceeds the limit: stop with a replay bundle, or skip the step and
    # report it. Not in the hash, because a run without such a step is the same.
    on_bad_step: Literal["stop", "skip"] = "stop"
    max_grad_norm: NotNegative = 0.0  # before clipping; 0: no limit
    max_skipped: Annotated[Count, OnlyWith("on_bad_step", "skip")] = 10  # the run stops after this many skipped steps in a row
    profile: tuple[Count, ...] = ()  # first and last step of a profile for xprof
    # The process exits with its stacks after so long without a step, save or evaluation, or, at the start, without a first step; 0: never.
    hang_seconds: Seconds = 1800.0
    startup_seconds: Seconds = 7200.0
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    workers: Annotated[int, Range(0, 1024)] = 0  # grain reader processes; 0: threads
    mesh: str = AUTO_MESH  # axis=size, one -1 takes the remaining devices; auto: by the sizes of state and batch
    remat: Literal["none", "full", "dots"] = "none"
    unroll: CountOrZero = 0  # layers unrolled in one scan step; 0: all (fastest on CPU), 1: fastest to compile
    implementation: Literal["auto", "reference", "xla", "pallas_tpu"] = "auto"

    def __post_init__(self) -> None:
        profile = self.profile
        is_window = not profile or (len(profile) == 2 and profile[0] <= profile[1])
        require(is_window, f"runtime.profile = {profile}: the first and the last step of the profile, such as 20,25")
        require(mesh_axes(self.mesh) != {}, "runtime.mesh is empty; name an axis and its size, such as fsdp=-1, or auto")
