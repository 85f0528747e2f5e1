"""Where in a document metadata helps: the loss at its beginning, middle and end.

Nats a body token of validation documents at their first 8 tokens, in the middle and in the last third, with the metadata of training and without
any. Later in a text, the text itself reveals what its metadata says. Of a generated corpus the best possible value is known too.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common.study import Study, documents_of
from metajax.core.errors import require
from metajax.data.pipeline import Corpora
from metajax.data.rows import Row
from metajax.data.sources import parse_spec
from metajax.data.sources.generated import GROUPS, LENGTH, SOURCES, best_nats, draw
from metajax.evaluation.multiple_choice import token_scores
from metajax.evaluation.validation import validation
from metajax.reporting.figures import look
from metajax.reporting.panels import panels

FIRST = 8  # tokens that count as the beginning; the end is the last third
PARTS = {"first": "first 8 tokens", "middle": "middle", "last": "last third"}


def places(batch: Row) -> np.ndarray:
    """int [B, T]: 0, 1, 2 if the target is a body token in the first, middle or last third of its document's piece; else -1."""
    out = np.full(batch["tokens"].shape, -1)
    for row, asked, segments in zip(out, batch["is_body"], batch["segment_ids"], strict=True):
        for segment in np.unique(segments[asked]):
            positions = np.flatnonzero(asked & (segments == segment))
            at = np.arange(len(positions))
            row[positions] = np.where(at < FIRST, 0, np.where(3 * at >= 2 * len(positions), 2, 1))
    return out


def best_possible(corpora: Corpora) -> dict[str, dict[str, float]]:
    """Exact nats of a generated corpus' validation documents by Bayes' rule, for a reader who knows nothing, the group or the source.

    mean, first, last: nats per symbol, over all or as in `places`. metadata, if it follows the text: total nats of the group or
    source, for a reader who knows that a share `metadata.keep` of the documents have it there.
    """
    recipe = corpora.config.metadata
    documents = documents_of(corpora, "validation", 1)[: corpora.config.evaluation.documents]
    drawn = tuple(np.array(part) for part in zip(*map(draw, documents.tolist()), strict=True))
    nats = {known: best_nats(*drawn, known) for known in ("nothing", "group", "source")}
    parts = {"mean": slice(None), "first": slice(FIRST), "last": slice(-(-2 * LENGTH // 3), None)}
    out = {known: {place: float(of[:, at].mean()) for place, at in parts.items()} for known, of in nats.items()}
    if recipe.position in ("append", "both"):
        for known, values in (("group", GROUPS), ("source", SOURCES)):
            open_still = np.log(values) - (nats["nothing"] - nats[known]).sum(1).mean()
            out[known]["metadata"] = float(open_still - np.log(recipe.keep)) if recipe.keep else None
    return out


@analysis(
    "by_position",
    title="Where in a document",
    fits=lambda study: study.corpora.config.metadata is not None and study.model.meta is None,
    needs=lambda study: require(study.corpora.config.metadata is not None, "this run has no metadata (metadata is null)"),
    on_prompts=False,
)
def by_position(study: Study) -> dict[str, Any]:
    """Nats per body token of validation documents in each of PARTS, with training's metadata ("own") and without. best: as from
    `best_possible`, only of a generated corpus."""
    program, corpora, recipe, out = study.program, study.corpora, study.corpora.config.metadata, {}
    own, scores = "none" if recipe.position == "none" else "right" if recipe.keep else "empty", token_scores(program)
    for name, condition in {"own": own, "none": "none"}.items():
        sums, counts = np.zeros(3), np.zeros(3)
        with jax.set_mesh(program.mesh):
            for batch in validation(corpora, condition).batches:
                nll, _ = jax.device_get(scores(study.model, program.put(program.local_rows(batch))))
                parts = [nll[places(batch) == number] for number in range(3)]
                sums += [part.sum(dtype=np.float64) for part in parts]
                counts += [len(part) for part in parts]
        out[name] = dict(zip(PARTS, (sums / np.maximum(counts, 1)).tolist(), strict=True))
    if [parse_spec(spec).kind for spec in corpora.config.data.sources] == ["generated"]:
        out["best"] = best_possible(corpora)
    return out


@by_position.headlines
def headlines(numbers: Numbers) -> list[str]:
    own, none, lines = numbers["own"], numbers["none"], []
    for part, words in PARTS.items():
        lines.append(f"{words}: {own[part]:.3f} nats a token with the metadata of training, {none[part]:.3f} without")
    for known, best in numbers.get("best", {}).items():
        nats = f"{best['first']:.3f} at the first 8 tokens, {best['last']:.3f} in the last third"
        lines.append(f"best possible for a reader who knows {known}: {nats}")
    return lines


@by_position.figures
def figures(result: Numbers) -> Figures:
    figure, (axes,) = panels(1, 1, 2.4)
    for i, (name, words) in enumerate({"own": "metadata of training", "none": "no metadata"}.items()):
        axes.plot(list(PARTS.values()), [result[name][part] for part in PARTS], marker="o", color=look(i)[0], label=words)
    axes.set_ylabel("nats a token")
    axes.legend(fontsize=8.5)
    return [(figure, "Mean over the validation documents' body tokens.")]
