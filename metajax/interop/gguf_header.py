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


class Packed(NamedTuple):
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

    def check(self, sound: bool, why: str) -> None:
        require(sound, f"{self.path} is not a whole GGUF file ({why}); fetch it again")

    def take(self, count: int) -> np.ndarray:
        self.check(count <= len(self.bytes) - self.at, f"{count} bytes are missing at byte {self.at} of {len(self.bytes)}")
        self.at += count
        return self.bytes[self.at - count : self.at]

    def number(self, kind: str = "<u8") -> Any:
        return self.take(np.dtype(kind).itemsize).view(kind)[0].item()

    def text(self) -> str:
        content = self.take(self.number()).tobytes()
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise UserError(f"{self.path} has a text that is not UTF-8 before byte {self.at}; fetch it again") from None

    def value(self, kind: int) -> Any:
        of = self.number("<u4") if kind == _ARRAY else kind
        self.check(of in _SCALARS or of == _TEXT, f"a value of the unknown kind {of} at byte {self.at}")
        if kind != _ARRAY:
            return self.text() if kind == _TEXT else self.number(_SCALARS[kind])
        count = self.number()
        if of == _TEXT:
            return self.items(count, 8, self.text)
        return self.take(count * np.dtype(_SCALARS[of]).itemsize).view(_SCALARS[of]).tolist()

    def items(self, count: int, least: int, item: Callable[[], Any]) -> list[Any]:
        """`count` items of at least `least` bytes each."""
        room = len(self.bytes) - self.at
        self.check(count * least <= room, f"{count} items cannot follow byte {self.at} of {len(self.bytes)}")
        return [item() for _ in range(count)]

    def named(self, count: int, least: int, item: Callable[[], Any]) -> dict[str, Any]:
        """Items by name; each name must be unique."""
        found: dict[str, Any] = {}
        for name, value in self.items(count, least, lambda: (self.text(), item())):
            self.check(name not in found, f"{shown(name)} appears twice")
            found[name] = value
        return found

    def place(self) -> tuple[list[int], int, int]:
        """(sizes, kind, offset) of a tensor."""
        dimensions = self.number("<u4")
        self.check(dimensions <= 4, f"a tensor of {dimensions} dimensions")
        return [self.number() for _ in range(dimensions)], self.number("<u4"), self.number()


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Packed]]:
    """(fields by name, tensors by name). UserError for a file that is truncated, damaged or of another version."""
    cursor = _Cursor(path)
    magic, version = cursor.take(4).tobytes(), cursor.number("<u4")
    require(magic == b"GGUF", f"{path} is not a whole GGUF file (it begins with {magic!r}); name a .gguf file")
    require(version in VERSIONS, f"{path}: GGUF version {version} (or another byte order), but only {VERSIONS} can be read")
    tensors, fields = cursor.number(), cursor.number()
    found = cursor.named(fields, 13, lambda: cursor.value(cursor.number("<u4")))
    places = cursor.named(tensors, 24, cursor.place)
    step = found.get("general.alignment", 32)
    sound = type(step) is int and 8 <= step <= 1 << 20 and not step & (step - 1)
    cursor.check(sound, f"general.alignment is {shown(repr(step))}")
    start = -(-cursor.at // step) * step
    return found, {name: _packed(cursor, name, start, *place) for name, place in places.items()}


def _packed(cursor: _Cursor, name: str, start: int, sizes: list[int], kind: int, offset: int) -> Packed:
    from gguf.constants import GGML_QUANT_SIZES

    known = {kind.value: kind for kind in GGML_QUANT_SIZES}
    cursor.check(kind in known, f"{shown(name)} has numbers of the unknown kind {kind}")
    block, width = GGML_QUANT_SIZES[known[kind]]
    sound = sizes and min(sizes) >= 1 and sizes[0] % block == 0 and offset % 4 == 0
    cursor.check(bool(sound), f"{shown(name)} has the shape {sizes[::-1]}")
    row, shape = sizes[0] // block * width, tuple(sizes[::-1])
    cursor.at = start + offset
    data = cursor.take(math.prod(shape[:-1]) * row)
    return Packed(shape, known[kind], data.reshape(*shape[:-1], row))
