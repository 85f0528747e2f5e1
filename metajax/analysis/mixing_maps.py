"""Where tokens look: shares of attention maps and of Mamba's maps that go to meta tokens, the first token, the token itself, the others.

Attention maps, and the maps that correspond to Mamba, for every token after the first. The paper reports that attention moves
from the first token to the meta tokens, that Mamba's maps favour the token itself and attention's the others, and that meta
tokens lower the entropy.

Source: Hymba (arXiv 2411.13676), figures 7 and 15 and equation 5. Mamba's map is that of its data-controlled linear operator,
alpha[i, j] = |sum_n C_i exp(A (S_i - S_j)) B_j dt_j| with S the running sum of dt. The paper does not state that it takes the absolute
value, nor how it pools queries. Rows of both kinds sum to 1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common.numbers import mean_over_rows, rounded
from metajax.analysis.common.study import Arrays, Study, capture, layers_of
from metajax.analysis.sharpening import entropy
from metajax.models.lm import LM
from metajax.reporting.figures import look
from metajax.reporting.panels import panels

MIXERS = {"attention": "attention", "ssm": "Mamba"}
CATEGORIES = {"meta": "meta tokens", "first": "first token", "self": "itself", "cross": "others"}
CHANNELS = 16  # evenly spaced channels of Mamba whose maps are computed


def attention_maps(model: LM, batch: Arrays) -> Float[Array, "B L H T P"]:
    """The attention maps, with the learned prefix among the keys."""
    return capture(model, batch, "attention_probabilities")["attention_probabilities"]


def ssm_rates(model: LM) -> Float[Array, "L C N"]:
    """The parameter A of every Mamba, in the order of the layers."""
    found = [layer.mixer.mamba.A_log[...][index] for layer, index in layers_of(model) if "mamba" in layer.mixer.names]
    return -jnp.exp(jnp.stack(found))


def ssm_map(
    steps: Float[Array, "B P"], b: Float[Array, "B P N"], c: Float[Array, "B P N"], rates: Float[Array, " N"]
) -> Float[Array, "B P P"]:
    """One channel's map over P positions: float32, rows sum to 1."""
    position = jnp.cumsum(steps, axis=1)
    index = jnp.arange(steps.shape[1])
    past = index[None, :] <= index[:, None]
    gap = jnp.where(past, position[:, :, None] - position[:, None, :], 0.0)
    decay = jnp.exp(gap[..., None] * rates)
    weights = jnp.abs(jnp.einsum("bin,bijn,bjn->bij", c, decay, b)) * steps[:, None, :] * past
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def ssm_maps(model: LM, batch: Arrays) -> Float[Array, "B L channels T P"]:
    """The maps of CHANNELS channels of every Mamba, P = M + T."""
    names = [f"{prefix}ssm_{name}" for prefix in ("prefix_", "") for name in ("step", "b", "c")]
    found = {name: jnp.moveaxis(x, 0, 1) for name, x in capture(model, batch, *names).items()}  # layers first again
    if model.cfg.prefix_tokens:
        for name in names[3:]:
            prefix = found[f"prefix_{name}"]
            prefix = jnp.broadcast_to(prefix, (*found[name].shape[:2], *prefix.shape[2:]))
            found[name] = jnp.concatenate([prefix, found[name]], axis=2)
    channels = found["ssm_step"].shape[-1]
    chosen = np.linspace(0, channels - 1, min(CHANNELS, channels)).astype(int)

    def of_layer(layer: tuple[Array, ...]) -> Array:
        steps, b, c, rates = layer
        b, c = b.astype(jnp.float32), c.astype(jnp.float32)
        maps = jax.lax.map(lambda one: ssm_map(one[0], b, c, one[1]), (jnp.moveaxis(steps[..., chosen], -1, 0), rates[chosen]))
        return jnp.moveaxis(maps, 0, 1)

    maps = jax.lax.map(of_layer, (*(found[name] for name in names[3:]), ssm_rates(model)))
    return jnp.moveaxis(maps, 0, 1)[..., model.cfg.prefix_tokens :, :]


