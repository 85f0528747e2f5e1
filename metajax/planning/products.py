"""Matrix products of an optimised TPU program, where each is a convolution."""

from __future__ import annotations

import re

import numpy as np

from kernels_pallas.bench.schedule import operations

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_SHAPE = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = [a-z]\w*\[([\d,]*)\]")
_CONVOLUTION = re.compile(r" convolution\(%([\w.\-]+), %([\w.\-]+)\)(?:, window=\{([^}]*)\})?, dim_labels=(\w+)_(\w+)->(\w+)")


def product_flops(hlo: str) -> int:
    """FLOPs of all matrix products of a program, with those of loops once per iteration. Pallas kernels are not counted."""
    shapes: dict[tuple[str, str], list[int]] = {}
    computation = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header.group(1)
        elif found := _SHAPE.match(line):
            shapes[computation, found.group(1)] = [int(n) for n in found.group(2).split(",") if n]
    total = 0
    for op in operations(hlo, called=True):
        if found := _CONVOLUTION.search(op.line):
            left, right, window, *labels = found.groups()
            result = _SHAPE.match(op.line)
            assert result is not None
            names = (left, right, result.group(1))
            total += op.times * 2 * _multiplications([shapes[op.computation, name] for name in names], labels, window or "")
    return total


def _multiplications(shapes: list[list[int]], labels: list[str], window: str) -> int:
    """Multiplications of a convolution, without those by its padding. shapes, labels: of the input, the kernel and the result.

    Labels: b and f are the batch and the features of input and result, i and o the kernel's features; digits are spatial. XLA
    writes further batch dimensions of a product as spatial ones whose padding leaves one multiplication for each.
    """
    given, kernel, result = (dict(zip(names, sizes, strict=True)) for names, sizes in zip(labels, shapes, strict=True))
    count = result["b"] * result["f"] * kernel["i"]
    options = {name: value.split("x") for name, _, value in (o.partition("=") for o in window.split())}
    for at, name in enumerate(sorted(set(labels[1]) - set("io"))):
        stride, dilation, of_kernel = (int(options.get(key, {at: 1})[at]) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        before = int(options["pad"][at].split("_")[0]) if "pad" in options else 0
        places = np.arange(result[name])[:, None] * stride + np.arange(kernel[name]) * of_kernel - before
        inside = (places >= 0) & (places <= (given[name] - 1) * dilation) & (places % dilation == 0)
        count *= int(inside.sum())
    return count

