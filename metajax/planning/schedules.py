"""The Pallas kernels of a compiled step: the number of calls, and the cycles that the TPU compiler schedules for each."""

from __future__ import annotations

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from kernels_pallas.bench import attention, compiled, scan
from kernels_pallas.bench.programs import Program
from kernels_pallas.bench.schedule import operations
from kernels_pallas.prefix_window_attention.blocks import visits_of_row
from kernels_pallas.prefix_window_attention.tpu import tiling_of
from metajax.config import Config
from metajax.models.specs import layer_specs

KERNELS = re.compile(r"(?:prefix_window_attention|selective_scan|causal_conv)_(?:forward|backward)(?:_q|_kv)?")
_CALL = re.compile(rf"%({KERNELS.pattern})[.\w]* = .* custom-call\(.*operand_layout_constraints=\{{(.*?)\}}\}}")
_OPERAND = re.compile(r"([a-z]+\d+)\[([\d,]*)\]")
_DTYPES = {"bf16": "bfloat16", "f32": "float32"}


class Call(NamedTuple):
    """A kernel and the types of its operands, as (dtype, sizes)."""

    name: str
    operands: tuple[tuple[str, tuple[int, ...]], ...]


def kernel_calls(hlo: str) -> Counter[Call]:
    """How often an optimised program calls each kernel with each operand types; calls in loops count once per iteration."""
    found: Counter[Call] = Counter()
    for op in operations(hlo):
        if match := _CALL.search(op.line):
            operands = ((kind, tuple(int(n) for n in sizes.split(",") if n)) for kind, sizes in _OPERAND.findall(match.group(2)))
            found[Call(match.group(1), tuple(operands))] += op.times
    return found


def scheduled(calls: Counter[Call], config: Config, kind: str) -> list[dict[str, Any]]:
    """[{name, operands, times, cycles, seconds}] of the kernel calls of a step, if each row is one document, on a chip of `kind`.

    Each kernel is compiled in a separate process. cycles: bundles x visits of one call, averaged over layers if masks differ.
    They include no stalls and no copies, so no chip is faster. An unreadable schedule counts 0, with the reason in `unread`.
    """
    programs = {call: _programs(call, config) for call in calls}
    distinct = {program.name: program for made, _ in programs.values() for program in made}
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(distinct, pool.map(lambda program: _result(program, kind), distinct.values()), strict=True))
    chip, found = compiled.CHIPS[kind], []
    for call, times in sorted(calls.items()):
        made, rows = programs[call]
        unread = [results[p.name]["unread"] for p in made if "unread" in results[p.name]]
        costs = [k["least"] for p in made for k in results[p.name]["kernels"] if k["name"] == call.name and not unread]
        cycles = rows * sum(costs) / max(len(costs), 1) / chip.cores
        operands = [f"{dtype}{list(sizes)}" for dtype, sizes in call.operands]
        seconds = times * cycles / (1e9 * chip.clock)
        entry = {"name": call.name, "operands": operands, "times": times, "cycles": round(cycles), "seconds": seconds}
        found.append(entry | ({"unread": unread[0]} if unread else {}))
    return found


def _result(program: Program, kind: str) -> dict[str, Any]:
    try:
        return compiled.spawn(program, kind)
    except RuntimeError as error:  # the plan reports it; its bound holds without this schedule
        return {"kernels": [], "unread": str(error).splitlines()[-1]}


def _programs(call: Call, config: Config) -> tuple[list[Program], int]:
    """(programs of the call on one row, one for each mask that it may have; rows of a call)."""
    model, operands = config.model, call.operands
    if call.name.startswith("prefix_window_attention"):
        (dtype, (kv_heads, group, key_width, queries)), _, (_, (*_, value_width)) = [x for x in operands if len(x[1]) > 2][:3]
        heads, visits = (kv_heads * group, kv_heads), operands[1][1][0] - 1
        specs = layer_specs(model, config.meta_tokens)
        windows = [spec.window for spec in specs if "attention" in spec.mixers]
        windows += [None for spec in specs[:1] if spec.meta_attention == "causal"]
        cases = {config.row_positions: (windows, model.prefix_tokens)}
        cases.setdefault(model.prefix_tokens or config.row_meta_tokens or config.row_positions, ([None], 0))
        for length, (windows, metas) in cases.items():
            rows = {window: _rows(queries, visits, length, window, heads, _DTYPES[dtype]) for window in windows}
            rest = (metas, *heads, key_width, value_width, 1, _DTYPES[dtype])
            if shapes := [(length, window, *rest) for window in windows if rows[window]]:
                made = [attention.ours("attention", json.dumps(s), attention.Shape(*s), "both") for s in shapes]
                return made, max(rows.values())
        raise ValueError(f"{queries} queries with {visits} visits are no rows of {' or '.join(map(str, cases))} tokens")
    dtype, (rows, length, channels) = operands[1]
    op, shape = call.name.rpartition("_")[0], (length, channels, model.hybrid.state, 1, _DTYPES[dtype])
    return [scan.ours(op, json.dumps(shape), scan.Shape(*shape), "both")], rows


def _rows(queries: int, visits: int, length: int, window: int | None, heads: tuple[int, int], dtype: str) -> int:
    """Number of a call's rows if they have this length and window, by the length of its list of visits; else 0."""
    block = tiling_of((1, length, length), heads, dtype, 0, window).block_q
    rows = max(queries // (-(-length // block) * block), 1)
    q, k, *_ = tiling_of((rows, length, length), heads, dtype, 0, window)  # many rows may need larger blocks
    same = queries == rows * -(-length // q) * q and visits == rows * visits_of_row(length, length, 0, q, k, window)
    return rows if same else 0
