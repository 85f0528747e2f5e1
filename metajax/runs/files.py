"""Writing and reading the files of a run's folder.

A JSON file is an object that ends with `sha256`, a digest of the preceding entries and of the run's id in config.json. The digest
reveals a file that was changed later or belongs to another run. Files of earlier versions have no digest, so only types are
checked. metrics.jsonl is compared with its `Mark`, which checkpoints and the report store.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from metajax.core.atomic import strict, write_text
from metajax.core.errors import UserError, first_line, require
from metajax.core.progress import warn

CONFIG, DIGEST = "config.json", "sha256"
NULL, NUMBER = type(None), (int, float)
AGAIN = "give the command of the run again, and it is made again from the checkpoints"
REMEDIES = {
    CONFIG: "restore it from a copy, or choose another --workdir",
    "report.json": AGAIN,
    "environment.json": "delete it; only the description of the machine is lost",
    "data.json": "delete it; the checkpoints hold the same facts",
    "metrics.jsonl": "delete it; only the curves are lost",
    "imported.json": "import the model again",
    "words.json": "delete report.json, give the command of the run again, and both are made again",
    "table.json": "it is made again; seeds of earlier commands are shown when they are asked for",
}
LISTS = {"words.json": "words", "warnings.json": "warnings", "time.json": "starts"}  # may be lists, as in earlier versions
BIN = {"exact": (*NUMBER, NULL), "*": object}
EVAL = {
    "?choice": {"average": NUMBER, "*": object},
    "?tasks": {"*": {"*": (BIN, *NUMBER)}},
    "*": ({"?bpb": NUMBER, "?accuracy": NUMBER, "*": object}, NULL, *NUMBER),
}
# Seconds of one start, which began at a step.
SPENT = ("from", "steps", "lost", "startup", "compile", "data_wait", "checkpoint", "evaluation")
# Shape of a file: a type, one of several shapes, an object's keys (`?`: optional, `*`: all others), or [shape of each item].
SHAPES: dict[str, Any] = {
    CONFIG: {"?config": dict, "?id": str, "?hash": str},
    "environment.json": {
        **dict.fromkeys(("python", "platform", "started"), str),
        "libraries": {"*": (str, NULL)},
        "git": {"commit": (str, NULL), "dirty": (bool, NULL)},
        "command": [str],
        "devices": {"kind": str, "count": int, "hosts": int},
        "cpu_count": (int, NULL),
    },
    "data.json": {"key": str, "tokenizer": str},
    "warnings.json": {"warnings": [str]},
    "time.json": {"starts": [{"saves": [[NUMBER]], **dict.fromkeys(SPENT, NUMBER), "*": NUMBER}]},
    "report.json": {
        "eval": EVAL,
        "parameters": {"total": NUMBER, "*": NUMBER},
        "counts": {"*": NUMBER},
        **{"?flops_per_token": {"*": NUMBER}, "?warnings": [str], "?analyses": dict, "?config": dict, "?corpora": [dict]},
        "?metrics": {"lines": int, "bytes": int, DIGEST: str},
    },
    "table.json": {"seeds": [int]},
    "imported.json": {"family": str, "config": dict},
    "hashes": {"hosts": int, "files": {"*": str}},  # any file of that folder without a shape of its own
    "analysis": {"name": str, "result": dict, "?made_on": {"task": str, "length": int, "prompts": int}},
    "delta_tokens.json": dict,
    "words.json": {"words": [str]},
    "wandb.json": {"id": str, "folder": str},
}
# Shape of one line of metrics.jsonl.
METRICS: dict[str, Any] = {"step": int, "*": (str, bool, NULL, *NUMBER)}
METRICS |= dict.fromkeys(("?loss", "?bpb", "?body_nll", "?validation_bpb"), NUMBER)
Mark = Mapping[str, Any]  # {lines, bytes, sha256} of metrics.jsonl at some step


class Damaged(UserError):
    """A file of a run differs from what the run wrote. `fault` names the file and the reason; the message adds the remedy."""

    def __init__(self, path: Path, why: str):
        super().__init__(path, why)
        self.fault = f"{path} is damaged ({why})"

    def __str__(self) -> str:
        return f"{self.fault}; {REMEDIES.get(self.args[0].name, 'delete it, or restore it from a copy')}"


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; an object gets its digest."""
    value = strict(value)  # as it will be read back, with keys as text
    if isinstance(value, dict):
        value.pop(DIGEST, None)
        digest = _digest(path, value)
        value |= {DIGEST: digest} if digest else {}
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Like `find_json`, but raises UserError for a missing file."""
    value = find_json(path)
    require(value is not None, f"{path} is missing; {REMEDIES.get(path.name, 'restore it from a copy')}")
    return value


def find_json(path: Path) -> dict[str, Any] | None:
    """A JSON file of a run, without its digest; None if it is missing.

    Raises Damaged if it is not what the run wrote, and UserError if there is no permission to read it.
    """
    data = _read(path)
    if data is None:
        return None
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"no JSON: {first_line(error)}" if data else "empty") from None
    if isinstance(value, list) and path.name in LISTS:
        value = {LISTS[path.name]: value}
    wrong = _misfit(value, dict) or _misfit(value, SHAPES.get(path.name, SHAPES.get(path.parent.name, dict)))
    if wrong:
        raise Damaged(path, wrong)
    written = value.pop(DIGEST, None)
    if written is not None and written != _digest(path, value):
        raise Damaged(path, "changed since it was written, or of another run")
    return value


def find_readable(path: Path) -> dict[str, Any] | None:
    """Like `find_json`, for a page: also None, with a warning, for a damaged file."""
    try:
        return find_json(path)
    except UserError as error:
        _warn_once(f"left out: {error}")
        return None


_warn_once = functools.cache(warn)  # a table reads its runs again after each run


def recall(path: Path, on_warning: Callable[[str], None], lost: str) -> dict[str, Any] | None:
    """Like `find_json`, for a run that resumes: a damaged file is set aside and gives None; the warning names what is `lost`."""
    try:
        return find_json(path)
    except Damaged as error:
        set_aside(path)
        on_warning(f"{error.fault}; it is kept in {path.parent / 'damaged'}, and {lost}")
        return None


def set_aside(path: Path) -> None:
    """Move a damaged file (or a folder of that name) into DIR/damaged."""
    target = path.parent / "damaged" / f"{path.name}-{time.time_ns()}"
    target.parent.mkdir(exist_ok=True)
    os.replace(path, target)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        raise Damaged(path, "a folder in its place") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); restore the access to it") from None


def _digest(path: Path, value: Mapping[str, Any]) -> str | None:
    """Digest of a file's content and of the id of the run that contains it; None outside of runs. The hashes of a checkpoint
    leave the id out: they may move with the checkpoint, which stores the identity of its run."""
    run = ""
    if path.name != CONFIG and path.parent.name != "hashes":
        holder = next((folder for folder in (path.parent, path.parent.parent) if (folder / CONFIG).exists()), None)
        if holder is None:
            return None
        run = read_json(holder / CONFIG).get("id", "")
    return hashlib.sha256(json.dumps([run, value], sort_keys=True).encode()).hexdigest()


def _misfit(value: Any, shape: Any, at: str = "") -> str:
    """Where a value does not match a shape of SHAPES; "" if it matches."""
    where, prefix = at or "it", f"{at}." if at else ""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where} is no object"
        for key in shape:
            if not key.startswith(("?", "*")) and key not in value:
                return f"{prefix}{key} is missing"
        rules = {key: shape.get(key, shape.get(f"?{key}", shape.get("*", object))) for key in value if at or key != DIGEST}
        items = [(value[key], rule, prefix + key) for key, rule in rules.items()]
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        items = [(item, shape[0], f"{at}[{n}]") for n, item in enumerate(value)]
    else:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        if any(_is_a(value, kind, at) for kind in kinds):
            return ""
        return f"{where} is {'no object' if shape is dict else f'a wrong value: {value!r:.40}'}"
    return next(filter(None, (_misfit(*item) for item in items)), "")


def _is_a(value: Any, kind: Any, at: str) -> bool:
    if isinstance(kind, dict):
        return not _misfit(value, kind, at)
    return isinstance(value, kind) and (kind in (bool, object) or not isinstance(value, bool))


def mark_of(data: bytes) -> Mark:
    """The mark of the content of a metrics file."""
    return {"lines": data.count(b"\n"), "bytes": len(data), DIGEST: hashlib.sha256(data).hexdigest()}


def read_lines(path: Path, mark: Mark | None = None) -> list[dict[str, Any]]:
    """Records of a metrics file, none if it is missing; a last line cut off by a kill is left out.

    Raises Damaged if a line is not a record, or the content differs from `mark`.
    """
    data = _read(path) or b""
    if mark is not None and mark_of(data[: mark["bytes"]]) != mark:
        raise Damaged(path, "changed since it was written" if data else "missing")
    records, unread = parse_lines(data)
    if unread:
        raise Damaged(path, f"line {unread[0]} is no record of a step")
    return records


def parse_lines(data: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """(records, numbers of the lines that are not records) of the content of a metrics file, up to its last line end."""
    records, unread = [], []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            record = None
        if _misfit(record, METRICS):
            unread.append(number)
        else:
            records.append(record)
    return records, unread
