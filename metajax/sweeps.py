"""Sweeps: a table made on the fly, with a row for each combination of some fields' values."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from metajax.config import config_hash, require
from metajax.families import AnyConfig
from metajax.image_config import ImageConfig
from metajax.lineage import apply_changes
from metajax.registry import Column, Experiment, Row, Table


def sweep_table(experiment: Experiment, words: Sequence[str], scale: str, changes: Mapping[str, Any]) -> Table:
    """The table of an experiment swept over fields; its runs are the experiment's own, as `--set` would make them.

    Args:
      words: FIELD=VALUE,VALUE,... each; several make a product.
      changes: those of the command for every row. The row that they alone would make, where there is one, is the baseline.

    Raises:
      UserError: a word of another form, or a field that is set or swept twice.
    """
    axes = dict(_axis(word) for word in words)
    require(len(axes) == len(words), "--sweep: a field is swept twice; give all of its values at once")
    for field in axes:
        require(field not in changes, f"--sweep {field}: it is set with --set too; leave one of them out")
    fill = {**experiment.table.fill, **experiment.row.fill} if experiment.table else {}
    rows = [
        Row(" ".join(f"{field}={value}" for field, value in zip(axes, values, strict=True)), dict(zip(axes, values, strict=True)),
            of=experiment.name, fill=fill)
        for values in itertools.product(*axes.values())
    ]  # fmt: skip
    own = apply_changes(experiment.build(scale), changes)
    said = " and ".join(f"{field} = {', '.join(values)}" for field, values in axes.items())
    table = Table(
        name=f"{experiment.name}/sweep-{hashlib.sha256(json.dumps(axes).encode()).hexdigest()[:8]}",
        summary=f"{experiment.name} with {said}",
        paper=experiment.paper,
        base=experiment.build,
        rows=tuple(rows),
        columns=experiment.table.columns if experiment.table else _columns(own),
        baseline=None,
        minutes=experiment.minutes,
        scales=experiment.scales,
    )
    baseline = [row.name for row in rows if config_hash(apply_changes(table.config(row, scale), changes)) == config_hash(own)]
    return replace(table, baseline=baseline[0]) if baseline else table


def _axis(word: str) -> tuple[str, list[str]]:
    field, equals, values = word.partition("=")
    found = [value for value in values.split(",") if value]
    require(bool(equals and field and found), f"--sweep {word}: expected FIELD=VALUE,VALUE, such as --sweep model.layers=2,4,8")
    require(
        field not in ("seed", "scale", "name", "init.from"), f"--sweep {field}: not a field to sweep; see --seeds and --scale"
    )
    return field, list(dict.fromkeys(found))


def _columns(config: AnyConfig) -> tuple[Column, ...]:
    """For an experiment without a table: exact match by task and length, bits per byte under each condition; accuracy on images."""
    if isinstance(config, ImageConfig):
        named = (
            ("base", "new")
            if config.prompts and config.images.classes == "base"
            else ("all",)
            if config.prompts
            else config.images.sources
        )
        return tuple(Column(f"{name}, %", f"eval.{name}.accuracy", 1, "higher", 100) for name in named)
    tasks = config.tasks
    scored = [(task, length) for task in tasks.names for length in tasks.eval_lengths] if tasks else []
    conditions = config.evaluation.conditions if config.evaluation.documents else ()
    return (
        *(
            Column(f"{task}, {length} tokens, %", f"eval.tasks.{task}.{length}.exact", 1, "higher", 100)
            for task, length in scored
        ),
        *(Column(f"bits/byte, {c} metadata", f"eval.{c}.bpb") for c in conditions),
    )
