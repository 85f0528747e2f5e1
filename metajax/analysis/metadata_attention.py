"""Attention of text to its metadata: to parts of a URL, delimiters and learnable tokens, and its difference between classes.

Attention of body tokens of validation texts to what precedes them, over layers and heads, beside equal attention to all earlier tokens. Beyond
URLs reports that the scheme of a URL gets most, though it carries no information.

Source: Beyond URLs (arXiv 2511.21613, figures on attention): shares averaged over layers and heads for the parts of a URL. For learnable
tokens the shares of the last layer, from a document's first 100 tokens, are a vector whose distances are compared between classes of quality.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common import labels
from metajax.analysis.common.study import Arrays, Study, capture, cluster_mean, rounded
from metajax.core.errors import require
from metajax.data.addresses import split_url
from metajax.data.cache import build_metadata_table
from metajax.models.lm import LM
from metajax.reporting.panels import by_layer, heat, panels

DOCUMENTS, TOKENS, FIRST = 400, 256, 100
LEAST = 10  # least documents of a class whose distances are computed


def parts_of(study: Study, ids: list[int], url: bool) -> list[str]:
    """The part that each metadata token belongs to: one of the URL (by its first character), a learnable token, or the metadata."""
    tokenizer, recipe = study.corpora.tokenizer, study.corpora.config.metadata
    if recipe.tokens:
        return [f"token_{i + 1}" for i in range(len(ids))]
    if not url:
        return ["metadata"] * len(ids)
    scheme, host, _ = split_url(tokenizer.decode(ids))
    starts = [len(tokenizer.decode(ids[:i])) for i in range(len(ids))]
    return ["scheme" if at < len(scheme) else "host" if at < len(scheme) + len(host) else "path" for at in starts]


def shares(model: LM, batch: Arrays, *, first: int) -> dict[str, Array]:
    """Mean attention of a row's body tokens to every position: `heads` by layer and head, `early` of the first tokens in the last layer."""
    attention = capture(model, batch, "attention_probabilities")["attention_probabilities"]  # [B, L, H, T, T]
    body = batch["is_body"].astype(jnp.float32)
    early = body * (jnp.cumsum(body, axis=1) <= first)
    mean = lambda weights, x: jnp.einsum("blhqk,bq->blhk", x, weights) / jnp.maximum(weights.sum(1), 1)[:, None, None, None]  # noqa: E731
    uniform = 1 / (1 + jnp.arange(body.shape[1], dtype=jnp.float32))  # weight of each earlier key in uniform attention
    flat = (
        jnp.einsum("bq,q,qk->bk", body, uniform, jnp.tril(jnp.ones((body.shape[1],) * 2))) / jnp.maximum(body.sum(1), 1)[:, None]
    )
    return {"heads": mean(body, attention), "early": mean(early, attention[:, -1:])[:, 0].mean(1), "uniform": flat}


def _needs(study: Study) -> None:
    require(labels.has_context(study), "this run has no metadata before the text")
    labels.check_labels(study)


@analysis(
    "metadata_attention",
    title="Attention to metadata",
    fits=lambda study: labels.has_labels(study) and labels.has_context(study),
    needs=_needs,
    on_prompts=False,
)
def metadata_attention(study: Study) -> dict[str, Any]:
    """Share of body tokens' attention by part of the preceding positions, and the share under uniform attention.

    clusters, for learnable tokens: mean Euclidean distance of documents' vectors of attention within and between classes of each label.
    """
    corpora, recipe, templates = study.corpora, study.corpora.config.metadata, study.corpora.config.evaluation.labels
    documents = labels.some_documents(corpora, "validation", 16, 2 * DOCUMENTS)
    if recipe.tokens:
        metadata = [list(corpora.tokenizer.vocabulary.spare[: recipe.tokens])] * len(documents)
    else:
        table = build_metadata_table(corpora.caches[0], corpora.tokenizer, recipe.template)
        documents = documents[[table[d] is not None for d in documents.tolist()]]
        metadata = [table[d].tolist() for d in documents.tolist()]
    documents, metadata = documents[:DOCUMENTS], metadata[:DOCUMENTS]
    openings = [labels.opening(corpora, ids) for ids in metadata]
    url = recipe.template in ("{url}", "URL: {url}\n\n")
    rows = labels.with_rows(study, [ids for ids, _ in openings], documents, TOKENS)
    found = rows.over_prompts("attention to metadata", lambda model, batch: shares(model, batch, first=FIRST), study.model)
    names, place = _places(study, openings, metadata, rows.rows["tokens"].shape[1], url)
    out: dict[str, Any] = {"documents": len(documents), "parts": {}}
    for number, name in enumerate(names):
        at = place == number
        share = np.einsum("blhk,bk->blh", found["heads"], at)
        mean, half = cluster_mean(share, np.ones(share.shape, bool))
        out["parts"][name] = {
            "mean": mean, "half": half, "uniform": float((found["uniform"] * at).sum(1).mean()), "tokens": float(at.sum(1).mean()),
            "layers": rounded(share.mean((0, 2))), "heads": rounded(share.mean(0)),
        }  # fmt: skip
    if recipe.tokens:
        vectors = np.stack(
            [(found["early"] * (place == names.index(f"token_{i + 1}"))).sum(1) for i in range(recipe.tokens)], axis=-1
        )
        out["clusters"] = {f"label_{i}": _distances(study, t, documents, vectors) for i, t in enumerate(templates)}
    return out


