"""Probes: what a model's hidden states say about a document (topic, quality, author).

Probes on frozen states of every layer, averaged over a validation text without metadata: a linear one and a perceptron of three layers. Classes
are balanced; the second choice of documents also has equal lengths, because length alone predicts some labels. Half of the origins train a
probe, the others test it. Layer 0 is the embedding.

Source: Beyond URLs (arXiv 2511.21613, section on probing); pooling, sizes and training are not stated. Where training had metadata before the
text, the empty pair is shown.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common import labels
from metajax.analysis.common.numbers import rounded
from metajax.analysis.common.study import Arrays, Study, capture, descent, documents_of
from metajax.models.lm import LM
from metajax.reporting.figures import look
from metajax.reporting.panels import GREY, panels

DOCUMENTS, TOKENS, LEAST = 2_000, 512, 30  # documents; positions of a row; documents of a class that is probed
STEPS, SEEDS = 200, 2
MIDDLE = 6 / 16  # the layer that the paper compares models at
PROBES = {"linear": ((), 1e-2, "linear"), "mlp": ((128, 128), 1e-3, "three layers")}  # hidden widths, learning rate, words
# Ranges of length in each of which the classes are balanced, words.
CHOICES = {"balanced": (1, "classes balanced"), "matched": (5, "lengths matched too")}


def states(model: LM, batch: Arrays) -> dict[str, Float[Array, "B S width"]]:
    """Mean over a row's body tokens of the input of every block, and of the final state."""
    found = capture(model, batch, "residual", "final")
    layers = jnp.concatenate([found["residual"], found["final"][:, None]], axis=1).astype(jnp.float32)
    weights = batch["is_body"].astype(jnp.float32)
    return {"states": jnp.einsum("bltw,bt->blw", layers, weights) / jnp.maximum(jnp.sum(weights, axis=1), 1)[:, None, None]}


def accuracies(
    x: Float[np.ndarray, "S N width"], y: Int[np.ndarray, " N"], train: Bool[np.ndarray, " N"], kind: str
) -> Float[np.ndarray, "seeds S"]:
    """Test accuracy of a probe for each of S representations of the same documents, standardised by the training part."""
    centre, spread = x[:, train].mean(1, keepdims=True), x[:, train].std(1, keepdims=True)
    x = ((x - centre) / np.maximum(spread, 1e-6)).astype(np.float32)
    hidden, rate, _ = PROBES[kind]
    widths, tx = (x.shape[-1], *hidden, int(y.max()) + 1), optax.adamw(rate, weight_decay=1e-2)

    def logits(parameters: list[tuple[Array, Array]], x: Array) -> Array:
        for w, b in parameters[:-1]:
            x = jax.nn.gelu(x @ w + b)
        return x @ parameters[-1][0] + parameters[-1][1]

    def one(key: Array, train_x: Array, test_x: Array) -> Array:
        sizes = zip(jax.random.split(key, len(widths) - 1), widths[:-1], widths[1:], strict=True)
        start = [(jax.random.normal(k, (i, o)) / np.sqrt(i), jnp.zeros(o)) for k, i, o in sizes]
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(logits(p, train_x), y[train]).mean()  # noqa: E731
        (parameters, _), _ = jax.lax.scan(descent(loss, tx), (start, tx.init(start)), None, length=STEPS)
        return jnp.mean(jnp.argmax(logits(parameters, test_x), axis=-1) == y[~train])

    of_every = jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)), in_axes=(0, None, None))
    return np.asarray(jax.jit(of_every)(jax.random.split(jax.random.key(0), SEEDS), x[:, train], x[:, ~train]))


