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
from metajax.analysis.common.study import Arrays, Study, capture, rounded
from metajax.models.lm import LM
from metajax.reporting.figures import look
from metajax.reporting.panels import GREY, panels

DOCUMENTS, TOKENS, LEAST = 2_000, 512, 30  # documents; positions of a row; documents of a class that is probed
BINS = {"balanced": 1, "matched": 5}  # ranges of length with equally many documents of every class
HIDDEN, STEPS, SEEDS = 128, 200, 2
PROBES = {"linear": (), "mlp": (HIDDEN, HIDDEN)}
RATES = {"linear": 1e-2, "mlp": 1e-3}
MIDDLE = 6 / 16  # the layer that the paper compares models at
CHOICES = {"balanced": "classes balanced", "matched": "lengths matched too"}
KINDS = {"linear": "linear", "mlp": "three layers"}


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
    train_y, test_y = jnp.asarray(y[train]), y[~train]
    widths, tx = (x.shape[-1], *PROBES[kind], int(y.max()) + 1), optax.adamw(RATES[kind], weight_decay=1e-2)

    def logits(parameters: list[tuple[Array, Array]], x: Array) -> Array:
        for w, b in parameters[:-1]:
            x = jax.nn.gelu(x @ w + b)
        return x @ parameters[-1][0] + parameters[-1][1]

    def loss(parameters: Any, x: Array, y: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(parameters, x), y).mean()

    def one(key: Array, train_x: Array, test_x: Array) -> Array:
        keys = jax.random.split(key, len(widths) - 1)
        sizes = zip(keys, widths[:-1], widths[1:], strict=True)
        parameters = [(jax.random.normal(k, (i, o)) / np.sqrt(i), jnp.zeros(o)) for k, i, o in sizes]

        def step(carry: Any, _: None) -> tuple[Any, None]:
            parameters, state = carry
            updates, state = tx.update(jax.grad(loss)(parameters, train_x, train_y), state, parameters)
            return (optax.apply_updates(parameters, updates), state), None

        (parameters, _), _ = jax.lax.scan(step, (parameters, tx.init(parameters)), None, length=STEPS)
        return jnp.mean(jnp.argmax(logits(parameters, test_x), axis=-1) == test_y)

    over_readings = jax.vmap(one, in_axes=(None, 0, 0))
    keys = jax.random.split(jax.random.key(0), SEEDS)
    return np.asarray(
        jax.jit(jax.vmap(over_readings, in_axes=(0, None, None)))(keys, jnp.asarray(x[:, train]), jnp.asarray(x[:, ~train]))
    )


@analysis(
    "probes",
    title="What hidden states tell",
    fits=lambda study: labels.has_labels(study) and study.model.cfg.hybrid is None,
    needs=labels.check_labels,
    on_prompts=False,
)
def probes(study: Study) -> dict[str, Any]:
    """For each template of `evaluation.labels` and each choice of documents: accuracy of both probes by layer, of length alone, of chance.

    Half of the origins train a probe, the others test it. A label without two classes of enough documents has a reason instead.
    """
    corpora, templates = study.corpora, study.corpora.config.evaluation.labels
    cache, documents = corpora.caches[0], labels.some_documents(corpora, "validation", 8, DOCUMENTS)
    head, _ = labels.opening(corpora, () if labels.has_context(study) else None)
    chosen_rows = labels.with_rows(study, [head] * len(documents), documents, TOKENS)
    found = chosen_rows.over_prompts("hidden states", states, study.model)["states"].swapaxes(0, 1)
    lengths = np.log(np.minimum(np.asarray(cache.lengths)[documents], TOKENS))
    train = np.asarray(cache.origins)[documents] % 2 == 0
    out: dict[str, Any] = {"documents": len(documents), "layers": len(found), "templates": list(templates)}
    for number, template in enumerate(templates):
        classes, names = labels.classes_of(labels.texts_of(corpora, template, documents), LEAST)
        of_label: dict[str, Any] = {"template": template, "names": names}
        for choice, bins in BINS.items():
            of_label[choice] = _probed(found, lengths, classes, train, bins)
        out[f"label_{number}"] = of_label
    return out


def _probed(
    found: Float[np.ndarray, "S N width"], lengths: Float[np.ndarray, " N"], classes: Int[np.ndarray, " N"], train: Bool[np.ndarray, " N"],
    bins: int,
) -> dict[str, Any]:  # fmt: skip
    rng = np.random.default_rng(bins)
    used = np.zeros(len(classes), bool)
    for side in (train, ~train):  # balance training and test documents
        used |= labels.matched(np.where(side, classes, -1), lengths, bins, rng)
    count = classes.max(initial=-1) + 1
    if count < 2 or min((used & train).sum(), (used & ~train).sum()) < 2 * count:
        return {"documents": int(used.sum()), "reason": "too few validation documents of two classes"}
    y, side = classes[used], train[used]
    alone = np.stack([lengths[used], lengths[used] ** 2], axis=-1)[None]
    out: dict[str, Any] = {
        "documents": int(used.sum()),
        "chance": 1 / count,
        "length": float(accuracies(alone, y, side, "mlp").mean()),
    }
    for kind in PROBES:
        by_layer = accuracies(found[:, used], y, side, kind).mean(0)
        middle = by_layer[round(MIDDLE * (len(by_layer) - 1))]
        out[kind] = {"mean": float(by_layer.mean()), "middle": float(middle), "layers": rounded(by_layer)}
    return out


@probes.headlines
def headlines(numbers: Numbers) -> list[str]:
    lines = []
    for label in (numbers[f"label_{i}"] for i in range(len(numbers["templates"]))):
        for choice, words in CHOICES.items():
            found = label[choice]
            if "reason" in found:
                lines.append(f"{label['template']}, {words}: not probed, {found['reason']}")
                continue
            shown = ", ".join(
                f"{kind} {found[name]['middle']:.1%} (mean of layers {found[name]['mean']:.1%})" for name, kind in KINDS.items()
            )
            lines.append(
                f"{label['template']} of {len(label['names'])} classes, {words}, {found['documents']:,} documents: {shown}; length alone "
                f"{found['length']:.1%}, chance {found['chance']:.1%}"
            )
    return lines


@probes.figures
def figures(result: Numbers) -> Figures:
    found = [result[f"label_{i}"] for i in range(len(result["templates"]))]
    found = [label for label in found if "reason" not in label["balanced"]]
    if not found:
        return []
    figure, axes_of = panels(len(found), 1, 2.2)
    for axes, label in zip(axes_of, found, strict=True):
        for i, (kind, words) in enumerate(KINDS.items()):
            for choice, style in zip(CHOICES, ("-", "--"), strict=True):
                if "reason" not in label[choice]:
                    name = f"{words}, {CHOICES[choice]}"
                    axes.plot(label[choice][kind]["layers"], style, marker="o", color=look(i)[0], label=name)
        axes.axhline(label["balanced"]["chance"], color=GREY, linewidth=1)
        axes.set_title(label["template"], fontweight="bold")
        axes.set(ylabel="accuracy", xticks=range(result["layers"]))
    axes_of[0].legend(fontsize=8)
    axes_of[-1].set_xlabel("layer")
    caption = "Accuracy on documents of other origins, mean of the probes; the grey line is chance."
    return [(figure, caption)]
