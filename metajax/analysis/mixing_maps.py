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
from metajax.analysis.common.study import Arrays, Study, capture, has_meta_tokens, mean_over_rows, rounded
from metajax.analysis.sharpening import entropy
from metajax.models.lm import LM
from metajax.reporting.figures import look
from metajax.reporting.panels import panels

MIXERS = {"attention": "attention", "ssm": "Mamba"}
CATEGORIES = {"meta": "meta tokens", "first": "first token", "self": "itself", "cross": "others"}
CHANNELS = 16  # evenly spaced channels of Mamba whose maps are computed


def ssm_rates(model: LM) -> Float[Array, "L C N"]:
    """The parameter A of every Mamba, in the order of the layers."""
    found = []
    for run in model.blocks:
        of_run = [layer.mixer.mamba.A_log[...] for layer in run if "mamba" in layer.mixer.names]
        found += [rate[i] for i in range(len(of_run[0]) if of_run else 0) for rate in of_run]
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


def ssm_maps(model: LM, batch: Arrays) -> Float[Array, "L B channels T P"]:
    """The maps of CHANNELS channels of every Mamba, P = M + T."""
    names = [f"{prefix}ssm_{name}" for prefix in ("prefix_", "") for name in ("step", "b", "c")]
    found = {name: jnp.moveaxis(x, 0, 1) for name, x in capture(model, batch, *names).items()}  # layers first again
    if model.cfg.prefix_tokens:
        rows = batch["tokens"].shape[0]
        spread = lambda x: jnp.broadcast_to(x, (x.shape[0], rows, *x.shape[2:]))  # noqa: E731
        found = {n: jnp.concatenate([spread(found[f"prefix_{n}"]), found[n]], axis=2) for n in names[3:]}
    chosen = np.linspace(0, found["ssm_step"].shape[-1] - 1, min(CHANNELS, found["ssm_step"].shape[-1])).astype(int)

    def of_layer(layer: tuple[Array, ...]) -> Array:
        steps, b, c, rates = layer
        b, c = b.astype(jnp.float32), c.astype(jnp.float32)
        one = lambda channel: ssm_map(channel[0], b, c, channel[1])  # noqa: E731
        return jnp.moveaxis(jax.lax.map(one, (jnp.moveaxis(steps[..., chosen], -1, 0), rates[chosen])), 0, 1)

    maps = jax.lax.map(of_layer, (found["ssm_step"], found["ssm_b"], found["ssm_c"], ssm_rates(model)))
    return maps[:, :, :, model.cfg.prefix_tokens :]


def describe(maps: Float[Array, "L B H T P"]) -> dict[str, Array]:
    """Per layer and row, [B, L] each: entropy in nats, shares of CATEGORIES (all queries but the first), reach of the last query.

    reach: sum over tokens of map x distance, without meta tokens.
    """
    length, metas = maps.shape[-2], maps.shape[-1] - maps.shape[-2]
    index = jnp.arange(length)
    real = jnp.mean(maps[..., metas:], axis=2)  # over heads
    later = index >= 1
    own = jnp.diagonal(real, axis1=-2, axis2=-1)
    average = lambda x: jnp.sum(jnp.where(later, x, 0.0), axis=-1) / jnp.sum(later)  # noqa: E731
    shares = {
        "meta": average(jnp.sum(jnp.mean(maps[..., :metas], axis=2), axis=-1)),
        "first": average(real[..., 0]),
        "self": average(own),
    }
    shares["cross"] = 1 - sum(shares.values())
    found = shares | {
        "entropy": average(jnp.mean(entropy(maps), axis=2)),
        "reach": jnp.sum(real[..., -1, :] * (length - 1 - index), axis=-1),
    }
    return {name: jnp.moveaxis(value, 1, 0) for name, value in found.items()}


def attention_map(model: LM, batch: Arrays) -> dict[str, Array]:
    """`describe` of the attention maps."""
    return describe(
        jnp.moveaxis(capture(model, batch, "attention_probabilities")["attention_probabilities"], 0, 1).astype(jnp.float32)
    )


def mamba_map(model: LM, batch: Arrays) -> dict[str, Array]:
    """`describe` of Mamba's maps."""
    return describe(ssm_maps(model, batch))


@analysis("mixing_maps", title="Where tokens look", fits=lambda study: not has_meta_tokens(study))
def mixing_maps(study: Study) -> dict[str, Any]:
    """For attention and ssm, if the model has them: {entropy, meta, first, self, cross, reach: {mean, half, layers}}.

    reach is the effective receptive field: the sum over layers n = 1 .. N of 2 (N - n + 1) / (N (N + 1)) x the last query's reach, in
    tokens; all others are means over layers. half: half width of the 95 % interval over rows.
    """
    hybrid, found = study.model.cfg.hybrid, {}
    if hybrid is None or hybrid.fusion != "mamba":
        found["attention"] = _pool(study.over_prompts("attention maps", attention_map, study.model))
    if hybrid is not None and hybrid.fusion != "attention" and hybrid.ssm == "mamba":
        found["ssm"] = _pool(study.over_prompts("maps of Mamba", mamba_map, study.model))
    return found


def _pool(values: dict[str, np.ndarray]) -> dict[str, Any]:
    layers = next(iter(values.values())).shape[1]
    decreasing = 2 * np.arange(layers, 0, -1) / (layers * (layers + 1))
    pooled = {}
    for name, value in values.items():
        rows = value @ decreasing if name == "reach" else value.mean(axis=1)
        pooled[name] = mean_over_rows(rows) | {"layers": rounded(value.mean(axis=0))}
    return pooled


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
    caption = "Mean over rows, queries and heads (for Mamba: some of its channels)."
    return [(figure, caption)]
