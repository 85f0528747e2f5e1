"""Memory and cost of a train step on a TPU slice that is not available: the trainer's own step, compiled ahead of time.

Nothing is measured. Memory is what the compiler reports. Times are lower bounds from published peak figures, and XLA's estimates.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from kernels_pallas.bench.hlo import hbm_bytes, product_flops
from kernels_pallas.bench.schedule import operations, xla_cycles
from metajax.config import AnyConfig, Config, config_hash
from metajax.core.errors import first_line, require
from metajax.models.flops import flops_per_token, step_flops
from metajax.planning.buffers import largest_buffers, temporaries
from metajax.planning.schedules import kernel_calls, scheduled
from metajax.planning.topology import Chip, chip_of, parse_topology, slice_devices
from metajax.training.objectives import Batch
from metajax.training.program import Program

_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_MESH_AXES, _MESH_GROUP = re.compile(r"'(\w+)'=(\d+)"), re.compile(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}")
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")
_BETWEEN = re.compile(r"= \((.*?), u32\[\], .* send\(.*_xla_megascale_transfer_type=\"(\w+)\"")
_ARRAY = re.compile(r"\b[a-z]+(\d+)?\[([\d,]*)\]")
_IN_KERNELS = ("attention_pairs", "meta_attention", "conv", "scan")  # parts of `flops_per_token` that kernels may compute


def whole_batch(config: Config) -> dict[str, np.ndarray]:
    """A batch of full rows, one document each, as the step reads it. The values do not matter."""
    shape = rows, positions = config.data.batch_size, config.row_positions
    zeros, ones = np.zeros(shape, np.int32), np.ones(shape, np.int32)
    batch = {"tokens": zeros, "targets": zeros, "segment_ids": ones, "loss_weights": ones.astype(np.float32)}
    batch |= {"is_body": ones.astype(bool), "asks_metadata": zeros.astype(bool)}
    batch["positions"] = np.tile(np.arange(positions, dtype=np.int32), (rows, 1))
    if config.meta_tokens is not None:
        places = np.linspace(1, positions - 1, config.row_meta_tokens).astype(np.int32)
        batch["meta_positions"] = np.tile(places, (rows, 1))
    return batch


class Planned(NamedTuple):
    """The train step of a run on the devices of a slice, with its FLOPs and its unit of speed."""

    program: Program
    batch: Batch  # shapes
    flops: int
    reads: tuple[int, str]  # (number, unit) that a step reads
    parts: Mapping[str, float] = MappingProxyType({})  # operations per unit by part, if the parts are known


def text_step(config: Config, devices: list[jax.Device], *, vocab_size: int) -> Planned:
    """The train step of a language model on full rows."""
    program, batch = Program.build(config, vocab_size, devices), whole_batch(config)
    count, parts = step_flops(config, vocab_size, batch), flops_per_token(config, vocab_size)
    return Planned(program, program.abstract_batch(batch), count, (batch["tokens"].size, "tokens"), parts)


Step = Callable[[AnyConfig, list[jax.Device]], Planned]


def plan(config: AnyConfig, step: Step, topology: str, dump: Path | None = None, *, schedules: bool = False) -> dict[str, Any]:
    """The plan of one config as plain data: see `memory`, `collectives`, `scheduled`, `bound`, `estimate`.

    Args:
      step: makes the step of a config, by its kind of run (`text_step`, `metajax.vision.program.image_step`).
      dump: folder of the compiler's dump, from which the largest buffers and the kinds of temporaries are read.
      schedules: whether to compile each kernel again separately, to read its scheduled cycles.

    Raises:
      UserError: the slice does not exist, or the batch cannot be sharded over it.
    """
    chip, devices = chip_of(topology), slice_devices(topology)
    planned = step(config, devices)
    (reads, unit), program = planned.reads, planned.program
    state, frozen = program.abstract_state(), program.place(program.frozen)
    whole = not schedules or program.mesh.shape["context"] == 1
    require(whole, "--schedules reads kernels on whole rows; leave it out, or context out of runtime.mesh")
    found: dict[str, Any] = {"name": config.name, "scale": config.scale, "hash": config_hash(config), "topology": topology}
    found |= {"chips": len(devices), "mesh": dict(program.mesh.shape), "flops": planned.flops}
    found["meshes"] = [option._asdict() for option in program.meshes]
    found |= {"flops_by_part": dict(planned.parts), "reads": {"count": reads, "unit": unit}}
    found["state"] = {"parameters": _bytes_of(state.model), "optimizer": _bytes_of(state.opt_state)}
    if frozen:
        found["state"]["frozen"] = _bytes_of(frozen)
    began = time.monotonic()
    try:
        compiled = program.compile_step(state, planned.batch).compiled
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found |= {"fits": False, "reason": first_line(error), "compile_seconds": time.monotonic() - began}
        return found | {"largest_buffers": largest_buffers(dump) if dump else []}
    found |= {"fits": True, "compile_seconds": time.monotonic() - began, "memory": memory(compiled, chip)}
    found |= {"temporaries": temporaries(dump) if dump else {}, "largest_buffers": largest_buffers(dump) if dump else []}
    hlo, kernels = compiled.as_text(), Counter()
    calls = kernel_calls(hlo)
    for call, times in calls.items():
        kernels[call.name] += times
    found |= {"collectives": collectives(hlo, chip), "kernels": dict(kernels), "xla_cycles": xla_cycles(hlo)}
    found |= {"products": product_flops(hlo), "hbm_bytes": hbm_bytes(hlo)}
    if schedules:
        found["schedules"] = scheduled(calls, config, parse_topology(topology)[1])
    return found | bounds(found, chip)


def _bytes_of(tree: Any) -> int:
    """Bytes of a sharded tree on one chip."""
    leaves = (leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding"))
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def memory(compiled: Any, chip: Chip) -> dict[str, float]:
    """Bytes on one chip: arguments (state and batch, updated in place), temporaries, program, total, and the chip's memory."""
    analysis = compiled.memory_analysis()
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }
    return parts | {"total": sum(parts.values()), "limit": chip.memory}


