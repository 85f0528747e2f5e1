"""Typed fields of frozen dataclasses: conversion from text and JSON, ranges, dotted overrides, errors that name the remedy."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from metajax.core.errors import UserError, nearest, require


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers a field or an argument accepts, as in `Annotated[int, Range(1, 8)]`. `least` and `most` are inclusive bounds,
    `above` and `below` exclusive ones. Infinity and NaN are in no range."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        number = lambda bound: f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"  # noqa: E731
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"from {number(self.least)} to {number(self.most)}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {number(bound)}" for word, bound in bounds.items() if math.isfinite(bound))


class OnlyWith:
    """The condition under which a field is read, as in `Annotated[Share, OnlyWith("schedule", "wsd")]`.

    `field` of the same dataclass must be one of `values`, or truthy if there are no values. `why` replaces the default reason.
    """

    def __init__(self, field: str, *values: Any, why: str = ""):
        self.field, self.values, self.why = field, values, why

    def reason(self, part: Any, prefix: str) -> str:
        """The reason why nothing reads the field in this part of a config; "" if something reads it."""
        value = getattr(part, self.field)
        if value in self.values if self.values else value:
            return ""
        needed = f"is {' or '.join(map(str, self.values))}" if self.values else "is set"
        return self.why or f"it is read only where {prefix}{self.field} {needed}"


class Except(OnlyWith):
    """The opposite condition: the field is read unless `field` is one of `values`."""

    def reason(self, part: Any, prefix: str) -> str:
        value = getattr(part, self.field)
        return f"it is not read where {prefix}{self.field} is {value}" if value in self.values else ""


# Counts and positions fit 32 bits, and real numbers fit float32.
Count = Annotated[int, Range(1, 10**9)]
CountOrZero = Annotated[int, Range(0, 10**9)]
Size = Annotated[int, Range(1, 2**20)]  # of a layer, a row or a batch
SizeOrZero = Annotated[int, Range(0, 2**20)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # JAX and grain keep 32 bits of it
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(1e-30, 1e30)]
NotNegative = Annotated[float, Range(0, 1e30)]


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """{name of a dataclass field: its type, with the range}."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


class Part:
    """Base of the dataclasses that make up a config. `path` is the dotted path of the class in a config, for errors.

    On every construction, each field is converted to its type and checked against its range, before the class's `__post_init__`.
    `renamed` is {earlier name of a field: its name}. Saved configs are read with either; `--set` answers the earlier one with the new.
    `removed` is {earlier field: (its default, what holds now)}. Saved configs with that default are read; `--set` gets the answer.
    """

    def __init_subclass__(
        cls, path: str = "", renamed: Mapping[str, str] | None = None, removed: Mapping[str, tuple[Any, str]] | None = None
    ) -> None:
        agree = cls.__dict__.get("__post_init__", lambda self: None)
        cls.renamed, cls.removed = dict(renamed or {}), dict(removed or {})

        def convert_all(self: Any) -> None:
            for name, hint, fits in _checks(cls):
                value = getattr(self, name)
                if not fits(value):
                    object.__setattr__(self, name, convert(value, hint, f"{path}.{name}".strip("._")))
            agree(self)

        cls.__post_init__ = convert_all


@functools.cache
def _shape(hint: Any) -> tuple[Any, Range, bool]:
    """(T, its range, whether None is accepted) of a type such as `Annotated[T, Range(1)] | None`."""
    inner, limits, optional = hint, Range(), False
    while typing.get_origin(inner) in (Annotated, types.UnionType, typing.Union):
        if typing.get_origin(inner) is Annotated:
            inner, *notes = typing.get_args(inner)
            limits = next((note for note in notes if isinstance(note, Range)), limits)
        else:
            (inner,) = (a for a in typing.get_args(inner) if a is not type(None))
            optional = True
    return inner, limits, optional


@functools.cache
def _checks(cls: type) -> list[tuple[str, Any, Callable[[Any], bool]]]:
    """(name, type, quick test whether a value needs no conversion) of each field: a table makes thousands of configs."""
    return [(name, hint, _fits(hint)) for name, hint in field_types(cls).items()]


