"""Reads the TPU compiler's schedule: a kernel's bundles by region of its program, and XLA's estimates.

With LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true" the compiler writes, for each kernel, its final VLIW
program (*final_bundles.txt; a bundle is one cycle without stalls) and the slots that each bundle uses. A grid is a loop and
`pl.when` a predicated region. So the sum over regions of bundles x visits is a lower bound on the cycles of a call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s[^{]*:[ >]*\{")
_BRANCH = re.compile(r"sbr\.rel (\([^)]*\) )?target = \$region(\d+)")
_START = re.compile(r"(?:Start|Start/End empty) region (\d+)")


@dataclass
class Region:
    """A loop's body or a predicated region, in bundles [start, end); `own` and `slots` exclude the regions inside."""

    kind: str  # "program", "loop" or "if"
    start: int
    end: int
    inner: list[Region] = field(default_factory=list)
    own: int = 0
    slots: tuple[int, ...] = ()

    def walk(self) -> Iterator[Region]:
        """Yield this region and all regions inside it, in program order."""
        yield self
        for region in self.inner:
            yield from region.walk()


@dataclass(frozen=True)
class Cost:
    """Cycles of one call, and the share of slots used in those cycles, by kind of slot."""

    cycles: int
    use: dict[str, float]


@dataclass(frozen=True)
class Visits:
    """How often a call enters one region of the kernel's body: a `pl.when` ("if") or an iteration of a "loop".

    A `slight` region may be too small to be recognised; it then counts as part of the surrounding region.
    """

    kind: str
    times: int
    slight: bool = False


@dataclass(frozen=True)
class Schedule:
    """A kernel's program. The grid is its outermost loop; a step is the largest region in it; the other regions start copies."""

    name: str
    program: Region
    capacity: dict[str, int]

    def visited(self, steps: int, inside: Sequence[Visits], copies: int | None = None) -> list[tuple[Region, int]]:
        """Every region with its visits in a call of `steps` grid steps; `inside` are the regions of a step in program order.

        Copies count once per step, an upper bound, or `copies` times. They are outside the step, or after its declared regions.
        Raises ValueError if the program does not have these regions, so that the visits belong to another program.
        """
        grid = next(region for region in self.program.walk() if region.kind == "loop")
        step = max(grid.inner, key=lambda region: region.end - region.start)
        found = list(step.walk())[1:]
        if len(found) < len(inside):
            inside = [visits for visits in inside if not visits.slight]
        if [region.kind for region in found[: len(inside)]] != [visits.kind for visits in inside]:
            shape = ", ".join(f"{region.kind} of {region.own} bundles" for region in found)
            raise ValueError(f"{self.name}: {len(inside)} regions are declared, but the schedule has {shape}")
        times = {id(region): visits.times for region, visits in zip(found, inside, strict=False)}
        times |= {id(region): 1 for region in self.program.walk() if region.start < grid.start}  # "is the grid empty?"
        times |= {id(step): steps, id(grid): steps + 2}  # the pipeline runs two steps longer than the grid
        return [(region, times.get(id(region), steps if copies is None else copies)) for region in self.program.walk()]

    def cost(self, steps: int, inside: Sequence[Visits], copies: int | None = None) -> Cost:
        """The cost of a call; the arguments are those of `visited`."""
        visited = self.visited(steps, inside, copies)
        cycles = sum(region.own * times for region, times in visited)
        used = (sum(region.slots[i] * times for region, times in visited) for i in range(len(self.capacity)))
        return Cost(cycles, {name: n / (cycles * width) for (name, width), n in zip(self.capacity.items(), used, strict=True)})


def read_schedule(folder: Path, kernel: str, smallest: int = 16, delay: int = 4) -> Schedule:
    """The schedule of the only kernel in dump `folder` whose name contains `kernel`.

    `delay` bundles after a branch run whether or not it is taken.
    Predicated regions of fewer than `smallest` bundles (one copy started or awaited) count as part of the surrounding region,
    as if always taken. Raises ValueError if the dump holds no such kernel or several, or has another format.
    """
    paths = [p for p in folder.glob(f"*{kernel}*final_bundles.txt") if "schedule-analysis" not in p.name]
    if len(paths) != 1:
        raise ValueError(f"{len(paths)} kernels named {kernel} in {folder}, expected 1")
    bundles = [line for line in paths[0].read_text(errors="replace").splitlines() if _BUNDLE.match(line)]
    stem = re.sub(r"\d+-final_bundles\.txt$", "", paths[0].name)
    (slots_file,) = folder.glob(f"{stem}*final_hlo-static-per-bundle-utilization.txt")
    _, names, capacities, _, *lines = slots_file.read_text().splitlines()
    capacity = dict(zip(names.split(", "), map(int, capacities.split()), strict=True))
    used = [tuple(map(int, line.split())) for line in lines]
    if len(used) != len(bundles):
        raise ValueError(f"{paths[0].name}: {len(bundles)} bundles but slots of {len(used)}: an unknown form of the dump")
    program = _nest(_regions(bundles, smallest, delay), len(bundles))
    for region in program.walk():
        inside = {i for child in region.inner for i in range(child.start, child.end)}
        own = [used[i] for i in range(region.start, region.end) if i not in inside]
        region.own, region.slots = len(own), tuple(map(sum, zip(*own, strict=True))) if own else (0,) * len(capacity)
    return Schedule(kernel, program, capacity)


