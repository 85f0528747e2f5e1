"""Steps by the gradient's sign, an optimizer."""

import optax

from metajax.training.optimizers import optimizer


@optimizer("signs")
def signs(cfg, rate, model):
    return optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(rate))
