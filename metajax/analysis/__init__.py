"""Analyses of trained models: each module of this package is one, with its numbers, its sentences and its figures.

The second paragraph of a module's docstring is shown on pages. An analysis of your own is the same in a file of `experiments/`. This file
imports neither JAX nor matplotlib; `common` holds what analyses share.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metajax.core.errors import UserError, require
from metajax.core.registries import Registry
from metajax.runs.files import find_readable, write_json

FOLDER = "analysis"  # of a run's folder
Measure = Callable[[Any], dict[str, Any]]
Numbers = Mapping[str, Any]
Figures = list[tuple[Any, str]]  # (matplotlib Figure, caption)


@dataclass
class Analysis:
    """One analysis. Its result is plain data, and only figures read `result["details"]`."""

    name: str
    measure: Measure
    title: str
    about: str  # what it measures, and what the paper reports
    fits: Callable[[Any], bool] = lambda study: False  # whether `analyze` makes it when no analysis is named
    needs: Callable[[Any], None] = lambda study: None  # raises UserError for a study that it cannot measure
    on_prompts: bool = True  # whether its numbers come from the study's own rows
    lines: Callable[[Numbers], list[str]] = lambda numbers: []
    draw: Callable[[Numbers], Figures] = lambda result: []

    def check(self, study: Any) -> None:
        """Raise UserError if the study lacks inputs of the analysis."""
        try:
            self.needs(study)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    def headlines(self, function: Callable[[Numbers], list[str]]) -> Callable[[Numbers], list[str]]:
        """Decorator of the function that turns the numbers into sentences."""
        self.lines = function
        return function

    def figures(self, function: Callable[[Numbers], Figures]) -> Callable[[Numbers], Figures]:
        """Decorator of the function that draws the result, with matplotlib's style already set."""
        self.draw = function
        return function

    def section(self, saved: Numbers) -> dict[str, Any]:
        """A section of a page from the saved JSON: title, text, headline numbers and figures."""
        from metajax.reporting.figures import styled, to_svg

        result, text, made_on = saved["result"], self.about, saved.get("made_on")
        if made_on and self.on_prompts:
            count, task = result.get("prompts", made_on["prompts"]), made_on["task"].replace("_", " ")
            text = f"{text} Test prompts: {count:,} of {task}, at most {made_on['length']} tokens each."
        with styled():
            figures = [(to_svg(figure, caption), caption) for figure, caption in self.draw(result)]
        return {"name": self.name, "title": self.title, "text": text, "lines": self.lines(result), "figures": figures}


class Analyses(Registry[Analysis]):
    """The analyses of one family of models, each in a module of its own name.

    An instance is also the decorator that registers an analysis: `@analysis("sharpening", title="Sharpening")`.
    """

    def __call__(self, name: str, **options: Any) -> Callable[[Measure], Analysis]:
        """Decorator of the function that measures: `study -> result`; options: the fields of Analysis."""

        def register(measure: Measure) -> Analysis:
            own = measure.__module__ == f"{self.package}.{name}"
            require(own or name not in self._files(), f"analysis {name!r}: {self.package} has one of that name")
            paragraphs = (sys.modules[measure.__module__].__doc__ or "").split("\n\n")
            about = " ".join(paragraphs[:2][-1].split())
            made = Analysis(name, measure, about=about, **options)
            self.add(name, made, measure.__module__)
            return made

        return register

    def _files(self) -> set[str]:
        path = importlib.import_module(self.package).__path__
        return {info.name for info in pkgutil.iter_modules(path) if not info.ispkg}

    def names(self) -> list[str]:
        """All names, sorted. Imports no analysis, so that help stays fast."""
        return sorted({*self._files(), *self._known})

    def fitting(self, study: Any) -> tuple[str, ...]:
        """The analyses that are meant for this model and these prompts."""
        return tuple(name for name in self.names() if self[name].fits(study))

    def run(self, study: Any, names: Sequence[str], workdir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Make the analyses one by one, write each to WORKDIR/analysis/NAME.json, and yield (name, its numbers without `details`).

        Raises UserError before the first analysis if the study lacks inputs of any of them.
        """
        chosen = [self[name] for name in names]
        for one in chosen:
            one.check(study)
        made_on = {"made_on": study.made_on} if study.made_on else {}
        for one in chosen:
            result = one.measure(study)
            write_json(workdir / FOLDER / f"{one.name}.json", {"name": one.name, "result": result} | made_on)
            yield one.name, {key: value for key, value in result.items() if key != "details"} | made_on

    def sections(self, workdir: Path) -> list[dict[str, Any]]:
        """The saved analyses of a run as sections of a page."""
        saved = {name: find_readable(workdir / FOLDER / f"{name}.json") for name in self.names()}
        return [self[name].section(found) for name, found in saved.items() if found]


analysis = Analyses("analysis", __name__)
