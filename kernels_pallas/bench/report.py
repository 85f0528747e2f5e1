"""Writes docs/kernels.md and docs/kernels.png from results. The prose around the tables is written by hand and is kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from kernels_pallas.bench.compiled import CHIPS
from kernels_pallas.bench.programs import Program

VECTOR_LANES = 1024  # of one vector slot: 8 sublanes x 128 lanes
COLORS = {"pallas_tpu": "#1b6ca8", "splash": "#e08e0b", "xla": "#7a7a7a", "lax.scan": "#b0b0b0", "associative_scan": "#d0d0d0"}


class Bound(NamedTuple):
    """Lower bound of a program's time, in millions of cycles; each kernel takes max(schedule, memory)."""

    kernels: float
    memory: float  # time of the kernels' bytes at the chip's bandwidth
    around: float  # XLA's estimate of everything outside the kernels
    total: float
    useful: float | None  # share of the scores, or of the vector slots, that the operation needs


def bound(program: Program, result: Mapping[str, Any], chip: str) -> Bound:
    """The bound of one compiled program."""
    kernels = result["kernels"]
    per_byte = CHIPS[chip].clock / CHIPS[chip].bandwidth
    cycles, memory = [k["cycles"] for k in kernels], [k["bytes"] * per_byte for k in kernels]
    useful = program.useful or None
    if program.necessary and kernels:
        useful = program.necessary / sum(k["cycles"] * k["vector_slots"] * VECTOR_LANES for k in kernels)
    around = result["xla_cycles"]
    total = around + sum(map(max, cycles, memory))
    return Bound(*(1e-6 * x for x in (sum(cycles), sum(memory), around, total)), useful)


def schedule_section(programs: Sequence[Program], results: Mapping[str, Mapping], chip: str) -> str:
    """The table of compiled costs, followed by the regions of every kernel."""
    head = "shape,implementation,passes,kernels,memory,XLA,bound,ms,against ours,useful,temporary MB".split(",")
    lines = [
        f"Compiled for one {chip} ({CHIPS[chip].clock} GHz, {CHIPS[chip].bandwidth} GB/s) by libtpu {version('libtpu')} with jax "
        f"{version('jax')}: `python -m kernels_pallas.bench --chip {chip}`. Cycles in millions.",
    ]
    for op in dict.fromkeys(p.op for p in programs):
        lines += ["", f"### {op}", "", *_table(head, [_row(p, programs, results, chip) for p in programs if p.op == op])]
    lines += ["", "### Regions of the kernels", "", "Bundles x visits of each region in program order; shares of slots used.", ""]
    lines += _table(
        ["program", "kernel", "regions", "vector", "matrix", "transcendental", "load", "store"], _regions(programs, results)
    )
    return "\n".join(lines)


def _row(program: Program, programs: Sequence[Program], results: Mapping[str, Mapping], chip: str) -> list[str]:
    result = results[program.name]
    name = program.implementation + (f" ({program.note})" if program.note else "")
    if "does_not_fit" in result:
        need = re.search(r"\(([\d.]+[KMGT])\)", result["does_not_fit"])
        return [program.shape, name, program.passes, *["-"] * 7, f"does not fit ({need.group(1)})" if need else "does not fit"]
    cost = bound(program, result, chip)
    ours = _ours(program, programs, results, chip)
    ratio = "-" if ours is None or program.implementation == "pallas_tpu" else f"{cost.total / ours:.2f}x"
    numbers = [f"{x:.3f}" if x else "-" for x in (cost.kernels, cost.memory, cost.around, cost.total)]
    useful = f"{100 * cost.useful:.1f} %" if cost.useful else "-"
    ms = cost.total / CHIPS[chip].clock
    return [program.shape, name, program.passes, *numbers, f"{ms:.3f}", ratio, useful, f"{result['temporary_bytes'] / 1e6:.1f}"]


def _ours(program: Program, programs: Sequence[Program], results: Mapping[str, Mapping], chip: str) -> float | None:
    """Bound of the pallas_tpu program of the same op, shape and passes."""
    wanted = program.op, program.shape, program.passes, "pallas_tpu"
    found = (other for other in programs if (other.op, other.shape, other.passes, other.implementation) == wanted)
    return next((bound(other, results[other.name], chip).total for other in found), None)


def _regions(programs: Sequence[Program], results: Mapping[str, Mapping]) -> list[list[str]]:
    rows = []
    for program in programs:
        for kernel in results[program.name].get("kernels", ()) if program.passes == "both" else ():
            regions = ", ".join(f"{r['bundles']:,} x {r['visits']:,}" for r in kernel["regions"] if r["bundles"])
            slots = [f"{100 * kernel['slots'][name]:.0f} %" for name in ("VALU", "MXU", "EUP", "VLOAD", "VSTORE")]
            rows.append([f"{program.op}, {program.shape}, {program.implementation}", kernel["name"], regions, *slots])
    return rows


def clock_section(programs: Sequence[Program], results: Mapping[str, Mapping], device: str) -> str:
    """The table of measured times."""
    lines = [
        f"Measured on one {device}, jax {version('jax')}: `python -m kernels_pallas.bench`. Milliseconds a call: median (range)."
    ]
    rows = []
    for program in programs:
        result = results[program.name]
        text = "does not fit"
        if "median_ms" in result:
            text = f"{result['median_ms']:.3f} ({result['least_ms']:.3f} to {result['most_ms']:.3f})"
        rows.append([program.op, program.shape, program.implementation, program.passes, text])
    return "\n".join([*lines, "", *_table(["op", "shape", "implementation", "passes", "ms"], rows)])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def replace_section(page: Path, name: str, text: str) -> None:
    """Put `text` between the page's <!-- NAME --> and <!-- /NAME --> marks. Raises ValueError when it has no such marks."""
    old = page.read_text(encoding="utf-8")
    marks = f"<!-- {name} -->", f"<!-- /{name} -->"
    if any(mark not in old for mark in marks):
        raise ValueError(f"{page} has no {marks[0]} ... {marks[1]} to write between")
    head, _, rest = old.partition(marks[0])
    page.write_text(head + marks[0] + "\n" + text + "\n" + marks[1] + rest.partition(marks[1])[2], encoding="utf-8")


def plot(programs: Sequence[Program], results: Mapping[str, Mapping], chip: str, path: Path) -> None:
    """Bars of the bounds in milliseconds, one panel per operation; logarithmic, because the times differ widely."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [p for p in programs if "does_not_fit" not in results[p.name]]
    ops = list(dict.fromkeys(p.op for p in shown))
    heights = [sum(p.op == op for p in shown) for op in ops]
    figure, axes = pyplot.subplots(
        len(ops), 1, figsize=(9, 0.24 * sum(heights) + 0.9 * len(ops)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for ax, op in zip(axes[:, 0], ops, strict=True):
        own = [p for p in shown if p.op == op]
        times = [bound(p, results[p.name], chip).total / CHIPS[chip].clock for p in own]
        bars = ax.barh(range(len(own)), times, color=[COLORS[p.implementation] for p in own])
        ax.bar_label(bars, [f"{t:.3g}" for t in times], padding=3, fontsize=8)
        ax.set_yticks(range(len(own)), [f"{p.shape}, {p.passes}: {p.implementation}" for p in own], fontsize=8)
        ax.set(xscale="log", title=f"{op}: lower bound on one {chip}, ms")
        ax.set_xlim(right=max(times) * 2.5)
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
