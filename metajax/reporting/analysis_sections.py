"""A run's analyses as sections of a page, made from what `analyze`, or the end of the run, left in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from metajax.config import ANALYSES
from metajax.reporting import metadata_words
from metajax.reporting.analysis_figures import draw
from metajax.reporting.analysis_words import SECTIONS, headlines
from metajax.reporting.tasks import title
from metajax.runs.files import find_readable


def sections(workdir: Path) -> list[dict[str, Any]]:
    """Title, text, headline numbers and figures of each analysis in the folder, in the order of ANALYSES."""
    return [_section(saved) for name in ANALYSES if (saved := find_readable(workdir / "analysis" / f"{name}.json"))]


def _section(saved: dict[str, Any]) -> dict[str, Any]:
    name, made_on = saved["name"], saved["made_on"]
    heading, text = SECTIONS[name]
    count = 1 if name == "attention" else made_on["prompts"]
    prompts = f"Test prompts: {count:,} of {title(made_on['task'])}, at most {made_on['length']} tokens each."
    return {
        "name": name,
        "title": heading,
        "text": text if name in ("interventions", *metadata_words.SECTIONS) else f"{text} {prompts}",
        "lines": headlines(name, saved["result"]),
        "figures": [(Markup(svg), caption) for svg, caption in draw(name, saved["result"])],
    }
