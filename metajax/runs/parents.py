"""Runs that start from other runs: `init.from` may name an experiment, which stands for its run at the same scale and seed.

The name is replaced by that run's path (NAME/SCALE/HASH8-sSEED below the root of the runs), so that a run's own hash changes with
whatever its parent is. Nothing here needs the parent to exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metajax import registry
from metajax.config import Config
from metajax.core.errors import nearest, require
from metajax.core.fields import flatten, override
from metajax.config import AnyConfig
from metajax.config import ImageConfig, OF_TEXT
from metajax.core.progress import say
from metajax.runs.directory import default_workdir, find_run, list_runs, read_config


def parse_changes(pairs: Sequence[str], runs: Path) -> dict[str, str]:
    """{field: text} of --set; a parent named in init.from becomes the run it stands for, said aloud."""
    changes: dict[str, str] = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        require(bool(field and equals), f"--set {pair}: expected FIELD=VALUE, such as --set model.layers=8")
        if changes.get(field, value) != value:
            say(f"--set {field} is there twice; the last one, {value}, holds")
        changes[field] = value
    for field, instead in (("seed", "--seed N"), ("scale", "--scale SCALE"), ("name", "another entry in experiments/")):
        require(field not in changes, f"--set {field}=...: use {instead}")
    if changes.get("init.from"):
        changes["init.from"] = find_parent(changes["init.from"], runs)
    return changes


def absent_fields(config: AnyConfig, changes: Mapping[str, Any]) -> list[str]:
    """The changed fields that this config does without: those of sub-configs that it has not, and of images those that nothing reads."""
    unread = config.unread().keys() - OF_TEXT if isinstance(config, ImageConfig) else ()
    return sorted(f for f in changes if f in unread or ("." in f and getattr(config, f.partition(".")[0], config) is None))


def apply_changes(config: AnyConfig, changes: Mapping[str, Any]) -> AnyConfig:
    """The config with changes meant for several; those that this one does without pass it by."""
    absent = absent_fields(config, changes)
    return override(config, {field: value for field, value in changes.items() if field not in absent})


def inherited(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes of a command that hold for parents too: all but `evaluation`, which leaves parameters as they are, `init` and `dpo`."""
    return {field: value for field, value in changes.items() if field.partition(".")[0] not in ("evaluation", "init", "dpo")}


def find_parent(text: str, runs: Path) -> str:
    """The run that `text` means, relative to `runs`, said aloud, with the parts that it names. A name means its newest run that has no
    parent of its own, so that the same command twice names the same parent."""
    word, *parts = text.split("?", 1)
    fresh = [run for run in list_runs(runs) if read_config(run).name == word and not read_config(run).init.from_]
    found = fresh[-1] if fresh else find_run(word, runs)
    say(f"starting from the parameters of {found}")
    return "?".join([str(found.relative_to(runs) if found.is_relative_to(runs) else found.absolute()), *parts])


def resolve_parents(config: AnyConfig, changes: Mapping[str, Any], root: Path) -> tuple[AnyConfig, tuple[AnyConfig, ...]]:
    """The config with the run that its `init.from` stands for, and the configs of the runs it needs, the oldest first.

    Args:
      changes: those of the command (`--set`), already in `config`; its parents get them as well (see `inherited`).
      root: where runs are; `init.from` may also be a run there, or the folder of one.

    Raises:
      UserError: no such experiment or run, experiments that start from each other, or a field that a run on images would ignore.
    """
    if isinstance(config, ImageConfig):
        config = _for_parent_alone(config, inherited(changes))
    return _resolve(config, inherited(changes), root, (config.name,))


def _with_imported(config: AnyConfig, parent: AnyConfig, folder: Path) -> AnyConfig:
    """The config with what its parent keeps of an imported checkpoint, and the ids that it asks for besides; `folder` has its tokenizer."""
    found, parts = getattr(parent, "imported", None), config.init.parts
    if found is None or not isinstance(config, Config) or (parts and not parts.keys() & {"embedding", "unembedding"}):
        return config
    from metajax.data.metadata import special_targets  # slow to import, and few commands need it
    from metajax.data.tokenizers import load as load_tokenizer

    asked = special_targets(config, load_tokenizer(folder).vocabulary)
    added = {*found.added, *(i for i in asked if i >= found.rows)}
    return replace(config, imported=replace(found, added=tuple(sorted(added)), opens=True))  # its documents begin with BOS


def _for_parent_alone(config: ImageConfig, changes: Mapping[str, Any]) -> ImageConfig:
    """The config without those changes that the experiment it starts from reads, and it does not."""
    known = registry.experiments().get(config.init.from_)
    parent = known.build(config.scale) if known is not None else None
    read = flatten(parent).keys() - parent.unread() if isinstance(parent, ImageConfig) else ()
    kept = config.without_ignored([field for field in changes if field in read])
    for field in (field for field in changes if kept != config and field in config.unread()):
        say(f"{config.name} does without {field}: --set is for {config.init.from_}, which comes first")
    return kept


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
    circle = " -> ".join((*chain, word))
    require(word not in chain, f"init.from goes round in a circle: {circle}; one of them has to start afresh (init.from empty)")
    parent = replace(apply_changes(registry.find_experiment(word).build(config.scale), changes), seed=config.seed)
    parent, older = _resolve(parent, changes, root, (*chain, word))
    child = override(config, {"init.from": "?".join([default_workdir(parent, Path()).as_posix(), *parts])})
    if getattr(parent, "imported", None) is not None:
        child = _with_imported(child, parent, find_run((*older, parent)[0].init.run, root))
    return child, (*older, parent)