def _fits(hint: Any) -> Callable[[Any], bool]:
    kind, limits, optional = _shape(hint)
    if kind in (int, float):
        return lambda value: type(value) is kind and value in limits
    if kind is str:
        return lambda value: type(value) is str and is_text(value)
    if typing.get_origin(kind) is Literal:
        return lambda value: value in typing.get_args(kind)
    return lambda value: type(value) is kind or (optional and value is None)


def describe(hint: Any) -> str:
    """What a field or an argument accepts, such as `a whole number from 1 to 8`."""
    inner, limits, optional = _shape(hint)
    if typing.get_origin(inner) is Literal:
        text = "one of " + ", ".join(map(str, typing.get_args(inner)))
    elif typing.get_origin(inner) is tuple:
        item = typing.get_args(inner)[0]
        text = "a comma-separated list" + (f", each {describe(item)}" if _shape(item)[1] != Range() else "")
    else:
        names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
        text = f"{names.get(inner.__name__, inner.__name__)} {limits}".strip()
    return text + (" or none" if optional else "")


def convert(value: Any, hint: Any, path: str) -> Any:
    """Convert a value from JSON, the command line or Python to the field's type; raises UserError if it does not fit."""
    kind, limits, optional = _shape(hint)
    if optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    if dataclasses.is_dataclass(kind):
        value = _loads(value, path) if isinstance(value, str) else value
        if not isinstance(value, (kind, Mapping)):
            raise _wrong(value, hint, path, " as a mapping of its fields")
        return value if isinstance(value, kind) else from_dict(kind, value, path)
    if typing.get_origin(kind) is tuple:
        items = [item for item in value.split(",") if item] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise _wrong(value, hint, path)
        hints = typing.get_args(kind)
        if hints[-1] is Ellipsis:
            hints = [hints[0]] * len(items)
        require(len(items) == len(hints), f"{path} = {str(value)[:200]!r}: expected {len(hints)} comma-separated values")
        return tuple(convert(item, h, path) for item, h in zip(items, hints, strict=True))
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise _wrong(value, hint, path, nearest(str(value), map(str, typing.get_args(kind))))
        return value
    if kind is str and isinstance(value, str):
        require(is_text(value), f"{path} = {value[:200]!r}: expected text in UTF-8 without NUL")
        return value
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    number = _number(value, kind) if kind in (int, float) else None
    if number is None or number not in limits:
        raise _wrong(value, hint, path)
    return number


def _number(value: Any, kind: type) -> float | None:
    """The value as a whole or real number; None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        number = float(value)
        if kind is float:
            return number
        exact = isinstance(value, int) or str(value).lstrip("+-").isdigit()
        return int(value if exact else number) if number.is_integer() else None
    except (ValueError, OverflowError):
        return None


def _wrong(value: Any, hint: Any, path: str, more: str = "") -> UserError:
    text = repr(value)
    return UserError(f"{path} = {text if len(text) < 200 else text[:200] + '...'}: expected {describe(hint)}{more}")


def _loads(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        raise UserError(f"{path} = {text[:200]!r}: expected JSON such as '{{\"field\": value}}' ({error})") from None


def is_text(value: str) -> bool:
    """Whether text can be encoded as UTF-8 and be part of a path: no lone surrogates, no NUL."""
    return "\0" not in value and (value.isascii() or value.encode(errors="ignore").decode() == value)


def from_dict(cls: type, values: Mapping[str, Any], path: str = "") -> Any:
    """Build dataclass `cls` from a nested mapping; unknown keys and wrong types raise UserError with the dotted path."""
    hints = field_types(cls)
    prefix = f"{path}." if path else ""
    values = {cls.renamed.get(key, key): value for key, value in values.items()}
    for old in cls.removed.keys() & values:
        default, now = cls.removed[old]
        require(values.pop(old) == default, f"{prefix}{old} can only be {default}: it was removed, because {now}")
    for key in values:
        require(key in hints, f"unknown field {prefix}{key}{nearest(key, hints)}")
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and _default(f) is dataclasses.MISSING]
    require(not missing, f"{path or cls.__name__} needs {', '.join(missing)}")
    return cls(**{name: convert(value, hints[name], prefix + name) for name, value in values.items()})


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def to_dict(config: Any) -> dict[str, Any]:
    """The nested, JSON-ready form of a config; `from_dict(Config, to_dict(c)) == c`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def override(config: Any, changes: Mapping[str, Any], path: str = "") -> Any:
    """A copy with dotted fields replaced: {"model.layers": "8", "meta_tokens": MetaTokens()}.

    All changes of one sub-config are applied at once, so that two fields that must agree can change together.
    `path` is the prefix of the config's fields in errors.
    """
    hints = field_types(type(config))
    whole: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in changes.items():
        head, _, rest = dotted.partition(".")
        name = head if head in hints else f"{head}_"  # `from` is a keyword in Python, so the field is `from_`
        require(name in hints, f"unknown field {path}{head}{nearest(head, hints)}")
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            whole[name] = convert(value, hints[name], path + head)
    for name, inner in nested.items():
        kind, first = _shape(hints[name])[0], next(iter(inner))
        require(dataclasses.is_dataclass(kind), f"{path}{name} has no fields of its own, but {path}{name}.{first} was set")
        part, prefix = whole.get(name, getattr(config, name)), f"{path}{name}."
        for old in kind.renamed.keys() & inner:
            raise UserError(f"{prefix}{old} is {prefix}{kind.renamed[old]} now")
        for old in kind.removed.keys() & inner:
            raise UserError(f"{prefix}{old} was removed, because {kind.removed[old][1]}")
        whole[name] = convert(inner, hints[name], path + name) if part is None else override(part, inner, prefix)
    return dataclasses.replace(config, **whole)