def describe(maps: Float[Array, "B L H T P"]) -> dict[str, Float[Array, "B L"]]:
    """Entropy in nats and shares of CATEGORIES (all queries but the first); reach of the last query, the sum over tokens of map x
    distance, without meta tokens."""
    length, metas = maps.shape[-2], maps.shape[-1] - maps.shape[-2]
    index = jnp.arange(length)
    real = jnp.mean(maps[..., metas:], axis=2)  # over heads

    def average(of_queries: Float[Array, "B L T"]) -> Float[Array, "B L"]:
        return jnp.sum(jnp.where(index >= 1, of_queries, 0.0), axis=-1) / (length - 1)

    shares = {
        "meta": average(jnp.sum(jnp.mean(maps[..., :metas], axis=2), axis=-1)),
        "first": average(real[..., 0]),
        "self": average(jnp.diagonal(real, axis1=-2, axis2=-1)),
    }
    shares["cross"] = 1 - sum(shares.values())
    reach = jnp.sum(real[..., -1, :] * (length - 1 - index), axis=-1)
    return shares | {"entropy": average(jnp.mean(entropy(maps), axis=2)), "reach": reach}


@analysis("mixing_maps", title="Where tokens look", fits=lambda study: study.model.meta is None)
def mixing_maps(study: Study) -> dict[str, Any]:
    """For attention and ssm, if the model has them: {entropy, meta, first, self, cross, reach: {mean, half, layers}}.

    reach is the effective receptive field in tokens: the sum over layers n = 1 .. N of 2 (N - n + 1) / (N (N + 1)) x the last query's
    reach. All others are means over layers. half: half width of the 95 % interval over rows.
    """
    hybrid, found = study.model.cfg.hybrid, {}
    fits = {"attention": hybrid is None or hybrid.fusion != "mamba"}
    fits["ssm"] = hybrid is not None and hybrid.fusion != "attention" and hybrid.ssm == "mamba"
    for kind, maps_of in {"attention": attention_maps, "ssm": ssm_maps}.items():
        if not fits[kind]:
            continue
        values = study.over_prompts(f"maps of {MIXERS[kind]}", lambda *args, maps_of=maps_of: describe(maps_of(*args)))
        layers = values["reach"].shape[1]
        decreasing = 2 * np.arange(layers, 0, -1) / (layers * (layers + 1))
        rows = {name: of @ decreasing if name == "reach" else of.mean(axis=1) for name, of in values.items()}
        found[kind] = {name: mean_over_rows(rows[name]) | {"layers": rounded(of.mean(axis=0))} for name, of in values.items()}
    return found


@mixing_maps.headlines
def headlines(numbers: Numbers) -> list[str]:
    lines = []
    for kind, title in MIXERS.items():
        if found := numbers.get(kind):
            shares = ", ".join(f"{words} {found[k]['mean']:.1%} ± {found[k]['half']:.1%}" for k, words in CATEGORIES.items())
            entropy, reach = (f"{found[k]['mean']:.{n}f} ± {found[k]['half']:.{n}f}" for k, n in (("entropy", 3), ("reach", 1)))
            lines.append(f"{title}: {shares}; entropy {entropy} nats; effective receptive field {reach} tokens")
    return lines


@mixing_maps.figures
def figures(result: Numbers) -> Figures:
    kinds = [kind for kind in MIXERS if kind in result]
    figure, axes_of = panels(1, len(kinds), 3.0)
    for axes, kind in zip(axes_of, kinds, strict=True):
        layers, below = np.arange(1, len(result[kind]["entropy"]["layers"]) + 1), 0.0
        for i, (name, words) in enumerate(CATEGORIES.items()):
            share = np.array(result[kind][name]["layers"])
            axes.bar(layers, share, bottom=below, color=look(i)[0], alpha=0.8, label=words)
            below = below + share
        axes.set_title(MIXERS[kind], fontweight="bold")
        axes.set(xlabel="layer", xticks=layers)
        axes.set_ylim(0, 1)
    axes_of[0].set_ylabel("share of the map")
    figure.legend(*axes_of[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(CATEGORIES), fontsize=8.5)
    return [(figure, "Mean over rows, queries and heads (for Mamba: some of its channels).")]
