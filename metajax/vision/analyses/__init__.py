"""Analyses of runs on images: each module of this package is one. This file imports neither JAX nor matplotlib."""

from __future__ import annotations

from collections.abc import Iterable

from metajax.analysis import Analyses, analysis
from metajax.core.errors import nearest, require

image_analysis = Analyses("analysis", __name__)


def check_analyses(what: str, names: Iterable[str]) -> None:
    """UserError for an analysis that neither text nor images have; `what` says where it was named."""
    known = sorted({*analysis.names(), *image_analysis.names()})
    for name in names:
        require(name in known, f"{what}: unknown {name!r}{nearest(name, known)}; known: {', '.join(known)}")
