"""Muon for the matrices between hidden units."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from metajax.config import Optimizer
from metajax.training.optimizers import optimizer
from metajax.training.optimizers.adamw import adamw

# Logical axes of hidden units. An axis that is not named here, such as that of a new embedding, leaves its parameter to AdamW.
HIDDEN = frozenset({"embed", "heads", "kv_heads", "mlp", "ssm", "channels", "selection"})


def is_hidden(param: nnx.Variable) -> bool:
    """Whether a parameter is a matrix between hidden units. Stacked layers have leading axes that the metadata does not name."""
    axes = param.get_metadata()["axes"]
    return len(axes) == 2 and HIDDEN.issuperset(axes)


@optimizer("muon")
def muon_with_adamw(cfg: Optimizer, rate: optax.Schedule, model: Any) -> optax.GradientTransformation:
    """Muon (Jordan, 2024) on the matrices between hidden units, separately for each stacked layer; AdamW on other parameters."""
    each_matrix = lambda params: jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), params)  # noqa: E731
    decay = cfg.weight_decay
    matrices = muon(rate, beta=cfg.momentum, weight_decay=decay, muon_weight_dimension_numbers=each_matrix)
    label = lambda param: param.replace("muon" if is_hidden(param) else "adamw")  # noqa: E731
    labels = jax.tree.map(label, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    # Pass a function, because optax calls callable labels and a model is callable.
    return optax.partition({"muon": matrices, "adamw": adamw(cfg, rate, model)}, lambda _: labels)
