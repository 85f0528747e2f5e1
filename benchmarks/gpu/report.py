"""gpu.json, and the tables of docs/gpu.md made from it; the prose around them is written by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.clock import ROUNDS, Case
from kernels_pallas.bench.report import replace_section
from metajax.core.atomic import write_text

Found = dict[str, Any]
SECTIONS = {"attention": "Attention alone", "step": "The whole train step", "scan": "The selective scan"}
COLUMNS = {
    "attention": ["implementation", "ms: median (range)", "against ours", "TFLOP/s", "distance from ours", "temporary GB"],
    "step": [
        "implementation",
        "ms: median (range)",
        "against ours",
        "tokens/s",
        "MFU",
        "memory GB",
        "parameters",
        "loss of step 3",
    ],
    "scan": ["implementation", "ms: median (range)", "against ours", "GB/s of necessary bytes", "temporary GB"],
}


def start(path: Path, where: Mapping[str, str], sections: Iterable[str]) -> None:
    """Results before these sections are measured: those of the other sections if device and versions are the same."""
    found = json.loads(path.read_text()) if path.exists() else {}
    kept = found["cases"] if found.get("where") == where else []
    _write(path, {"where": dict(where), "cases": [case for case in kept if case["section"] not in sections]})


def add(path: Path, case: Case) -> Found:
    """Add a case to the results of `path` and write them at once."""
    found = json.loads(path.read_text())
    found["cases"].append(case.as_json())
    _write(path, found)
    return found


def _write(path: Path, found: Found) -> None:
    write_text(path, json.dumps(found, indent=1) + "\n")


def write_page(page: Path, found: Found) -> None:
    """Write the tables into the page; if `page` does not exist, start from the page of the documentation."""
    if not page.exists():
        write_text(page, (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8"))
    replace_section(page, "measured", render(found))


def render(found: Found) -> str:
    where = ", ".join(f"{name} {value}" for name, value in found["where"].items())
    lines = [f"`python -m benchmarks.gpu`: {where}. Medians of {ROUNDS} turns, with the least and the most.", ""]
    for section, title in SECTIONS.items():
        cases = [case for case in found["cases"] if case["section"] == section]
        lines += [f"### {title}", ""] if cases else []
        for case in cases:
            lines += [f"{case['name']}:", "", *_table(COLUMNS[section], _rows(case)), ""]
            lines += [f"- **failed**, {name}: `{text}`" for name, text in failures(case)] + [""]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip()


def failures(case: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(side, first line of its error) of those that failed."""
    failed = ((name, side["failed"]) for name, side in case["sides"].items() if "failed" in side)
    return [(name, text.partition("\n")[0].replace("`", "'")) for name, text in failed]


def _rows(case: Mapping[str, Any]) -> list[list[str]]:
    ours = next(iter(case["sides"].values())).get("median_ms")
    cells = {"attention": _attention, "step": _step, "scan": _scan}[case["section"]]
    rows = []
    for name, side in case["sides"].items():
        if "median_ms" not in side:
            rows.append([name, "failed", *["-"] * (len(COLUMNS[case["section"]]) - 2)])
            continue
        time = f"{side['median_ms']:.3f} ({side['least_ms']:.3f} to {side['most_ms']:.3f})"
        rows.append([name, time, f"{side['median_ms'] / ours:.2f}x" if ours else "-", *cells(case["facts"], side)])
    return rows


def _attention(facts: Found, side: Found) -> list[str]:
    return [
        f"{1e-9 * facts['flops'] / side['median_ms']:.1f}",
        _number(side.get("distance"), "{:.1e}"),
        _giga(side, "temporary_bytes"),
    ]


def _step(facts: Found, side: Found) -> list[str]:
    seconds, peak = 1e-3 * side["median_ms"], facts["peak_flops"]
    mfu = f"{100 * facts['flops'] / seconds / peak:.1f} %" if peak else "-"
    loss = f"{side['losses'][-1]:.4f}"
    return [f"{facts['tokens'] / seconds:,.0f}", mfu, _giga(side, "memory_bytes"), f"{side['parameters']:,}", loss]


def _scan(facts: Found, side: Found) -> list[str]:
    return [f"{1e-6 * facts['necessary_bytes'] / side['median_ms']:.1f}", _giga(side, "temporary_bytes")]


def _giga(side: Found, name: str) -> str:
    size = side.get(name)
    return "-" if size is None else f"{1e-9 * size:.2f}"


def _number(x: float | None, form: str) -> str:
    return "-" if x is None else form.format(x)


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
