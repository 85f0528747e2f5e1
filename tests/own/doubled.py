"""Twice the loss of a language model, an objective."""

from metajax.training.objectives import objective, objectives


@objective("doubled")
def doubled(config, model, batch):
    found = objectives["language_model"].loss(config, model, batch)
    total, weight = found["loss"]
    return {**found, "loss": (2 * total, weight)}