def _walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field, Any]]:
    """(dotted path, dataclass that holds the field, field, value) of every reachable field, each before those in it."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        yield prefix + f.name, config, f, value
        if isinstance(value, Part):
            yield from _walk(value, f"{prefix}{f.name}.")


def flatten(config: Any) -> dict[str, Any]:
    """Every reachable field by dotted path. A null sub-config is one entry; a null field marked `filled_in` is left out."""
    found = {path: (f, value) for path, _, f, value in _walk(config) if not isinstance(value, Part)}
    return {path: value for path, (f, value) in found.items() if value is not None or not f.metadata.get("filled_in")}


def defaults(cls: type, prefix: str = "") -> dict[str, Any]:
    """{dotted field: default} of a config and all its sub-configs, also of those that are null by default. No required fields."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        part, default = _shape(field_types(cls)[f.name])[0], _default(f)
        if dataclasses.is_dataclass(part):
            found |= defaults(part, f"{prefix}{f.name}.")
        if default is not dataclasses.MISSING and not dataclasses.is_dataclass(default):
            found[prefix + f.name] = default
    return found


def changed(config: Any) -> dict[str, Any]:
    """{dotted field: value} of the fields that differ from their defaults; True for a set sub-config that is null by default."""
    found: dict[str, Any] = {}
    for path, _, f, value in _walk(config):
        default = _default(f)
        if not isinstance(value, Part):
            if value != default:
                found[path] = value
        elif default is None or default is dataclasses.MISSING:
            found[path] = True
    return found


def unread(config: Any) -> dict[str, str]:
    """{dotted field: why nothing reads it}, from the `OnlyWith` annotations of the fields."""
    found: dict[str, str] = {}
    for path, part, f, _ in _walk(config):
        for rule in _rules(type(part)).get(f.name, ()):
            if why := rule.reason(part, path.removesuffix(f.name)):
                found[path] = why
    return found


@functools.cache
def _rules(cls: type) -> dict[str, list[OnlyWith]]:
    notes = {name: getattr(hint, "__metadata__", ()) for name, hint in field_types(cls).items()}
    return {name: [rule for rule in rules if isinstance(rule, OnlyWith)] for name, rules in notes.items()}


def ignored(config: Any) -> dict[str, str]:
    """{dotted field: why nothing reads it} of the fields that differ from their defaults and are in `config.unread()`."""
    set_here = changed(config)
    return {name: why for name, why in config.unread().items() if name in set_here}


def require_all_read(config: Any) -> None:
    """Raise UserError for a field that differs from its default but that nothing would read."""
    for name, why in ignored(config).items():
        raise UserError(f"{config.name} would ignore {name.rstrip('_')}: {why}; leave it at its default")
