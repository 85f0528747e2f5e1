"""Figures of an optimised TPU program: the FLOPs of its products and the bytes that it moves to and from HBM."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kernels_pallas.bench.schedule import operations

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_NAME, _ON_CHIP = re.compile(r"%([\w.\-]+)"), re.compile(r"S\([1-9]\d*\)")
_CALLS = re.compile(r"\bcalls=%([\w.\-]+)")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "partition-id", "after-all"}
_SLICES = {"dynamic-slice", "slice", "gather"}


class _Array(NamedTuple):
    sizes: tuple[int, ...]
    bytes: int
    in_hbm: bool


class _Instruction(NamedTuple):
    name: str
    opcode: str
    arrays: tuple[_Array, ...]  # of the result
    operands: tuple[str, ...]
    is_root: bool
    line: str


Computation = dict[str, _Instruction]


def product_flops(hlo: str) -> int:
    """FLOPs of all matrix products of a program, with those of loops once per iteration. Pallas kernels are not counted."""
    parsed, total = _parse(hlo), 0
    for op in operations(hlo, called=True):
        if " convolution(" in op.line:
            computation = parsed[op.computation]
            total += op.times * 2 * _multiplications(computation[_name_of(op.line)], computation)
    return total


def hbm_bytes(hlo: str) -> int:
    """Bytes that a program reads from HBM and writes to it, with loops multiplied by their iterations.

    What stays in on-chip memory counts nothing. Of an array that is sliced, or updated in place, the slice counts. Pallas
    kernels count their operands and results once.
    """
    parsed, total = _parse(hlo), 0
    for op in operations(hlo):
        found = _INSTRUCTION.match(op.line)
        if found and found.group(4) not in _FREE and not found.group(4).endswith("-done"):
            computation = parsed[op.computation]
            total += op.times * _traffic(computation[found.group(2)], computation, parsed)
    return total


def _parse(hlo: str) -> dict[str, Computation]:
    parsed: dict[str, Computation] = {}
    computation: Computation = {}
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = parsed.setdefault(header.group(1), {})
        elif found := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = found.groups()
            arguments = rest.partition(")")[0]
            operands = tuple(_NAME.findall(arguments))
            computation[name] = _Instruction(name, opcode, tuple(_arrays(shape)), operands, bool(root), line)
    return parsed


def _arrays(shape: str) -> Iterator[_Array]:
    for _, bits, sizes, layout in _ARRAY.findall(shape):
        numbers = tuple(int(n) for n in sizes.split(",") if n)
        yield _Array(numbers, math.prod(numbers) * max(1, int(bits or 8) // 8), not _ON_CHIP.search(layout))


def _name_of(line: str) -> str:
    found = _INSTRUCTION.match(line)
    assert found is not None, line
    return found.group(2)


def _size(instruction: _Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays if array.in_hbm)


def _traffic(instruction: _Instruction, around: Computation, parsed: dict[str, Computation]) -> int:
    """HBM bytes of one instruction outside of fusions."""
    given = [around[name] for name in instruction.operands if name in around]
    if instruction.opcode.endswith("-start"):  # a copy that another instruction waits for: its result also lists its operands
        moved = min(array.bytes for array in instruction.arrays if array.sizes)
        ends = {array.in_hbm for array in instruction.arrays if array.sizes}
        return moved * (1 if len(ends) == 2 else 2)
    if instruction.opcode in _SLICES:
        return 2 * _size(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _size(given[1])
    if instruction.opcode == "fusion" and (called := _CALLS.search(instruction.line)):
        return _fusion_traffic(instruction, given, parsed[called.group(1)])
    return _size(instruction) + sum(map(_size, given))


def _fusion_traffic(fusion: _Instruction, given: list[_Instruction], inner: Computation) -> int:
    users = defaultdict(list)
    for instruction in inner.values():
        for name in instruction.operands:
            users[name].append(instruction)
    parameters = {
        int(one.line.partition("parameter(")[2].partition(")")[0]): one for one in inner.values() if one.opcode == "parameter"
    }
    read = 0
    for number, operand in enumerate(given):
        uses = list(_uses(parameters[number].name, users))
        if uses and all(user.opcode in _SLICES and user.operands[0] == name for user, name in uses):
            read += min(_size(operand), sum(array.bytes for user, _ in uses for array in user.arrays))
        elif not (uses and all(user.opcode == "dynamic-update-slice" and user.operands[0] == name for user, name in uses)):
            read += _size(operand)
    root = next(one for one in inner.values() if one.is_root)
    results = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root] * len(fusion.arrays)
    written = 0
    for array, result in zip(fusion.arrays, results, strict=True):
        while result.opcode == "bitcast" and result.operands[0] in inner:
            result = inner[result.operands[0]]
        update = result.opcode == "dynamic-update-slice"
        written += array.in_hbm * (sum(one.bytes for one in inner[result.operands[1]].arrays) if update else array.bytes)
    return read + written


def _uses(name: str, users: dict[str, list[_Instruction]]) -> Iterator[tuple[_Instruction, str]]:
    """(user, the name it uses) of a value, through bitcasts."""
    for user in users[name]:
        if user.opcode == "bitcast":
            yield from _uses(user.name, users)
        else:
            yield user, name


def _multiplications(product: _Instruction, around: Computation) -> int:
    """Multiplications of a convolution, without those by its padding.

    Of input, kernel and result, b and f are the batch and the features, i and o the kernel's features; digits are spatial. XLA
    writes further batch dimensions of a product as spatial ones whose padding leaves one multiplication for each.
    """
    labels, window = _LABELS.search(product.line), _WINDOW.search(product.line)
    assert labels is not None, product.line
    arrays = [around[name].arrays[0].sizes for name in product.operands[:2]] + [product.arrays[0].sizes]
    given, kernel, result = (dict(zip(names, sizes, strict=True)) for names, sizes in zip(labels.groups(), arrays, strict=True))
    count = result["b"] * result["f"] * kernel["i"]
    words = (word.partition("=") for word in (window.group(1) if window else "").split())
    options = {name: value.split("x") for name, _, value in words}
    for at, name in enumerate(sorted(set(labels.group(2)) - set("io"))):
        stride, dilation, of_kernel = (
            int(options[key][at]) if key in options else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        before = int(options["pad"][at].split("_")[0]) if "pad" in options else 0
        places = np.arange(result[name])[:, None] * stride + np.arange(kernel[name]) * of_kernel - before
        inside = (places >= 0) & (places <= (given[name] - 1) * dilation) & (places % dilation == 0)
        count *= int(inside.sum())
    return count
