"""The verb `plan`: a plan of either family, advice, the largest batch, and a survey of all experiments."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from metajax import registry
from metajax.config import AnyConfig, Config
from metajax.core.errors import first_line, require
from metajax.core.fields import override
from metajax.core.progress import echo, say
from metajax.data.encoding import Vocabulary
from metajax.data.pipeline import Paths
from metajax.data.tokenizers import vocabulary_of
from metajax.planning.advice import advise, largest_batch
from metajax.planning.plan import plan, text_step
from metajax.reporting.plan_page import write_plan_page
from metajax.reporting.terminal import print_plan, print_survey
from metajax.runs.files import write_json
from metajax.runs.parents import resolve_parents
from metajax.vision.config import ImageConfig
from metajax.vision.program import image_key, image_step, shapes_of

SLICES = ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:4x4x4")  # tried in this order


def run_plan(options: argparse.Namespace, config: AnyConfig, parents: Sequence[AnyConfig], paths: Paths, dump: Path) -> int:
    """Print the plan of a config that starts from the runs of `parents`; returns 1 if it does not fit."""
    step = _step(config, parents, paths, options.vocabulary)
    found = plan(config, step, options.topology, dump, schedules=options.schedules)
    shards = found["mesh"]["data"] * found["mesh"]["fsdp"]  # shards of a batch's rows
    if not found["fits"]:
        say("it does not fit; looking for a change that does")
        found["advice"] = advise(config, shards, lambda changed: plan(changed, step, options.topology))
    if options.largest_batch:
        field, size, pieces = config.batch

        def fits(count: int) -> bool:
            say(f"trying {field}={count}")
            return plan(override(config, {field: count}), step, options.topology)["fits"]

        found["largest_batch"] = {"field": field, "size": largest_batch(shards * pieces, size, fits)}
    if options.html is not None:
        write_plan_page(options.html, found)
    if options.json:
        echo(json.dumps(found, indent=1).replace("\x7f", "\\u007f"))  # the only control character that JSON does not escape
    else:
        print_plan(found)
    return 0 if found["fits"] else 1


def run_survey(options: argparse.Namespace, paths: Paths, dump: Path) -> int:
    """Print and write plans of all experiments of a scale, one per program; returns 1 if any failed or does not fit."""
    named = [one for one in registry.experiments().values() if options.name in one.name]
    chosen = [one.build(options.scale) for one in named if options.scale in one.scales]
    require(bool(chosen), f"nothing of scale {options.scale} is named like {options.name!r}")

    def plan_one(config: AnyConfig, topology: str) -> dict[str, Any]:
        for file in dump.iterdir():
            file.unlink()
        jax.clear_caches()
        resolved, parents = resolve_parents(config, {}, paths.runs)
        return plan(resolved, _step(resolved, parents, paths, options.vocabulary), topology, dump)

    file, groups, made = paths.runs / "plans" / f"{options.scale}.json", programs(chosen), []
    slices = options.topology.split(",") if options.topology else SLICES
    for number, group in enumerate(groups, 1):
        say(f"program {number} of {len(groups)}: {group[0].name}, the first of {len(group)} experiments")
        made.append(_on_first(group[0], slices, plan_one) | {"stands_for": [config.name for config in group]})
        write_json(file, made)
    print_survey(made)
    say(f"plans: {file}")
    return 0 if all(found["fits"] for found in made) else 1


def _on_first(config: AnyConfig, slices: Sequence[str], plan_one: Callable[[AnyConfig, str], dict[str, Any]]) -> dict[str, Any]:
    """The plan on the first slice that holds the step; if none does, the result on the last slice."""
    for topology in slices:
        try:
            found = plan_one(config, topology)
        except Exception as error:  # the summary and the exit code show it; the other programs continue
            reason = f"{type(error).__name__}: {first_line(error)}"
            found = {"name": config.name, "topology": topology, "fits": False, "reason": reason}
        if found["fits"]:
            times = f"a step of {1e3 * found['bound']['step']:.1f} ms or more, compiled in {found['compile_seconds']:.0f} s"
            say(f"  {topology}: {times}")
            break
        say(f"  {topology}: {found['reason']}")
    return found


def programs(configs: Iterable[AnyConfig]) -> list[list[AnyConfig]]:
    """The configs that train, grouped by program; the first of each group has the largest program."""
    groups: dict[Hashable, list[tuple[int, AnyConfig]]] = {}
    for config in configs:
        key, size = image_key(config) if isinstance(config, ImageConfig) else (_text_key(config), 0)
        if key is not None:
            runtime, training = config.runtime, config.training
            how = (runtime.mesh, runtime.remat, runtime.unroll, runtime.implementation, config.optimizer.name)
            groups.setdefault((key, *how, training.accumulation_steps, training.objective), []).append((size, config))
    return [[config for _, config in sorted(group, key=lambda pair: -pair[0])] for group in groups.values()]


def _text_key(config: Config) -> Hashable:
    """What a train step's program depends on besides runtime and training: model, batch sizes, meta-tokens; not data, seed and rates."""
    batch = (config.row_positions, config.data.batch_size, config.row_meta_tokens)
    return config.model, config.meta_tokens, batch, config.data.tokenizer


def _step(config: AnyConfig, parents: Sequence[AnyConfig], paths: Paths, vocabulary: int | None) -> Any:
    """The function that lowers the train step of a config for some devices."""
    if isinstance(config, ImageConfig):
        return functools.partial(image_step, shapes=shapes_of(config, parents, paths))
    tokenizer = config.data.tokenizer
    known = vocabulary_of(tokenizer)
    if known is None and tokenizer in registry.vocabularies:
        known = Vocabulary.above(registry.vocabularies[tokenizer])
    size = vocabulary or (known.size if known is not None else None)
    remedy = "give the size of its vocabulary with --vocabulary N"
    require(size is not None, f"the tokenizer {tokenizer} is a file of yours; {remedy}")
    return functools.partial(text_step, vocab_size=size)