def _regions(bundles: Sequence[str], smallest: int, delay: int) -> list[Region]:
    """Loops and predicated regions from the branches: a forward branch skips a region, a backward branch closes a loop."""
    starts = {name: i for i, line in enumerate(bundles) for name in _START.findall(line)}
    loops, regions = [], []
    for i, line in enumerate(bundles):
        if re.match(r"\s*\S+ LB", line):
            loops.append(i)
        branch = _BRANCH.search(line)
        if branch is None:
            continue
        target = starts.get(branch.group(2), len(bundles))  # a label that is never printed means the end
        after = i + 1 + delay
        if target <= i:
            regions.append(Region("loop", loops.pop(), after))
        elif target - after >= smallest:
            regions.append(Region("if", after, target))
    return regions


def _nest(regions: list[Region], length: int) -> Region:
    program = Region("program", 0, length)
    path = [program]
    for region in sorted(regions, key=lambda r: (r.start, -r.end)):
        while region.start >= path[-1].end:
            path.pop()
        if region.end > path[-1].end:
            raise ValueError(f"regions [{region.start}, {region.end}) and [{path[-1].start}, {path[-1].end}) overlap")
        path[-1].inner.append(region)
        path.append(region)
    return program


# -------------------------------------------------------------------------------------------------- XLA's programs

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r"\b(?:calls|to_apply)=%([\w.\-]+)")
_WHILE = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_NUMBER = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Operation(NamedTuple):
    """A line of an optimised program, how often it runs, its computation, and whether that belongs to a fusion or a call."""

    line: str
    times: int
    computation: str
    called: bool


def xla_cycles(hlo: str) -> int:
    """XLA's estimate of the cycles of an optimised TPU program. Pallas kernels have no estimate and count 0."""
    return sum(op.times * int(cycles) for op in operations(hlo) for cycles in _CYCLES.findall(op.line))


def operations(hlo: str, called: bool = False) -> Iterator[Operation]:
    """The operations of an optimised program, with those of loops once per iteration. `called`: include fusions and calls.

    The iterations of a `while` are those that XLA states with it, else `_trips` counts them.
    """
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            lines = bodies.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        else:
            lines.append(line)

    def walk(name: str, times: int, inside: bool = False) -> Iterator[Operation]:
        for line in bodies[name]:
            loop = _WHILE.search(line)
            if loop:
                stated = _KNOWN_TRIPS.search(line)
                trips = int(stated.group(1)) if stated else _trips(bodies[loop.group(1)], bodies[loop.group(2)])
                yield from walk(loop.group(2), times * trips, inside)
                continue
            yield Operation(line, times, name, inside)
            for inner in _CALLED.findall(line) if called else ():
                yield from walk(inner, times, True)

    return walk(entry, 1)


def _trips(condition: list[str], body: list[str]) -> int:
    """Iterations of a loop: the constant of its condition over the constant that its body adds to the counter, which starts at 0."""
    lines = {name: line for line in body for name in re.findall(r"^\s*(?:ROOT )?%([\w.\-]+) = ", line)}
    limits = [int(n) for line in condition for n in _NUMBER.findall(line)]
    counters = [int(n) for line in condition for n in re.findall(r" get-tuple-element\(.*\), index=(\d+)", line)]
    results = [re.findall(r"%([\w.\-]+)", line.partition(" tuple(")[2]) for line in body if "ROOT " in line]
    if len(limits) == len(counters) == len(results) == 1:
        added = re.search(r" add\(%([\w.\-]+), %([\w.\-]+)\)", lines[results[0][counters[0]]])
        steps = [int(n) for name in added.groups() for n in _NUMBER.findall(lines[name])] if added else []
        if len(steps) == 1:
            return -(-limits[0] // steps[0])
    shown = "; ".join(line.strip() for line in condition)
    raise ValueError(f"a loop has no single constant number of trips: {shown}")
