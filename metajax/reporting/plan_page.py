"""A plan as a page: the memory of a chip as a picture, what does not fit and what would, the bounds of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metajax.atomic import write_text
from metajax.reporting.html import templates

GIB = 2**30


def write_plan_page(path: Path, plan: dict[str, Any]) -> None:
    """Write the page of a plan as `metajax.planning.plan.plan` makes it."""
    shown: dict[str, Any] = {"advice": advice_lines(plan)}
    if plan["fits"]:
        memory, state, bound = plan["memory"], plan["state"], plan["bound"]
        sizes = {
            **state,
            "batch": memory["arguments"] - sum(state.values()),
            **{k: memory[k] for k in ("outputs", "temporaries", "program")},
        }
        shown |= {
            "memory": [
                {"name": name, "css": f"p{1 + i % 4}", "gib": f"{size / GIB:.3f}", "percent": f"{100 * size / memory['limit']:.2f}"}
                for i, (name, size) in enumerate(sizes.items())
            ],
            "memory_facts": [(name, f"{size / GIB:.3f} GiB") for name, size in sizes.items()],
            "total": f"{memory['total'] / GIB:.3f}",
            "limit": f"{memory['limit'] / GIB:g}",
            "time_facts": [
                ("operations at the chips' peak", f"{1e3 * bound['operations']:.2f} ms"),
                ("XLA's estimate, kernels left out", f"{1e3 * bound['xla_estimate']:.2f} ms"),
                ("links", f"{1e3 * bound['links']:.2f} ms"),
                ("network between slices", f"{1e3 * bound['network']:.2f} ms"),
                ("MFU at most", f"{bound['mfu']:.1%}"),
                (f"{plan['reads']['unit']}, operations of a step", f"{plan['reads']['count']:,}, {plan['flops']:.3e}"),
                (f"operations for each of the {plan['reads']['unit']}", f"{plan['flops'] / plan['reads']['count']:.3e}"),
                ("kernels found", ", ".join(plan["kernels"]) or "none"),
                ("compiled in", f"{plan['compile_seconds']:.0f} s"),
            ],
            "link_facts": [
                (kind, f"{n['count']:,} times, {n['bytes'] / 1e6:,.1f} MB, {1e3 * n['seconds']:.3f} ms at least")
                for kind, n in plan["collectives"].items()
            ] or [("nothing", "one chip, or nothing to tell each other")],
        }  # fmt: skip
    write_text(
        path, templates.get_template("plan.html").render(title=f"{plan['name']} on {plan['topology']}", plan=plan, **shown)
    )


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
