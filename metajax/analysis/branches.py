"""Attention beside Mamba: how large the two branches are, their learned scales, and what each layer loses without one of them.

Source: Hymba (arXiv 2411.13676): figure 12, equation 3 (the scales are its betas), and the section on the importance of heads, which sets
the scale of one branch of one layer to zero.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import stdtrit

from metajax.analysis.study import Batch, Study, capture
from metajax.core.errors import require
from metajax.models.layer import Joined
from metajax.models.layers import Norm
from metajax.models.lm import LM
from metajax.training.losses import token_nll, weighed
from metajax.training.step import apply_model

BRANCHES = ("attention", "ssm")


def branch_norm(joined: Joined, branch: str) -> Norm:
    """The norm of a branch of a layer; "ssm" is the mixer beside attention, whatever its name."""
    name = next(name for name in joined.names if (name == "attention") == (branch == "attention"))
    return getattr(joined, f"{name}_norm")


def without_branch(model: LM, layer: int, branch: str) -> LM:
    """The model with the scale of one branch of one layer at zero."""
    changed = jax.tree.map(lambda leaf: leaf, model)  # a new object that shares the arrays
    first = 0
    for run in changed.blocks:
        group = len(run)
        count = group * len(run[0].mixer.output.w[...])
        if layer < first + count:
            scale = branch_norm(run[(layer - first) % group].mixer, branch).scale
            scale[...] = scale[...].at[(layer - first) // group].set(0.0)
            return changed
        first += count
    raise IndexError(f"layer {layer} of {first}")


def scales(model: LM, branch: str) -> list[float]:
    """The mean absolute scale of a branch, by layer."""
    found = []
    for run in model.blocks:
        of_run = [np.abs(branch_norm(layer.mixer, branch).scale[...]).mean(axis=-1) for layer in run]
        found += np.stack(of_run, axis=1).ravel().tolist()
    return found


def magnitudes(model: LM, batch: Batch) -> dict[str, Float[Array, "B L"]]:
    """Root mean square of both branches before their norms."""
    found = capture(model, batch, "attention_branch", "ssm_branch")
    return {name: jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=(2, 3))) for name, x in found.items()}


def nats(model: LM, batch: Batch) -> dict[str, Float[Array, " B"]]:
    """Nats a token of each row."""
    weights = batch["loss_weights"]
    total = jnp.sum(weighed(weights, token_nll(apply_model(model, batch), batch["targets"])[0]), axis=1)
    return {"nats": total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)}


def branches(study: Study) -> dict[str, Any]:
    """For attention and ssm: rms and scale by layer, and knock_out, what the rows' nats a token gain without the branch:
    {mean, half, layers}, the mean over layers with its 95 % interval over rows."""
    hybrid = study.model.cfg.hybrid
    require(
        hybrid is not None and hybrid.is_parallel and hybrid.branch_norm == "scaled",
        "branches: needs attention beside Mamba (model.hybrid.fusion mean or concat) and model.hybrid.branch_norm = scaled",
    )
    sizes = study.over_prompts("branches", magnitudes, study.model)
    whole = study.over_prompts("the whole model", nats, study.model)["nats"]
    found: dict[str, Any] = {"nats": float(whole.mean())}
    for branch in BRANCHES:
        layers = range(study.model.cfg.layers)
        gains = [
            study.over_prompts(f"layer {layer + 1} without {branch}", nats, without_branch(study.model, layer, branch))["nats"]
            - whole
            for layer in layers
        ]
        rows = np.mean(gains, axis=0)
        half = stdtrit(len(rows) - 1, 0.975) * rows.std(ddof=1) / np.sqrt(len(rows))
        found[branch] = {
            "rms": sizes[f"{branch}_branch"].mean(axis=0).tolist(),
            "scale": scales(study.model, branch),
            "knock_out": {"mean": float(rows.mean()), "half": float(half), "layers": np.mean(gains, axis=1).tolist()},
        }
    return found
