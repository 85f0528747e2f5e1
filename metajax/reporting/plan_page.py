"""A plan as sections of facts for its page and the terminal: memory of a chip, bounds of a step, and advice on what fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metajax.reporting import page
from metajax.reporting.page import Part

GIB = 2**30


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
    """(title, unit, names and values) of all facts of a plan that fits. Memory comes first; its last line is the total."""
    memory = [(name, f"{size / GIB:.3f}") for name, size in memory_kinds(plan).items()]
    total = ("total", f"{plan['memory']['total'] / GIB:.3f} of {plan['memory']['limit'] / GIB:g}")
    return [
        ("Memory of a chip", "GiB", [*memory, total]),
        ("Time of a step, at least", "", time_facts(plan)),
        ("By the compiler's estimate", "", estimate_facts(plan)),
        ("Operations", "", operation_facts(plan)),
        ("Pallas kernels found", "", kernel_facts(plan)),
        ("Between chips, in a step", "", link_facts(plan)),
    ]


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


def time_facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Lower bounds of a step's time; the largest one applies."""
    names = {
        "operations": "operations at the chips' peak",
        "kernels": "kernels as scheduled, all else at the peak",
        "state": "the state, read and written once",
        "links": "links between chips",
        "network": "network between slices",
    }
    bound = plan["bound"]
    counted = [name for name in names if name != "kernels" or "schedules" in plan]
    times = [(names[name], _ms(bound[name])) for name in counted]
    return [*times, ("a step, at least", _ms(bound["step"])), ("MFU, at most", f"{bound['mfu']:.1%}")]


def estimate_facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The compiler's estimate of a step without waiting; it is not a bound."""
    estimate, known = plan["estimate"], "schedules" in plan
    facts = [("kernels as scheduled", _ms(estimate["kernels"]) if known else "not asked for (--schedules)")]
    facts += [("all else, by XLA's model", _ms(estimate["xla"]))]
    return facts + ([("together", _ms(estimate["step"])), ("MFU", f"{estimate['mfu']:.1%}")] if known else [])


def operation_facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Operations of a step, in total and by part."""
    count, unit = plan["reads"]["count"], plan["reads"]["unit"]
    facts = [(f"{count:,} {unit} of a step", f"{plan['flops']:.3e}"), (f"each of the {unit}", f"{plan['flops'] / count:.3e}")]
    parts = plan["flops_by_part"]
    return facts + [(part, f"{cost:.3e}, {cost / sum(parts.values()):.1%}") for part, cost in parts.items()]


def kernel_facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Calls of each kernel in a step, and the cycles of each of its forms if they were asked for."""
    calls = [(name, f"{times:,} calls") for name, times in plan["kernels"].items() if "schedules" not in plan]
    for kernel in plan.get("schedules", ()):
        text = f"{kernel['times']:,} calls of {kernel['cycles']:,} cycles, {_ms(kernel['seconds'])}"
        unread = f"{kernel['times']:,} calls, whose schedule cannot be read: {kernel.get('unread')}"
        calls.append((f"{kernel['name']} of {max(kernel['operands'], key=len)}", unread if "unread" in kernel else text))
    return calls or [("none", "XLA alone")]


def link_facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Transfers between chips in a step."""
    return [
        (kind, f"{n['count']:,} times, {n['bytes'] / 1e6:,.1f} MB, {1e3 * n['seconds']:.3f} ms at least")
        for kind, n in plan["collectives"].items()
    ] or [("nothing", "one chip, or nothing to tell each other")]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def advice_lines(plan: dict[str, Any]) -> list[str]:
    """The changes tried if the plan does not fit, and the largest batch if it was asked for."""
    lines = []
    if not plan["fits"]:
        advice = plan["advice"]
        words = advice and " ".join(f"--set {field}={value}" for field, value in advice["changes"].items())
        lines.append(
            f"It fits with {words}: {advice['total'] / GIB:.2f} GiB. This was compiled too."
            if advice
            else "Recomputing activations and accumulating over the smallest micro-batches do not make it fit: take a larger slice, or a smaller model."
        )
    if "largest_batch" in plan:
        lines.append("The largest batch that fits: {field}={size}.".format(**plan["largest_batch"]))
    return lines
