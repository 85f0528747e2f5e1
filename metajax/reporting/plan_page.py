"""A plan as sections of facts for its page and the terminal: memory of a chip, bounds of a step, and advice on what fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metajax.reporting import page
from metajax.reporting.page import Part

GIB = 2**30
TIMES = {
    "operations": "operations at the chips' peak",
    "kernels": "kernels as scheduled, all else at the peak",
    "state": "the state, read and written once",
    "links": "links between chips",
    "network": "network between slices",
}


def write_plan_page(path: Path, plan: dict[str, Any]) -> None:
    """Write the page of a plan from `metajax.planning.plan.plan`."""
    mesh = "".join(f", {axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    measured = plan_facts(plan) if plan["fits"] else []
    buffers = page.section("The largest buffers", page.lines([buffer_text(buffer) for buffer in plan["largest_buffers"]]))
    page.write_page(
        path,
        title=f"{plan['name']} on {plan['topology']}",
        eyebrow=f"Plan · scale {plan['scale']} · {plan['topology']}: {plan['chips']} chips{mesh}",
        heading=plan["name"],
        sentence="The train step compiled for a slice that is absent. Memory is the compiler's own account. Times are lower bounds, or the "
        "compiler's estimate where it says so. Nothing was measured.",
        sections=[
            page.section("Memory of a chip", *_memory(plan, measured), *map(page.text, advice_lines(plan))),
            *(page.section(title, page.facts(pairs)) for title, _, pairs in measured[1:]),
            buffers,
            page.section("", page.text(f"Compiled in {plan['compile_seconds']:.0f} s.", "small")) if plan["fits"] else None,
        ],
    )


def _memory(plan: dict[str, Any], measured: list[tuple[str, str, list[tuple[str, str]]]]) -> list[Part]:
    """The memory as a bar and as facts, or the reason if the step does not fit."""
    if not plan["fits"]:
        return [page.text(f"It does not fit: {plan['reason']}")]
    limit = plan["memory"]["limit"]
    parts = [
        {"name": name, "css": f"p{i}", "percent": f"{100 * size / limit:.2f}"}
        for i, (name, size) in enumerate(memory_kinds(plan).items(), 1)  # at most nine, as many as colours
    ]
    row = {"name": f"{plan['memory']['total'] / GIB:.3f} GiB", "total": f"of {limit / GIB:g} GiB", "parts": parts}
    return [page.bars([row]), page.facts((name, f"{size} GiB") for name, size in measured[0][2][:-1])]


def plan_facts(plan: dict[str, Any]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(title, unit, names and values) of all facts of a plan that fits. Memory comes first; its last line is the total.

    The times of a step are lower bounds, of which the largest applies. The compiler's estimate without waiting is not a bound.
    """
    memory, bound, estimate, known = plan["memory"], plan["bound"], plan["estimate"], "schedules" in plan
    names = TIMES if known else {name: words for name, words in TIMES.items() if name != "kernels"}
    together = [("together", _ms(estimate["step"])), ("MFU", f"{estimate['mfu']:.1%}")] if known else []
    count, unit, flops, parts = plan["reads"]["count"], plan["reads"]["unit"], plan["flops"], plan["flops_by_part"]
    kinds = [(name, f"{size / GIB:.3f}") for name, size in memory_kinds(plan).items()]
    total = f"{memory['total'] / GIB:.3f} of {memory['limit'] / GIB:g}"
    links = [
        (kind, f"{n['count']:,} times, {n['bytes'] / 1e6:,.1f} MB, {1e3 * n['seconds']:.3f} ms at least")
        for kind, n in plan["collectives"].items()
    ]
    sections = {
        ("Memory of a chip", "GiB"): [*kinds, ("total", total)],
        ("Time of a step, at least", ""): [
            *((words, _ms(bound[name])) for name, words in names.items()),
            ("a step, at least", _ms(bound["step"])),
            ("MFU, at most", f"{bound['mfu']:.1%}"),
        ],
        ("By the compiler's estimate", ""): [
            ("kernels as scheduled", _ms(estimate["kernels"]) if known else "not asked for (--schedules)"),
            ("all else, by XLA's model", _ms(estimate["xla"])),
            *together,
            ("products of the program", f"{plan['products'] * plan['chips'] / flops:.2f} of the operations counted below"),
            ("to and from HBM", f"{plan['hbm_bytes'] / 1e9:,.1f} GB"),
        ],
        ("Operations", ""): [
            (f"{count:,} {unit} of a step", f"{flops:.3e}"),
            (f"each of the {unit}", f"{flops / count:.3e}"),
            *((part, f"{cost:.3e}, {cost / sum(parts.values()):.1%}") for part, cost in parts.items()),
        ],
        ("Pallas kernels found", ""): _kernels(plan) or [("none", "XLA alone")],
        ("Between chips, in a step", ""): links or [("none", "one chip, or no communication")],
    }
    return [(title, unit, facts) for (title, unit), facts in sections.items()]


def _kernels(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Calls of each kernel in a step, and the cycles of each of its forms if they were asked for."""
    if "schedules" not in plan:
        return [(name, f"{times:,} calls") for name, times in plan["kernels"].items()]
    calls = []
    for kernel in plan["schedules"]:
        text = f"{kernel['times']:,} calls of {kernel['cycles']:,} cycles, {_ms(kernel['seconds'])}"
        if "unread" in kernel:
            text = f"{kernel['times']:,} calls, whose schedule cannot be read: {kernel['unread']}"
        calls.append((f"{kernel['name']} of {max(kernel['operands'], key=len)}", text))
    return calls


def buffer_text(buffer: dict[str, Any]) -> str:
    """A buffer's size, shape and source as one line."""
    size = f"{buffer['bytes'] / GIB:.3f} GiB"
    return "  ".join(filter(None, (size, buffer["shape"], buffer["operation"], buffer["source"] or buffer["name"])))


def memory_kinds(plan: dict[str, Any]) -> dict[str, int]:
    """Bytes of a chip by kind, which sum to the total; "temporaries" are neither activations nor gradients."""
    memory, state = plan["memory"], plan["state"]
    kinds = {name: size for name, size in plan["temporaries"].items() if name != "other"}
    if sum(kinds.values()) > memory["temporaries"]:  # the compiler's two counts differ by a few kilobytes
        kinds = {}
    return {
        **state,
        "batch": memory["arguments"] - sum(state.values()),
        **kinds,
        "temporaries": memory["temporaries"] - sum(kinds.values()),
        "outputs": memory["outputs"],
        "program": memory["program"],
    }


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def advice_lines(plan: dict[str, Any]) -> list[str]:
    """The changes tried if the plan does not fit, and the largest batch if it was asked for."""
    lines = []
    if not plan["fits"]:
        line = "Recomputing activations and accumulating over the smallest micro-batches do not make it fit: take a larger slice, or a smaller model."
        if advice := plan["advice"]:
            words = " ".join(f"--set {field}={value}" for field, value in advice["changes"].items())
            line = f"It fits with {words}: {advice['total'] / GIB:.2f} GiB. This was compiled too."
        lines.append(line)
    if "largest_batch" in plan:
        lines.append("The largest batch that fits: {field}={size}.".format(**plan["largest_batch"]))
    return lines
