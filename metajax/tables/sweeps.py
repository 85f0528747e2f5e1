"""Sweeps: a row for each combination of field values, in a file of experiments or in a table made from the command line."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from metajax.config import AnyConfig, config_hash
from metajax.core.errors import require
from metajax.registry import Column, Experiment, Row, Table
from metajax.runs.parents import apply_changes
from metajax.vision.config import ImageConfig

MOST_ROWS = 10_000


def swept(*axes: Mapping[str, Sequence[Any]]) -> list[Row]:
    """A row for each combination of the axes' values; the fields of one axis change together.

    swept({"model.layers": (2, 4), "model.width": (64, 128)}, {"optimizer.learning_rate": (1e-3, 2e-3)}) makes four rows.
    The first is layers_2_width_64_learning_rate_0.001.
    """
    for axis in axes:
        require(len(set(map(len, axis.values()))) == 1, f"a sweep in step: {' and '.join(axis)} have different numbers of values")
    count = math.prod(len(next(iter(axis.values()))) for axis in axes)
    require(count <= MOST_ROWS, f"a sweep of {count:,} rows: at most {MOST_ROWS:,}")
    steps = [[dict(zip(axis, values, strict=True)) for values in zip(*axis.values(), strict=True)] for axis in axes]
    made = [{field: value for step in chosen for field, value in step.items()} for chosen in itertools.product(*steps)]
    names = ["_".join(f"{field.rpartition('.')[2]}_{value}" for field, value in changes.items()) for changes in made]
    return [Row(re.sub(r"[^\w.+-]+", "-", name), changes) for name, changes in zip(names, made, strict=True)]


def sweep_table(experiment: Experiment, words: Sequence[str], scale: str, changes: Mapping[str, Any]) -> Table:
    """The table of an experiment swept over fields; its runs are the same as the experiment's runs with `--set`.

    Args:
      words: each is FIELD=VALUE,VALUE,...; several words make a product. Fields in one word, with spaces, change together.
      changes: the command's changes of every row. A row that differs by nothing else is the baseline.

    Raises:
      UserError: a word of another form, or a field that is set or swept twice.
    """
    pairs = [[_axis(one) for one in re.split(r"\s+(?=[\w.]+=)", word)] for word in words]  # a value may have spaces
    pairs = [[(f, list(dict.fromkeys(v))) for f, v in word] if len(word) == 1 else word for word in pairs]
    axes, fields = [dict(of_word) for of_word in pairs], [field for of_word in pairs for field, _ in of_word]
    require(len(set(fields)) == len(fields), "--sweep: a field is swept twice; give all of its values at once")
    for field in fields:
        require(field not in changes, f"--sweep {field}: it is set with --set too; leave one of them out")
    fill = {**experiment.table.fill, **experiment.row.fill} if experiment.table else {}
    rows = [
        Row(" ".join(f"{k}={v}" for k, v in row.changes.items()), row.changes, of=experiment.name, fill=fill)
        for row in swept(*axes)
    ]
    own = apply_changes(experiment.build(scale), changes)
    grid = " and ".join(f"{field} = {', '.join(values)}" for axis in axes for field, values in axis.items())
    table = Table(
        name=f"{experiment.name}/sweep-{hashlib.sha256(json.dumps(axes).encode()).hexdigest()[:8]}",
        summary=f"{experiment.name} with {grid}",
        paper=experiment.paper,
        base=experiment.build,
        rows=tuple(rows),
        columns=experiment.table.columns if experiment.table else _columns(own),
        baseline=None,
        minutes=experiment.minutes,
    )
    baseline = [row.name for row in rows if config_hash(apply_changes(table.config(row, scale), changes)) == config_hash(own)]
    return replace(table, baseline=baseline[0]) if baseline else table


def _axis(word: str) -> tuple[str, list[str]]:
    field, equals, values = word.partition("=")
    found = [value for value in values.split(",") if value]
    require(bool(equals and field and found), f"--sweep {word}: expected FIELD=VALUE,VALUE, such as --sweep model.layers=2,4,8")
    own = ("seed", "scale", "name", "init.from")
    require(field not in own, f"--sweep {field}: not a field to sweep; see --seeds and --scale")
    return field, found


def _columns(config: AnyConfig) -> tuple[Column, ...]:
    """Columns of an experiment without a table: exact match by task and length, bits per byte by condition, image accuracy."""
    if isinstance(config, ImageConfig):
        return tuple(Column(f"{name}, %", f"eval.{name}.accuracy", 1, "higher", 100) for name in config.tested)
    tasks = config.tasks
    scored = [(task, length) for task in tasks.names for length in tasks.eval_lengths] if tasks else []
    shares = [Column(f"{task}, {n} tokens, %", f"eval.tasks.{task}.{n}.exact", 1, "higher", 100) for task, n in scored]
    conditions = config.evaluation.conditions if config.evaluation.documents else ()
    return (*shares, *(Column(f"bits/byte, {c} metadata", f"eval.{c}.bpb") for c in conditions))