@analysis(
    "probes",
    title="What hidden states tell",
    fits=lambda study: labels.has_labels(study) and study.model.cfg.hybrid is None,
    needs=labels.check_labels,
    on_prompts=False,
)
def probes(study: Study) -> dict[str, Any]:
    """For each template of `evaluation.labels` and each of CHOICES: accuracy of both probes by layer, of length alone, of chance.
    A label without two classes of enough documents has a reason instead."""
    corpora, templates = study.corpora, study.corpora.config.evaluation.labels
    cache, documents = corpora.caches[0], documents_of(corpora, "validation", 8)[:DOCUMENTS]
    head, _ = labels.opening(corpora, () if labels.has_context(study) else None)
    rows = labels.with_rows(study, [head] * len(documents), documents, TOKENS)
    found = rows.over_prompts("hidden states", states)["states"].swapaxes(0, 1)
    lengths = np.log(np.minimum(np.asarray(cache.lengths)[documents], TOKENS))
    train = np.asarray(cache.origins)[documents] % 2 == 0
    out: dict[str, Any] = {"documents": len(documents), "layers": len(found), "templates": list(templates)}
    for number, template in enumerate(templates):
        classes, names = labels.classes_of(labels.texts_of(corpora, template, documents), LEAST)
        probed = {choice: _probed(found, lengths, classes, train, bins) for choice, (bins, _) in CHOICES.items()}
        out[f"label_{number}"] = {"template": template, "names": names} | probed
    return out


def _probed(x: np.ndarray, lengths: np.ndarray, classes: np.ndarray, train: np.ndarray, bins: int) -> dict[str, Any]:
    """The numbers of one choice of documents; x: states [S, N, width]."""
    rng, used = np.random.default_rng(bins), np.zeros(len(classes), bool)
    for side in (train, ~train):  # balance training and test documents
        used |= labels.matched(np.where(side, classes, -1), lengths, bins, rng)
    count, documents = classes.max(initial=-1) + 1, int(used.sum())
    if count < 2 or min((used & train).sum(), (used & ~train).sum()) < 2 * count:
        return {"documents": documents, "reason": "too few validation documents of two classes"}
    y, side = classes[used], train[used]
    alone = np.stack([lengths[used], lengths[used] ** 2], axis=-1)[None]
    out = {"documents": documents, "chance": 1 / count, "length": float(accuracies(alone, y, side, "mlp").mean())}
    for kind in PROBES:
        by_layer = accuracies(x[:, used], y, side, kind).mean(0)
        middle = by_layer[round(MIDDLE * (len(by_layer) - 1))]
        out[kind] = {"mean": float(by_layer.mean()), "middle": float(middle), "layers": rounded(by_layer)}
    return out


@probes.headlines
def headlines(numbers: Numbers) -> list[str]:
    lines = []
    for label in _labels(numbers):
        for choice, (_, words) in CHOICES.items():
            n = label[choice]
            if "reason" in n:
                lines.append(f"{label['template']}, {words}: not probed, {n['reason']}")
                continue
            shown = [
                f"{name} {n[kind]['middle']:.1%} (mean of layers {n[kind]['mean']:.1%})" for kind, (*_, name) in PROBES.items()
            ]
            lines.append(
                f"{label['template']} of {len(label['names'])} classes, {words}, {n['documents']:,} documents: {', '.join(shown)}; "
                f"length alone {n['length']:.1%}, chance {n['chance']:.1%}"
            )
    return lines


@probes.figures
def figures(result: Numbers) -> Figures:
    found = [label for label in _labels(result) if "reason" not in label["balanced"]]
    if not found:
        return []
    figure, axes_of = panels(len(found), 1, 2.2)
    for axes, label in zip(axes_of, found, strict=True):
        curves = [(kind, choice) for kind in PROBES for choice in CHOICES if "reason" not in label[choice]]
        for kind, choice in curves:
            style = {"linestyle": "-" if choice == "balanced" else "--", "color": look(list(PROBES).index(kind))[0]}
            axes.plot(label[choice][kind]["layers"], marker="o", label=f"{PROBES[kind][-1]}, {CHOICES[choice][-1]}", **style)
        axes.axhline(label["balanced"]["chance"], color=GREY, linewidth=1)
        axes.set_title(label["template"], fontweight="bold")
        axes.set(ylabel="accuracy", xticks=range(result["layers"]))
    axes_of[0].legend(fontsize=8)
    axes_of[-1].set_xlabel("layer")
    return [(figure, "Accuracy on documents of other origins, mean of the probes; the grey line is chance.")]


def _labels(numbers: Numbers) -> list[dict[str, Any]]:
    return [numbers[f"label_{i}"] for i in range(len(numbers["templates"]))]
