"""Typed access to frozen dataclasses: conversion from text and JSON, dotted overrides, errors that name the remedy."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal


class UserError(Exception):
    """A mistake the user can mend: one plain line that names the remedy. The command line exits with 2."""


class Stopped(BaseException):
    """A run ended early for a reason outside of it, such as a preemption; the same command goes on.

    No `Exception`, for it is no failure of the run: a table that records failures ends with it.
    """

    EXIT_CODE = 75  # of the command, as sysexits.h has it: a temporary failure, try again


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


def nearest(word: str, choices: Iterable[str]) -> str:
    """A '; did you mean X?' clause for an unknown word, or '' when nothing is close or the word is known."""
    choices = list(choices)
    match = [] if word in choices else difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _optional(hint: Any) -> tuple[Any, bool]:
    """(T, True) for `T | None`, else (hint, False)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return inner[0], len(inner) < len(typing.get_args(hint))
    return hint, False


def _describe(hint: Any) -> str:
    inner, optional = _optional(hint)
    if typing.get_origin(inner) is Literal:
        text = "one of " + ", ".join(map(str, typing.get_args(inner)))
    elif typing.get_origin(inner) is tuple:
        text = "a comma-separated list"
    else:
        text = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}.get(
            inner.__name__, inner.__name__
        )
    return text + (" or none" if optional else "")


def _convert(value: Any, hint: Any, path: str) -> Any:
    """A value from JSON, from the command line or from Python, as the field's type; UserError when it is not one."""
    inner, optional = _optional(hint)
    if optional and (value is None or value == "none"):
        return None
    if dataclasses.is_dataclass(inner):
        if isinstance(value, inner):
            return value
        value = _loads(value, path) if isinstance(value, str) else value
        require(isinstance(value, Mapping), f"{path} = {value!r}: expected {_describe(hint)} as a mapping of its fields")
        return from_dict(inner, value, path)
    if typing.get_origin(inner) is tuple:
        items = [item for item in value.split(",") if item] if isinstance(value, str) else list(value)
        args = typing.get_args(inner)
        require(
            args[-1] is Ellipsis or len(items) == len(args), f"{path} = {value!r}: expected {len(args)} comma-separated values"
        )
        hints = [args[0]] * len(items) if args[-1] is Ellipsis else args
        return tuple(_convert(item, h, path) for item, h in zip(items, hints, strict=True))
    return _convert_scalar(value, inner, hint, path)


def _loads(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} = {text!r}: expected JSON such as '{{\"field\": value}}' ({error.msg})") from None


def _convert_scalar(value: Any, inner: Any, hint: Any, path: str) -> Any:
    wrong = f"{path} = {value!r}: expected {_describe(hint)}"
    if typing.get_origin(inner) is Literal:
        choices = typing.get_args(inner)
        require(value in choices, wrong + nearest(str(value), map(str, choices)))
        return value
    if inner is bool:
        if isinstance(value, bool):
            return value
        require(isinstance(value, str) and value.lower() in ("true", "false"), wrong)
        return value.lower() == "true"
    if inner is str:
        require(isinstance(value, str), wrong)
        return value
    require(isinstance(value, (str, int, float)) and not isinstance(value, bool), wrong)
    try:
        number = float(value)
    except ValueError:
        raise UserError(wrong) from None
    require(number == number, wrong)
    if inner is int:
        require(number.is_integer(), wrong)
        return int(value) if isinstance(value, (int, str)) and str(value).lstrip("+-").isdigit() else int(number)
    return number


def from_dict(cls: type, values: Mapping[str, Any], path: str = "") -> Any:
    """Build dataclass `cls` from a nested mapping; unknown keys and wrong types raise UserError with the dotted path."""
    hints = _field_types(cls)
    prefix = f"{path}." if path else ""
    for key in values:
        require(key in hints, f"unknown field {prefix}{key}{nearest(key, hints)}")
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and _required(f)]
    require(not missing, f"{path or cls.__name__} needs {', '.join(missing)}")
    return cls(**{key: _convert(value, hints[key], prefix + key) for key, value in values.items()})


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def to_dict(config: Any) -> dict[str, Any]:
    """The nested, JSON-ready form of a config; `from_dict(Config, to_dict(c)) == c`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def override(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy with dotted fields replaced: {"model.layers": "8", "meta_tokens": MetaTokens()}.

    All changes of one sub-config are applied at once, so that two fields which must agree can change together.
    """
    return _override(config, changes, "")


def _override(config: Any, changes: Mapping[str, Any], path: str) -> Any:
    hints = _field_types(type(config))
    whole: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in changes.items():
        head, _, rest = dotted.partition(".")
        name = head if head in hints else f"{head}_"  # `from` is a keyword in Python, `from_` the field
        require(name in hints, f"unknown field {path}{head}{nearest(head, hints)}")
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            whole[name] = _convert(value, hints[name], path + head)
    for name, inner in nested.items():
        part, hint = whole.get(name, getattr(config, name)), _optional(hints[name])[0]
        require(
            dataclasses.is_dataclass(hint), f"{path}{name} has no fields of its own, but {path}{name}.{next(iter(inner))} was set"
        )
        if part is None:
            whole[name] = _convert({k: v for k, v in inner.items()}, hints[name], path + name)
        else:
            whole[name] = _override(part, inner, f"{path}{name}.")
    return dataclasses.replace(config, **whole)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every reachable field by dotted path; sub-configs that are null count as one, those that nobody sets as none."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{f.name}."))
        elif value is not None or not f.metadata.get("filled_in"):
            flat[prefix + f.name] = value
    return flat
