"""Attention beside Mamba: the size of both branches, their learned scales, and the loss without one branch of one layer.

Sizes are before the branches' norms. In the paper Mamba's output is larger in every layer. Removing it costs more (1.1 against 0.24 points of
HellaSwag), most in the first layer.

Source: Hymba (arXiv 2411.13676): figure 12, equation 3 (the scales are its betas), and the section on the importance of heads, which sets
the scale of one branch of one layer to zero.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common.numbers import mean_over_rows
from metajax.analysis.common.study import Arrays, Study, capture, is_parallel, layers_of
from metajax.analysis.mixing_maps import MIXERS
from metajax.core.errors import require
from metajax.models.cross_entropy import weighed
from metajax.models.layer import Layer
from metajax.models.layers import Norm
from metajax.models.lm import LM
from metajax.reporting.panels import by_layer, panels
from metajax.training.losses import token_scores


def branch_norm(layer: Layer, branch: str) -> Norm:
    """The norm of a branch of a layer; "ssm" is the mixer beside attention, of any kind."""
    name = next(name for name in layer.mixer.names if (name == "attention") == (branch == "attention"))
    return getattr(layer.mixer, f"{name}_norm")


def without_branch(model: LM, layer: int, branch: str) -> LM:
    """The model with the scale of one branch of one layer at zero."""
    changed = jax.tree.map(lambda leaf: leaf, model)  # a new object that shares the arrays
    stacked, index = list(layers_of(changed))[layer]
    scale = branch_norm(stacked, branch).scale
    scale[...] = scale[...].at[index].set(0.0)
    return changed


def magnitudes(model: LM, batch: Arrays) -> dict[str, Float[Array, "B L"]]:
    """Root mean square of both branches before their norms."""
    found = capture(model, batch, "attention_branch", "ssm_branch")
    return {name: jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=(2, 3))) for name, x in found.items()}


def nats(model: LM, batch: Arrays) -> dict[str, Float[Array, " B"]]:
    """Nats per token of each row."""
    weights = batch["loss_weights"]
    total = jnp.sum(weighed(weights, token_scores(model, batch).nll), axis=1)
    return {"nats": total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)}


def _needs(study: Study) -> None:
    require(
        is_parallel(study) and study.model.cfg.hybrid.branch_norm == "scaled",
        "needs attention beside Mamba (model.hybrid.fusion mean or concat) and model.hybrid.branch_norm = scaled",
    )


@analysis(
    "branches", title="Attention beside Mamba", fits=lambda study: is_parallel(study) and study.model.meta is None, needs=_needs
)
def branches(study: Study) -> dict[str, Any]:
    """For attention and ssm: rms and scale by layer, and knock_out {mean, half, layers}: the rise of the rows' nats per token
    without the branch, its mean over layers with a 95 % interval over rows."""
    sizes = study.over_prompts("branches", magnitudes)
    whole = study.over_prompts("the whole model", nats)["nats"]
    found: dict[str, Any] = {"nats": float(whole.mean())}
    for branch in MIXERS:
        scales, gains = [], []
        for number, (layer, index) in enumerate(layers_of(study.model)):
            scales.append(float(np.abs(branch_norm(layer, branch).scale[...][index]).mean()))
            without = without_branch(study.model, number, branch)
            gains.append(study.over_prompts(f"layer {number + 1} without {branch}", nats, without)["nats"] - whole)
        knock_out = mean_over_rows(np.mean(gains, axis=0)) | {"layers": np.mean(gains, axis=1).tolist()}
        found[branch] = {"rms": sizes[f"{branch}_branch"].mean(axis=0).tolist(), "scale": scales, "knock_out": knock_out}
    return found


@branches.headlines
def headlines(numbers: Numbers) -> list[str]:
    lines = []
    for branch, words in MIXERS.items():
        n = numbers[branch]["knock_out"]
        mean, most = f"{n['mean']:+.4f} ± {n['half']:.4f} nats a token, mean of the layers", max(n["layers"])
        lines.append(f"without {words} in one layer: {mean}; {most:+.4f} in layer {1 + n['layers'].index(most)}")
    return lines


@branches.figures
def figures(result: Numbers) -> Figures:
    figure, axes_of = panels(3, 1, 2.0)
    words = {"rms": "size before the norm", "scale": "learned scale", "knock_out": "nats a token without it"}
    for axes, (name, label) in zip(axes_of, words.items(), strict=True):
        found = {title: result[branch][name] for branch, title in MIXERS.items()}
        by_layer(axes, {title: n["layers"] if name == "knock_out" else n for title, n in found.items()})
        axes.set_ylabel(label)
    axes_of[0].legend(fontsize=8.5)
    axes_of[-1].set_xlabel("layer")
    return [(figure, "Root mean square and mean absolute scale; loss on the rows without the branch, minus with it.")]
