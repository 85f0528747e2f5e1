"""A plan as a page: the memory of a chip as a picture, what does not fit and what would, the bounds of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metajax.core.atomic import write_text
from metajax.reporting.html import templates

GIB = 2**30


def write_plan_page(path: Path, plan: dict[str, Any]) -> None:
    """Write the page of a plan as `metajax.planning.plan.plan` makes it."""
    shown: dict[str, Any] = {"advice": advice_lines(plan)}
    if plan["fits"]:
        memory, sizes = plan["memory"], memory_kinds(plan)
        shown |= {
            "memory": [
                {"name": name, "css": f"p{i}", "gib": f"{size / GIB:.3f}", "percent": f"{100 * size / memory['limit']:.2f}"}
                for i, (name, size) in enumerate(sizes.items(), 1)  # nine at most, and as many colours
            ],
            "memory_facts": [(name, f"{size / GIB:.3f} GiB") for name, size in sizes.items()],
            "total": f"{memory['total'] / GIB:.3f}",
            "limit": f"{memory['limit'] / GIB:g}",
            "time_facts": time_facts(plan),
            "estimate_facts": estimate_facts(plan),
            "operation_facts": operation_facts(plan),
            "kernel_facts": kernel_facts(plan),
            "link_facts": link_facts(plan),
        }  # fmt: skip
    write_text(
        path, templates.get_template("plan.html").render(title=f"{plan['name']} on {plan['topology']}", plan=plan, **shown)
    )


def memory_kinds(plan: dict[str, Any]) -> dict[str, int]:
    """Bytes of a chip by kind, as they add up to the total; "temporaries" are those that are neither activations nor gradients."""
    memory, state = plan["memory"], plan["state"]
    kinds = {name: size for name, size in plan["temporaries"].items() if name != "other"}
    if sum(kinds.values()) > memory["temporaries"]:  # of a few kilobytes the compiler's two accounts differ
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
    """What bounds a step from below: the longest of these."""
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
    """What the compiler expects of a step when nothing waits, which is no bound."""
    estimate, known = plan["estimate"], "schedules" in plan
    facts = [("kernels as scheduled", _ms(estimate["kernels"]) if known else "not asked for (--schedules)")]
    facts += [("all else, by XLA's model", _ms(estimate["xla"]))]
    return facts + ([("together", _ms(estimate["step"])), ("MFU", f"{estimate['mfu']:.1%}")] if known else [])


def operation_facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Operations of a step, and by part."""
    count, unit = plan["reads"]["count"], plan["reads"]["unit"]
    facts = [(f"{count:,} {unit} of a step", f"{plan['flops']:.3e}"), (f"each of the {unit}", f"{plan['flops'] / count:.3e}")]
    parts = plan["flops_by_part"]
    return facts + [(part, f"{cost:.3e}, {cost / sum(parts.values()):.1%}") for part, cost in parts.items()]


def kernel_facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Calls of each kernel in a step; where its cycles were asked for, those of each form of it."""
    calls = [(name, f"{times:,} calls") for name, times in plan["kernels"].items() if "schedules" not in plan]
    for kernel in plan.get("schedules", ()):
        text = f"{kernel['times']:,} calls of {kernel['cycles']:,} cycles, {_ms(kernel['seconds'])}"
        unread = f"{kernel['times']:,} calls, whose schedule cannot be read: {kernel.get('unread')}"
        calls.append((f"{kernel['name']} of {max(kernel['operands'], key=len)}", unread if "unread" in kernel else text))
    return calls or [("none", "XLA alone")]


def link_facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """What crosses between chips in a step."""
    return [
        (kind, f"{n['count']:,} times, {n['bytes'] / 1e6:,.1f} MB, {1e3 * n['seconds']:.3f} ms at least")
        for kind, n in plan["collectives"].items()
    ] or [("nothing", "one chip, or nothing to tell each other")]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def advice_lines(plan: dict[str, Any]) -> list[str]:
    """What was tried where the plan does not fit, and the largest batch where it was asked for."""
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