def collectives(hlo: str, chip: Chip) -> dict[str, dict[str, float]]:
    """{kind: {count, bytes, seconds}} of a step on one chip. Bytes count whole arrays; seconds assume peak link or network speed.

    XLA may split a collective over several fusions to overlap it with other work. It then appears in each and counts once.
    """
    found: dict[str, dict[str, float]] = {}
    seen: set[str] = set()
    for line, times, computation, called in operations(hlo, called=True):
        if match := _COLLECTIVE.search(line):
            if called and (channel := _CHANNEL.search(line)):
                if channel.group(1) in seen:
                    continue
                seen.add(channel.group(1))
            kind, members, speed = match.group(2), _group_size(line), chip.links
            sizes = [_array_bytes(*array) for array in _ARRAY.findall(match.group(1))]
            # The type of a started collective includes its input and contexts; an all-reduce lists only its results.
            size = max(sizes) if match.group(3) and kind != "all-reduce" else sum(sizes)
            if kind == "reduce-scatter":
                size *= members
            elif computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            # A chip already holds its own share of the group's array. An all-reduce is a reduce-scatter, then an all-gather.
            wire = (2 if kind == "all-reduce" else 1) * (1.0 if kind == "collective-permute" else 1 - 1 / members)
        elif match := _BETWEEN.search(line):
            kind, speed, wire = f"{match.group(2).lower().replace('_', '-')} between slices", chip.network, 1.0
            size = max(_array_bytes(*array) for array in _ARRAY.findall(match.group(1)))
        else:
            continue
        so_far = found.setdefault(kind, {"count": 0, "bytes": 0, "seconds": 0.0})
        so_far["count"] += times
        so_far["bytes"] += times * size
        so_far["seconds"] += times * size * wire / speed
    return found


def _group_size(line: str) -> int:
    """Number of chips in a collective's group; 1 if it names none."""
    if mesh := _MESH_GROUP.search(line):
        sizes = {name: int(size) for name, size in _MESH_AXES.findall(mesh.group(1))}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh.group(2)))
    listed = _GROUP.search(line)
    return int(listed.group(2) or len(listed.group(1).split(","))) if listed else 1


def _array_bytes(bits: str, sizes: str) -> int:
    return math.prod(int(n) for n in sizes.split(",") if n) * int(bits or 8) // 8  # pred: a byte


def bounds(found: Mapping[str, Any], chip: Chip) -> dict[str, dict[str, float]]:
    """ "bound": lower bounds on the seconds of a step, and the MFU that the largest allows; "estimate": the compiler's estimate.

    Bounds: all operations at peak; kernels as scheduled with all else at peak; reading and writing the state; links; the network
    between slices. The estimate adds XLA's estimate of everything but the kernels, which is a model and not a bound.
    """
    kernels = sum(kernel["seconds"] for kernel in found.get("schedules", ()))
    state, peak = found["state"], found["chips"] * chip.flops
    elsewhere = sum(cost for part, cost in found["flops_by_part"].items() if part not in _IN_KERNELS) * found["reads"]["count"]
    between = {True: 0.0, False: 0.0}
    for name, kind in found["collectives"].items():
        between["slices" in name] += kind["seconds"]
    seconds = {
        "operations": found["flops"] / peak,
        "kernels": kernels + elsewhere / peak,
        "state": (2 * (state["parameters"] + state["optimizer"]) + state.get("frozen", 0)) / chip.bandwidth,
        "links": between[False],
        "network": between[True],
    }
    least, xla = max(seconds.values()), found["xla_cycles"] / chip.clock
    estimate = {"kernels": kernels, "xla": xla, "step": kernels + xla, "mfu": seconds["operations"] / (kernels + xla)}
    return {"bound": seconds | {"step": least, "mfu": seconds["operations"] / least}, "estimate": estimate}
