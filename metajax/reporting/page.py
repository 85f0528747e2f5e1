"""Pages as data: a page is a list of sections, and a section has a title and parts. One template draws all pages.

A page is one file with its figures, without scripts or external files. Text is escaped unless it is `Markup`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from metajax.core.atomic import write_text

Part = dict[str, Any] | None  # None: no part
Facts = Iterable[tuple[str, str]]
templates = Environment(
    loader=PackageLoader("metajax.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def write_page(
    path: Path, *, sections: Sequence[Part], notes: Sequence[Part] = (), files: Mapping[str, str] | None = None, **words: str
) -> Path:
    """Write a page and return its path.

    Args:
      files: files in the same folder, with a remark for each.
      words: title, eyebrow (the line above the heading), heading and sentence.
    """
    shown = {"sections": filter(None, sections), "notes": filter(None, notes), "files": files or {}}
    write_text(path, templates.get_template("page.html").render(**shown, **words))
    return path


def section(title: str, *parts: Part) -> Part:
    """Parts under a heading; None if there is no part."""
    kept = [part for part in parts if part]
    return {"title": title, "parts": kept} if kept else None


def group(css: str, *parts: Part, title: str = "") -> Part:
    """Parts in a box of that class: a card, or a grid such as "wide-cards"; None if there is no part."""
    kept = [part for part in parts if part]
    return {"kind": "group", "css": css, "parts": kept, "title": title} if kept else None


def details(summary: str, *parts: Part) -> Part:
    """Parts that are shown only when the reader opens them."""
    return {"kind": "details", "summary": summary, "parts": [part for part in parts if part]}


def text(words: str, css: str = "") -> Part:
    """A paragraph; "small" and "soft" are classes of remarks."""
    return {"kind": "text", "text": words, "css": css} if words else None


def lines(words: Sequence[str], css: str = "small") -> Part:
    """A list of sentences."""
    return {"kind": "lines", "lines": list(words), "css": css} if words else None


def facts(pairs: Facts, title: str = "") -> Part:
    """A card of names and values."""
    return group("card", {"kind": "facts", "pairs": list(pairs)}, title=title)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], css: str = "") -> Part:
    """A table; with the class "pinned" the first column stays in view, with "words" cells are text."""
    return {"kind": "table", "head": list(head), "rows": list(rows), "css": css}


def figure(svg: str, caption: str = "") -> Part:
    """A figure with its caption."""
    return {"kind": "figure", "svg": Markup(svg), "caption": caption}


def figures(drawn: Iterable[tuple[str, str]]) -> Part:
    """Several figures side by side."""
    return group("figures", *(figure(*one) for one in drawn))


def bars(rows: Iterable[Mapping[str, Any]], keys: bool = True) -> Part:
    """A bar for each row: {name, total, parts: [{name, css, percent}]}; with a legend of the parts' colours."""
    rows = list(rows)
    return {"kind": "bars", "rows": rows, "keys": rows[0]["parts"] if keys else []} if rows else None


def pieces(spans: Iterable[tuple[str, str]], css: str = "") -> Part:
    """A text whose spans have looks: "given" (grey), "context" (metadata), "meta" (meta-token), "made" (generated)."""
    return {"kind": "pieces", "spans": list(spans), "css": css}


def analysis_section(found: Mapping[str, Any]) -> Part:
    """A section from `metajax.analysis`: its subject, headline numbers and figures."""
    return section(found["title"], text(found["text"], "soft small"), lines(found["lines"]), figures(found["figures"]))


def code(words: str) -> Markup:
    """Text as code."""
    return Markup("<code>{}</code>").format(words)


def link(address: str | None, label: str) -> Markup:
    """A link, or grey text if there is no address."""
    linked, plain = Markup('<a href="{}">{}</a>'), Markup('<span class="soft">{}</span>')
    return linked.format(address, label) if address else plain.format(label)


def with_code(words: str) -> Markup:
    """Escaped text, with text between backticks as code."""
    return Markup("").join(code(piece) if i % 2 else piece for i, piece in enumerate(words.split("`")))


def seconds_text(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 100 else f"{int(value // 60)} min {int(value % 60)} s"


def short_count(count: float) -> str:
    """A count with three digits and a unit: 1.23M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:,.0f}"


def as_set(value: Any) -> str:
    """A config value in the form that --set accepts."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "(empty)"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else "(empty)" if value == "" else str(value)


def plural(count: int, word: str) -> str:
    """A count with its noun: 1 run, 2 runs."""
    return f"{count} {word}" + "s" * (count != 1)
