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
from metajax.analysis.common.numbers import cluster_mean, rounded
from metajax.analysis.common.study import Arrays, Study, capture, documents_of
from metajax.core.errors import require
from metajax.data.addresses import split_url
from metajax.data.cache import build_metadata_table
from metajax.models.lm import LM
from metajax.reporting.panels import by_layer, heat, panels

DOCUMENTS, TOKENS, FIRST = 400, 256, 100  # documents; positions of a row; first tokens of a document
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


def shares(model: LM, batch: Arrays) -> Arrays:
    """Mean attention of a row's body tokens to every position: `heads` by layer and head, `early` of FIRST tokens in the last layer,
    `uniform` if every token attended equally to all earlier ones."""
    attention = capture(model, batch, "attention_probabilities")["attention_probabilities"]  # [B, L, H, T, T]
    body = batch["is_body"].astype(jnp.float32)
    early = body * (jnp.cumsum(body, axis=1) <= FIRST)
    equal = jnp.tril(jnp.ones((body.shape[1],) * 2)) / (1 + jnp.arange(body.shape[1], dtype=jnp.float32))[:, None]

    def mean(maps: Float[Array, "B L H T T"], weights: Float[Array, "B T"]) -> Float[Array, "B L H T"]:
        return jnp.einsum("blhqk,bq->blhk", maps, weights) / jnp.maximum(weights.sum(1), 1)[:, None, None, None]

    uniform = jnp.einsum("bq,qk->bk", body, equal) / jnp.maximum(body.sum(1), 1)[:, None]
    return {"heads": mean(attention, body), "early": mean(attention[:, -1:], early)[:, 0].mean(1), "uniform": uniform}


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
    """Share of body tokens' attention by part of the preceding positions, and the share under uniform attention. clusters, for learnable
    tokens: mean Euclidean distance of documents' vectors of attention within and between classes of each label."""
    corpora, recipe, templates = study.corpora, study.corpora.config.metadata, study.corpora.config.evaluation.labels
    documents = documents_of(corpora, "validation", 16)[: 2 * DOCUMENTS]
    if recipe.tokens:
        metadata = [list(corpora.tokenizer.vocabulary.spare[: recipe.tokens])] * len(documents)
    else:
        table = build_metadata_table(corpora.caches[0], corpora.tokenizer, recipe.template)
        documents = documents[[table[d] is not None for d in documents.tolist()]]
        metadata = [table[d].tolist() for d in documents.tolist()]
    documents, metadata = documents[:DOCUMENTS], metadata[:DOCUMENTS]
    openings = [labels.opening(corpora, ids) for ids in metadata]
    rows = labels.with_rows(study, [ids for ids, _ in openings], documents, TOKENS)
    found = rows.over_prompts("attention to metadata", shares)
    names = np.full((len(documents), rows.length), "text", object)
    for row, (_, opening), ids in zip(names, openings, metadata, strict=True):
        parts = iter(parts_of(study, ids, recipe.template in ("{url}", "URL: {url}\n\n")))
        row[: len(opening)] = [next(parts) if part == "metadata" else part for part in opening][: rows.length]
    part_of = {name: names == name for name in dict.fromkeys(["bos", "begin", "end", "text", *names.ravel()])}
    out: dict[str, Any] = {"documents": len(documents), "parts": {}}
    for name, at in part_of.items():
        share = np.einsum("blhk,bk->blh", found["heads"], at)
        mean, half = cluster_mean(share, np.ones(share.shape, bool))
        part = {"mean": mean, "half": half, "uniform": float((found["uniform"] * at).sum(1).mean())}
        part |= {"tokens": float(at.sum(1).mean()), "layers": rounded(share.mean((0, 2))), "heads": rounded(share.mean(0))}
        out["parts"][name] = part
    if recipe.tokens:
        tokens = [part_of[f"token_{i + 1}"] for i in range(recipe.tokens)]
        vectors = np.stack([(found["early"] * at).sum(1) for at in tokens], axis=-1)
        out["clusters"] = {f"label_{i}": _distances(study, t, documents, vectors) for i, t in enumerate(templates)}
    return out


def _distances(
    study: Study, template: str, documents: Int[np.ndarray, " N"], vectors: Float[np.ndarray, "N K"]
) -> dict[str, Any]:
    classes, names = labels.classes_of(labels.texts_of(study.corpora, template, documents), LEAST)
    if len(names) < 2:
        return {"template": template, "reason": "no two classes of enough documents"}
    x, y = vectors[classes >= 0], classes[classes >= 0]
    distance, same = np.linalg.norm(x[:, None] - x[None], axis=-1), y[:, None] == y[None]
    within, between = float(distance[same & ~np.eye(len(y), dtype=bool)].mean()), float(distance[~same].mean())
    found = {"template": template, "within": within, "between": between, "ratio": between / within if within else None}
    return found | {"documents": len(y), "means": {name: rounded(x[y == i].mean(0), 5) for i, name in enumerate(names)}}


@metadata_attention.headlines
def headlines(numbers: Numbers) -> list[str]:
    lines = []
    for name, n in numbers["parts"].items():
        share = f"{n['mean']:.1%} ± {n['half']:.1%} of attention, equal shares {n['uniform']:.1%} ({n['tokens']:.1f} tokens)"
        lines.append(f"{name.replace('_', ' ')}: {share}")
    for n in numbers.get("clusters", {}).values():
        distances = n.get("reason") or "{documents:,} documents: {within:.4f} within classes, {between:.4f} between them".format(
            **n
        )
        lines.append(f"distances of attention to the learnable tokens by {n['template']}, {distances}")
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
