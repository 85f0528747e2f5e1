"""The distinct programs of all experiments, for `plan --all`. Experiments with the same model and batch share a compiled step."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace

from metajax.config import AnyConfig, ImageConfig, Prompts
from metajax.vision.data.published import CLASSES

SLICES = ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:4x4x4")  # tried in this order
# Fields of a prompt learner that change only numbers in its step, not shapes.
_RATES = ("context_init", "beta", "margin", "epochs", "learning_rate", "warmup_rate", "weight_decay")


def program_of(config: AnyConfig) -> Hashable:
    """The key of a train step's program: model, batch sizes, meta-tokens and runtime; not data, seed and rates."""
    runtime = config.runtime
    how = (runtime.mesh, runtime.remat, runtime.unroll, runtime.implementation, config.optimizer.name)
    how = (*how, config.training.accumulation_steps, config.training.objective)
    if not isinstance(config, ImageConfig):
        batch = (config.row_positions, config.data.batch_size, config.row_meta_tokens)
        return config.model, config.meta_tokens, batch, config.data.tokenizer, how
    learner = config.prompts
    if learner is not None:
        plain = {name: getattr(Prompts(), name) for name in _RATES}
        learner = replace(learner, **plain, alpha=float(learner.alpha > 0), augment=float(learner.augment > 0))
    return config.clip, config.weights, learner, config.images.classes, config.images.batch, how


def programs(configs: Iterable[AnyConfig]) -> list[list[AnyConfig]]:
    """The configs grouped by program, without zero-shot configs; the first of each group has the most classes."""
    groups: dict[Hashable, list[AnyConfig]] = {}
    for config in configs:
        if not isinstance(config, ImageConfig) or config.prompts is None or config.prompts.context:
            groups.setdefault(program_of(config), []).append(config)
    return [sorted(group, key=_classes, reverse=True) for group in groups.values()]


def _classes(config: AnyConfig) -> int:
    return CLASSES.get(config.images.sources[0], 0) if isinstance(config, ImageConfig) else 0
