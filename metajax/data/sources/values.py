"""Rows of JSON, Parquet and TFDS as columns of text. Nested columns have dotted names; missing values are left out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from metajax.data.annotators import plain

_SMALL_FLOATS = {pa.float16(): np.float16, pa.float32(): np.float32}


def flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """{"meta": {"url": ...}} as {"meta.url": ...}. A column that literally has the dotted name wins over a nested one."""
    flat: dict[str, Any] = {}
    queue = deque([("", row)])
    while queue:
        prefix, fields = queue.popleft()
        for name, value in fields.items():
            if hasattr(value, "items"):
                queue.append((f"{prefix}{name}.", value))
            else:
                flat.setdefault(prefix + name, value)
    return flat


def as_string(value: Any) -> str:
    """A value as text; '' if it is missing (None, NaN, NaT, infinite) or a list. Raises UnicodeError if it cannot be text.

    Numbers have the fewest digits that round-trip in their type and no exponent; zero has no sign.
    """
    if isinstance(value, (float, np.floating)):
        return np.format_float_positional(value + 0, trim="0") if math.isfinite(value) else ""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (str, bytes)):
        return as_text(value)
    if value is None or isinstance(value, (Mapping, Sequence, np.ndarray)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        return plain(value) if value.is_finite() else ""
    return str(value)


def as_text(value: str | bytes) -> str:
    """A str; raises UnicodeError for invalid UTF-8 and for lone surrogates, which JSON can spell but no tokenizer can encode."""
    try:
        text = value.decode() if isinstance(value, bytes) else value
        text.encode()
        return text
    except UnicodeDecodeError as error:
        raise UnicodeError(f"is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError as error:
        raise UnicodeError(f"holds half of a surrogate pair at character {error.start}") from None


def flat(table: pa.Table) -> pa.Table:
    """A table in which every field of a struct is a column with a dotted name, dates are text, and lists are left out."""
    found: dict[str, pa.ChunkedArray] = {}
    queue = deque(zip(table.column_names, table.columns, strict=True))
    while queue:
        name, column = queue.popleft()
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_struct(column.type):
            queue.extend((f"{name}.{field.name}", part) for field, part in zip(column.type, column.flatten(), strict=True))
        elif not pa.types.is_nested(column.type):  # dates as text, because Python's hold no nanoseconds
            found.setdefault(name, column.cast(pa.string()) if pa.types.is_temporal(column.type) else column)
    return pa.table(found)


def cells(table: pa.Table, row: int) -> dict[str, Any]:
    """A row of `flat`: text as raw bytes, valid UTF-8 or not, and floats in their stored width."""
    return {name: _cell(column[row]) for name, column in zip(table.column_names, table.columns, strict=True)}


def _cell(scalar: pa.Scalar) -> Any:
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.BinaryScalar):
        return scalar.as_buffer().to_pybytes()
    return _SMALL_FLOATS.get(scalar.type, lambda value: value)(scalar.as_py())
