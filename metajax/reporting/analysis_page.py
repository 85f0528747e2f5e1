"""The page of a run's analyses, made from what `analyze`, or the end of the run, left in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from metajax.atomic import write_text
from metajax.config import ANALYSES
from metajax.reporting.analysis_figures import draw
from metajax.reporting.analysis_words import SECTIONS, headlines
from metajax.reporting.html import read_json, templates
from metajax.reporting.records import read_config
from metajax.reporting.tasks import title


def write_analysis_page(workdir: Path) -> Path:
    """Write WORKDIR/analysis/analysis.html with every analysis that has been made there, and return its path."""
    config, path = read_config(workdir), workdir / "analysis" / "analysis.html"
    page = templates.get_template("analysis.html").render(
        title=f"{config.name} (seed {config.seed}): analyses", config=config, sections=sections(workdir)
    )
    write_text(path, page)
    return path


def sections(workdir: Path) -> list[dict[str, Any]]:
    """Title, text, headline numbers and figures of each analysis in the folder, in the order of ANALYSES."""
    files = [workdir / "analysis" / f"{name}.json" for name in ANALYSES]
    return [_section(read_json(file)) for file in files if file.exists()]


def _section(saved: dict[str, Any]) -> dict[str, Any]:
    name, made_on = saved["name"], saved["made_on"]
    heading, text = SECTIONS[name]
    prompts = (
        f"Read from {made_on['prompts']:,} test prompts of {title(made_on['task'])}, at most {made_on['length']} tokens each."
    )
    return {
        "name": name,
        "title": heading,
        "text": text if name in ("interventions", "attention") else f"{text} {prompts}",
        "lines": headlines(name, saved["result"]),
        "figures": [(Markup(svg), caption) for svg, caption in draw(name, saved["result"])],
    }
