"""The analyses by name; a result is plain data: numbers for tables, and under `details` what only a figure needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from metajax.analysis.attention_maps import attention
from metajax.analysis.caching import caching
from metajax.analysis.interventions import interventions
from metajax.analysis.overhead import overhead
from metajax.analysis.rate_distortion import rate_distortion
from metajax.analysis.sharpening import sharpening
from metajax.analysis.study import Study
from metajax.analysis.theory import theory
from metajax.reporting.records import write_json

FOLDER = "analysis"  # of a run's folder
_FUNCTIONS: dict[str, Callable[[Study], dict[str, Any]]] = {
    function.__name__: function for function in (interventions, sharpening, caching, attention, theory, rate_distortion, overhead)
}


def run_analyses(study: Study, names: Sequence[str], workdir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Make the analyses one by one, write each to WORKDIR/analysis/NAME.json, and yield (name, its numbers without `details`)."""
    for name in names:
        result = _FUNCTIONS[name](study)
        made_on = {"task": study.task, "length": study.rows["tokens"].shape[1], "prompts": study.count}
        write_json(workdir / FOLDER / f"{name}.json", {"name": name, "made_on": made_on, "result": result})
        yield name, {key: value for key, value in result.items() if key != "details"} | {"made_on": made_on}