def _places(
    study: Study, openings: list[tuple[list[int], list[int]]], metadata: list[list[int]], width: int, url: bool
) -> tuple[list[str], Int[np.ndarray, "N T"]]:
    """(names of the parts, the part of each position); positions after the opening are "text"."""
    names = ["bos", "begin", "end", "text"]
    place = np.full((len(openings), width), 3)
    for row, (_, kinds), ids in zip(place, openings, metadata, strict=True):
        inside = iter(parts_of(study, ids, url))
        for position, kind in enumerate(kinds[:width]):
            name = {0: "bos", 1: "begin", 3: "end"}.get(kind) or next(inside)
            if name not in names:
                names.append(name)
            row[position] = names.index(name)
    return names, place


def _distances(
    study: Study, template: str, documents: Int[np.ndarray, " N"], vectors: Float[np.ndarray, "N tokens"]
) -> dict[str, Any]:
    classes, names = labels.classes_of(labels.texts_of(study.corpora, template, documents), LEAST)
    kept = classes >= 0
    if len(names) < 2:
        return {"template": template, "reason": "no two classes of enough documents"}
    distance = np.linalg.norm(vectors[kept][:, None] - vectors[kept][None], axis=-1)
    same, other = classes[kept][:, None] == classes[kept][None], ~np.eye(int(kept.sum()), dtype=bool)
    within, between = float(distance[same & other].mean()), float(distance[~same].mean())
    means = {name: rounded(vectors[classes == i].mean(0), 5) for i, name in enumerate(names)}
    return {
        "template": template,
        "within": within,
        "between": between,
        "ratio": between / within if within else None,
        "documents": int(kept.sum()),
        "means": means,
    }


@metadata_attention.headlines
def headlines(numbers: Numbers) -> list[str]:
    lines = [
        f"{name.replace('_', ' ')}: {part['mean']:.1%} ± {part['half']:.1%} of attention, equal shares {part['uniform']:.1%} "
        f"({part['tokens']:.1f} tokens)"
        for name, part in numbers["parts"].items()
    ]
    for found in numbers.get("clusters", {}).values():
        said = found.get("reason") or (
            f"{found['documents']:,} documents: {found['within']:.4f} within classes, {found['between']:.4f} between them"
        )
        lines.append(f"distances of attention to the learnable tokens by {found['template']}, {said}")
    return lines


@metadata_attention.figures
def figures(result: Numbers) -> Figures:
    parts = {name.replace("_", " "): part for name, part in result["parts"].items() if name != "text"}
    figure, (axes, maps) = panels(2, 1, 2.2)
    by_layer(axes, {name: part["layers"] for name, part in parts.items()})
    axes.set(xlabel="layer", ylabel="share of attention")
    axes.legend(fontsize=8)
    heat(figure, maps, np.array([np.ravel(part["heads"]) for part in parts.values()]))
    maps.set_yticks(range(len(parts)), list(parts))
    maps.set_xlabel("heads, layer by layer")
    return [(figure, "Mean share of the attention of body tokens.")]
