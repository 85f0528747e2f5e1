"""AdamW."""

from __future__ import annotations

from typing import Any

import optax

from metajax.config import Optimizer
from metajax.models.lm import decay_mask
from metajax.training.optimizers import optimizer


@optimizer("adamw", ignores=("momentum",))
def adamw(cfg: Optimizer, rate: optax.Schedule, model: Any) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101). Norms, biases and rates have no weight decay (`decay_mask`)."""
    b1, b2 = cfg.betas
    return optax.adamw(rate, b1=b1, b2=b2, weight_decay=cfg.weight_decay, mask=decay_mask(model))
