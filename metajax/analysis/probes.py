"""What a model's hidden states say of a document: topic, quality, author, by probes on frozen states of every layer.

Beyond URLs (arXiv 2511.21613, section on probing) has a multilayer perceptron of three layers; pooling, sizes and training are not stated.
Here: states averaged over the text's tokens, no metadata shown (the empty pair where training had it in front), classes balanced, and a
second choice of documents with the same lengths in every class, as length alone tells some labels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from metajax.analysis.labels import check_labels, classes_of, matched, opening, some_documents, texts_of, with_rows
from metajax.analysis.study import Batch, Study, capture, rounded
from metajax.models.lm import LM

DOCUMENTS, TOKENS, LEAST = 2_000, 512, 30  # documents; slots of a row; documents of a class that is probed
BINS = {"balanced": 1, "matched": 5}  # ranges of length with equally many documents of every class
HIDDEN, STEPS, SEEDS = 128, 200, 2
PROBES = {"linear": (), "mlp": (HIDDEN, HIDDEN)}
RATES = {"linear": 1e-2, "mlp": 1e-3}
MIDDLE = 6 / 16  # the layer that the paper compares models at


def states(model: LM, batch: Batch) -> dict[str, Float[Array, "B S width"]]:
    """Mean over a row's body tokens of the input of every block, and of the final state."""
    found = capture(model, batch, "residual", "final")
    layers = jnp.concatenate([found["residual"], found["final"][:, None]], axis=1).astype(jnp.float32)
    weights = batch["is_body"].astype(jnp.float32)
    return {"states": jnp.einsum("bltw,bt->blw", layers, weights) / jnp.maximum(jnp.sum(weights, axis=1), 1)[:, None, None]}


def accuracies(
    x: Float[np.ndarray, "S N width"], y: Int[np.ndarray, " N"], train: Bool[np.ndarray, " N"], kind: str
) -> Float[np.ndarray, "seeds S"]:
    """Test accuracy of a probe for each of S readings of the same documents, standardised by its training part."""
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


def probes(study: Study) -> dict[str, Any]:
    """For each template of `evaluation.labels` and each choice of documents: accuracy of both probes by layer, of length alone, of chance.

    Half of the origins train a probe, the others test it. A label without two classes of enough documents has the reason instead.
    """
    templates, corpora = check_labels(study, "probes"), study.corpora
    recipe, cache = corpora.config.metadata, corpora.caches[0]
    documents = some_documents(corpora, "held_out", 8, DOCUMENTS)
    shown = () if recipe is not None and recipe.prepended else None
    head, _ = opening(corpora, shown)
    chosen_rows = with_rows(study, [head] * len(documents), documents, TOKENS)
    found = chosen_rows.over_prompts("hidden states", states, study.model)["states"].swapaxes(0, 1)
    lengths = np.log(np.minimum(np.asarray(cache.lengths)[documents], TOKENS))
    train = np.asarray(cache.origins)[documents] % 2 == 0
    out: dict[str, Any] = {"documents": len(documents), "layers": len(found), "templates": list(templates)}
    for number, template in enumerate(templates):
        classes, names = classes_of(texts_of(corpora, template, documents), LEAST)
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
    for side in (train, ~train):  # balanced on both sides
        used |= matched(np.where(side, classes, -1), lengths, bins, rng)
    count = classes.max(initial=-1) + 1
    if count < 2 or min((used & train).sum(), (used & ~train).sum()) < 2 * count:
        return {"documents": int(used.sum()), "reason": "too few held-out documents of two classes"}
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
