"""Plans of all experiments: one of each distinct program, on the first slice of a list that holds it, whatever becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metajax.config import AnyConfig, ImageConfig, Prompts
from metajax.core.progress import say
from metajax.runs.files import write_json
from metajax.vision.data.published import CLASSES

SLICES = ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:4x4x4")  # tried in this order: a host, then larger ones
# Numbers that a learner's step has in it.
_RATES = ("context_init", "beta", "margin", "epochs", "learning_rate", "warmup_rate", "weight_decay")


def has_step(config: AnyConfig) -> bool:
    """Whether anything is trained: zero-shot classes are not."""
    return not isinstance(config, ImageConfig) or config.prompts is None or config.prompts.context > 0


def program_of(config: AnyConfig) -> Hashable:
    """What tells one train step from another: model, sizes of a batch, meta-tokens and how it is carried out; data, seed and rates do not."""
    runtime = config.runtime
    how = (runtime.mesh, runtime.remat, runtime.unroll, runtime.implementation, config.optimizer.name)
    how = (*how, config.training.accumulate, config.training.objective)
    if not isinstance(config, ImageConfig):
        batch = (config.row_slots, config.data.batch_rows, config.row_meta_tokens)
        return config.model, config.meta_tokens, batch, config.data.tokenizer, how
    learner = config.prompts
    if learner is not None:
        plain = {name: getattr(Prompts(), name) for name in _RATES}
        learner = replace(learner, **plain, alpha=float(learner.alpha > 0), augment=float(learner.augment > 0))
    return config.clip, config.weights, learner, config.images.classes, config.images.batch, how


def programs(configs: Iterable[AnyConfig]) -> list[list[AnyConfig]]:
    """The configs that train, those of one program together; the first of each has the most classes where that differs."""
    groups: dict[Hashable, list[AnyConfig]] = {}
    for config in filter(has_step, configs):
        groups.setdefault(program_of(config), []).append(config)
    return [sorted(group, key=_classes, reverse=True) for group in groups.values()]


def _classes(config: AnyConfig) -> int:
    return CLASSES.get(config.images.sources[0], 0) if isinstance(config, ImageConfig) else 0


def survey(
    configs: Iterable[AnyConfig], slices: Sequence[str], plan: Callable[[AnyConfig, str], dict[str, Any]], file: Path
) -> list[dict[str, Any]]:
    """The plan of each program, with `stands_for`, the names of all configs that it serves; `file` has those made so far.

    Args:
      plan: of a config on a slice, as `metajax.planning.plan.plan` gives it.
    """
    groups, made = programs(configs), []
    for number, group in enumerate(groups, 1):
        say(f"program {number} of {len(groups)}: {group[0].name}, which stands for {len(group)}")
        made.append(_on_first(group[0], slices, plan) | {"stands_for": [config.name for config in group]})
        write_json(file, made)
    return made


def _on_first(config: AnyConfig, slices: Sequence[str], plan: Callable[[AnyConfig, str], dict[str, Any]]) -> dict[str, Any]:
    """The plan on the first slice that holds the step; where none does, what came of the last one."""
    for topology in slices:
        try:
            found = plan(config, topology)
        except Exception as error:  # shown in the summary and in the exit code; the other programs have their turn
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            found = {"name": config.name, "topology": topology, "fits": False, "reason": reason}
        if found["fits"]:
            say(
                f"  {topology}: a step of {1e3 * found['bound']['step']:.1f} ms or more, compiled in {found['compile_seconds']:.0f} s"
            )
            break
        say(f"  {topology}: {found['reason']}")
    return found
