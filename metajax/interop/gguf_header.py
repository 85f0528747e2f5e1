"""The header of a GGUF file: its fields and the places of its tensors. Every length is checked against the file's size.

The gguf library's reader trusts the lengths that a file states, and for some of them it does not terminate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metajax.core.errors import UserError, require
from metajax.interop.settings import shown

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_TEXT, _ARRAY = 8, 9
VERSIONS = (2, 3)


class Lying(NamedTuple):
    """A tensor as it is stored in its file."""

    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    data: np.ndarray  # uint8[..., bytes of a row]


class _Cursor:
    """A read position in the bytes of a file. Reading past the end raises UserError."""

    def __init__(self, path: Path):
        try:
            self.bytes = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:  # a folder, an empty file
            raise UserError(f"{path} is not a GGUF file ({error}); name a .gguf file") from None
        self.path, self.at = path, 0

    def fail(self, why: str) -> UserError:
        return UserError(f"{self.path} is not a whole GGUF file ({why}); fetch it again")

    def take(self, count: int) -> np.ndarray:
        if count > len(self.bytes) - self.at:
            raise self.fail(f"{count} bytes are missing at byte {self.at} of {len(self.bytes)}")
        self.at += count
        return self.bytes[self.at - count : self.at]

    def number(self, kind: str = "<u8") -> Any:
        return self.take(np.dtype(kind).itemsize).view(kind)[0].item()

    def text(self) -> str:
        try:
            return self.take(self.number()).tobytes().decode()
        except UnicodeDecodeError:
            raise self.fail(f"a text that is not UTF-8 before byte {self.at}") from None

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            of, count = self.number("<u4"), self.number()
            if of in _SCALARS:
                return self.take(count * np.dtype(_SCALARS[of]).itemsize).view(_SCALARS[of]).tolist()
            return self._list(count, 8, self.text) if of == _TEXT else self._unknown(of)
        return self.number(_SCALARS[kind]) if kind in _SCALARS else self._unknown(kind)

    def _list(self, count: int, least: int, item: Callable[[], Any]) -> list[Any]:
        """`count` items of at least `least` bytes each."""
        if count * least > len(self.bytes) - self.at:
            raise self.fail(f"{count} items cannot follow byte {self.at} of {len(self.bytes)}")
        return [item() for _ in range(count)]

    def _unknown(self, kind: int) -> Any:
        raise self.fail(f"a value of the unknown kind {kind} at byte {self.at}")

    def pairs(self, count: int, least: int, item: Callable[[], Any]) -> dict[str, Any]:
        """Named items; each name must be unique."""
        found: dict[str, Any] = {}
        for name, value in self._list(count, least, lambda: (self.text(), item())):
            if name in found:
                raise self.fail(f"{shown(name)} appears twice")
            found[name] = value
        return found


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Lying]]:
    """(fields by name, tensors by name). UserError for a file that is truncated, damaged or of another version."""
    cursor = _Cursor(path)
    magic, version = cursor.take(4).tobytes(), cursor.number("<u4")
    require(magic == b"GGUF", f"{path} is not a whole GGUF file (it begins with {magic!r}); name a .gguf file")
    require(version in VERSIONS, f"{path}: GGUF version {version} (or another byte order), but only {VERSIONS} can be read")
    tensors, fields = cursor.number(), cursor.number()
    found = cursor.pairs(fields, 13, lambda: cursor.value(cursor.number("<u4")))
    places = cursor.pairs(tensors, 24, lambda: _place(cursor))
    step = found.get("general.alignment", 32)
    if type(step) is not int or not 8 <= step <= 1 << 20 or step & (step - 1):
        raise cursor.fail(f"general.alignment is {shown(repr(step))}")
    start = -(-cursor.at // step) * step
    return found, {name: _lying(cursor, name, start, *place) for name, place in places.items()}


def _place(cursor: _Cursor) -> tuple[list[int], int, int]:
    dimensions = cursor.number("<u4")
    if dimensions > 4:
        raise cursor.fail(f"a tensor of {dimensions} dimensions")
    return [cursor.number() for _ in range(dimensions)], cursor.number("<u4"), cursor.number()


def _lying(cursor: _Cursor, name: str, start: int, sizes: list[int], kind: int, offset: int) -> Lying:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in {known.value for known in GGML_QUANT_SIZES}:
        raise cursor.fail(f"{shown(name)} has numbers of the unknown kind {kind}")
    block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if not sizes or min(sizes) < 1 or sizes[0] % block or offset % 4:
        raise cursor.fail(f"{shown(name)} has the shape {sizes[::-1]}")
    row, shape = sizes[0] // block * width, tuple(sizes[::-1])
    cursor.at = start + offset
    data = cursor.take(math.prod(shape[:-1]) * row)
    return Lying(shape, GGMLQuantizationType(kind), data.reshape(*shape[:-1], row))
