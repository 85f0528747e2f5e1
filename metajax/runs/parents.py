"""Runs that start from other runs. If `init.from` names an experiment, that means its run at the same scale and seed.

The name is replaced by that run's path (NAME/SCALE/HASH8-sSEED below the root of the runs), so that a run's hash depends on
its parent. The parent need not exist yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metajax import registry
from metajax.config import AnyConfig, Config
from metajax.core.errors import nearest, require
from metajax.core.fields import defaults, flatten, ignored, override, require_all_read
from metajax.core.progress import say
from metajax.data.positions import spots
from metajax.data.tasks import check_tasks
from metajax.runs.directory import default_workdir, find_run, list_runs, read_config


def parse_changes(pairs: Sequence[str], runs: Path) -> dict[str, str]:
    """{field: text} of --set; a parent named in init.from is replaced by its run, with a message."""
    changes: dict[str, str] = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        require(bool(field and equals), f"--set {pair}: expected FIELD=VALUE, such as --set model.layers=8")
        if changes.get(field, value) != value:
            say(f"--set {field} is given twice; the last one, {value}, is used")
        changes[field] = value
    for field, instead in (("seed", "--seed N"), ("scale", "--scale SCALE"), ("name", "another entry in experiments/")):
        require(field not in changes, f"--set {field}=...: use {instead}")
    if changes.get("init.from"):
        changes["init.from"] = find_parent(changes["init.from"], runs)
    return changes


def absent_fields(config: AnyConfig, changes: Mapping[str, Any]) -> list[str]:
    """Changed fields without effect in this config: those of sub-configs that it lacks, and those that nothing would read."""
    missing = {f for f in changes if "." in f and getattr(config, f.partition(".")[0], config) is None}
    changed = override(config, {f: value for f, value in changes.items() if f not in missing})
    return sorted(f for f in changes if f in missing | (changed.unread().keys() - config.unavailable))


def apply_changes(config: AnyConfig, changes: Mapping[str, Any]) -> AnyConfig:
    """Apply changes that several configs share, except those in `absent_fields`."""
    absent = absent_fields(config, changes)
    return override(config, {field: value for field, value in changes.items() if field not in absent})


def inherited(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of a command that also apply to parents: all but `evaluation` (no effect on parameters), `init` and `dpo`."""
    return {field: value for field, value in changes.items() if field.partition(".")[0] not in ("evaluation", "init", "dpo")}


def find_parent(text: str, runs: Path) -> str:
    """Find and print the run that `text` names, relative to `runs`, with its parts. The name of an experiment means its newest
    run without a parent, so that the same command given twice finds the same parent."""
    word, *parts = text.split("?", 1)
    fresh = [run for run in list_runs(runs) if read_config(run).name == word and not read_config(run).init.from_]
    found = fresh[-1] if fresh else find_run(word, runs)
    say(f"starting from the parameters of {found}")
    return "?".join([str(found.relative_to(runs) if found.is_relative_to(runs) else found.absolute()), *parts])


def resolve_parents(config: AnyConfig, changes: Mapping[str, Any], root: Path) -> tuple[AnyConfig, tuple[AnyConfig, ...]]:
    """The config with `init.from` replaced by a run below `root`, and the configs of the runs it needs, oldest first.

    `changes` are those of the command (`--set`), already in `config`; parents get them too (see `inherited`). Raises UserError if
    there is no such experiment or run, experiments start from each other, or the run would ignore a field.
    """
    config = _without_those_of_its_parent(config, inherited(changes))
    require_all_read(config)
    if isinstance(config, Config):
        check_tasks(config.tasks)
        if config.metadata is not None:
            spots(config.metadata)
        if changes.keys() & {"model.position", "model.hybrid.ssm"}:
            from metajax.models.specs import layer_specs  # imports JAX, which showing a table does not need

            layer_specs(config.model, config.meta_tokens)
    return _resolve(config, inherited(changes), root, (config.name,))


def _with_imported(config: AnyConfig, parent: AnyConfig, folder: Path) -> AnyConfig:
    """The config with its parent's facts about an imported checkpoint, and the ids it adds; `folder` has the tokenizer."""
    found, parts = getattr(parent, "imported", None), config.init.parts
    if found is None or not isinstance(config, Config) or (parts and not parts.keys() & {"embedding", "unembedding"}):
        return config
    from metajax.data.metadata import special_targets  # slow to import, and few commands need it
    from metajax.data.tokenizers import load as load_tokenizer

    asked = special_targets(config, load_tokenizer(folder).vocabulary)
    added = {*found.added, *(i for i in asked if i >= found.rows)}
    return replace(config, imported=replace(found, added=tuple(sorted(added)), opens=True))  # documents begin with BOS


def _without_those_of_its_parent(config: AnyConfig, changes: Mapping[str, Any]) -> AnyConfig:
    """The config with the default for each change that the experiment it starts from reads, and it does not."""
    known = registry.experiments().get(config.init.run)
    parent = known.build(config.scale) if known is not None else None
    read = flatten(parent).keys() - parent.unread().keys() if parent is not None else ()
    ours = [field for field in ignored(config) if field in changes and field in read]
    for field in ours:
        say(f"{config.name} does not read {field}: --set is for {config.init.run}, which runs first")
    return override(config, {field: defaults(type(config))[field] for field in ours})


def _resolve(
    config: AnyConfig, changes: Mapping[str, Any], root: Path, chain: tuple[str, ...]
) -> tuple[AnyConfig, tuple[AnyConfig, ...]]:
    require(getattr(config, "imported", None) is None, "imported: init.from fills it in from an imported run; leave it out")
    word, *parts = config.init.from_.split("?", 1)
    known = registry.experiments()
    if not word:
        return config, ()
    if word not in known and word not in registry.tables():
        is_run = any((folder / "config.json").exists() for folder in (root / word, Path(word)))
        require(is_run, f"{config.name}: init.from = {word!r} is neither an experiment nor a run{nearest(word, known)}")
        folder = find_run(word, root)
        return _with_imported(config, read_config(folder), folder), ()
    remedy = "one of them has to start afresh, with an empty init.from"
    require(word not in chain, f"init.from is circular: {' -> '.join((*chain, word))}; {remedy}")
    parent = replace(apply_changes(registry.find_experiment(word).build(config.scale), changes), seed=config.seed)
    parent, older = _resolve(parent, changes, root, (*chain, word))
    child = override(config, {"init.from": "?".join([default_workdir(parent, Path()).as_posix(), *parts])})
    if getattr(parent, "imported", None) is not None:
        child = _with_imported(child, parent, find_run((*older, parent)[0].init.run, root))
    return child, (*older, parent)
