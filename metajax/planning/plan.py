"""What a train step needs and costs on a TPU slice that is not there: the step that the loop runs, compiled ahead of time.

Nothing is measured: memory is the compiler's own account, times are lower bounds from the makers' peak figures and XLA's estimates.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kernels_pallas.bench.schedule import operations, xla_cycles
from metajax.config import Config, config_hash
from metajax.families import AnyConfig
from metajax.parallel.rules import batch_sharding
from metajax.planning.buffers import largest_buffers
from metajax.planning.flops import step_flops
from metajax.planning.topology import Chip, chip_of, slice_devices
from metajax.training.program import Program
from metajax.training.step import DEVICE_FIELDS, Batch

KERNELS = re.compile(r"(?:prefix_window_attention|selective_scan|causal_conv)_(?:forward|backward)(?:_q|_kv)?")
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_SCATTER = re.compile(r"^%(all-reduce-scatter[\w.\-]*) \((.*?)\) ->", re.MULTILINE)  # XLA's fusions that reduce and scatter
_SCATTERED = re.compile(r" fusion\(.*calls=%(all-reduce-scatter[\w.\-]*)")
_BETWEEN = re.compile(r"= \((.*?), u32\[\], .* send\(.*_xla_megascale_transfer_type=\"(\w+)\"")
_ARRAY = re.compile(r"\b([a-z]+)(\d+)?\[([\d,]*)\]")
_WIRE = {"all-reduce": 2.0}  # how often an array crosses the links of a chip; once in all others


def whole_batch(config: Config) -> dict[str, np.ndarray]:
    """A batch of full rows, one document to each, as the step reads it; values are of no consequence."""
    rows, slots = config.data.batch_rows, config.row_slots
    batch = {
        "tokens": np.zeros((rows, slots), np.int32),
        "positions": np.tile(np.arange(slots, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, slots), np.int32),
        "targets": np.zeros((rows, slots), np.int32),
        "loss_weights": np.ones((rows, slots), np.float32),
        "is_body": np.ones((rows, slots), bool),
        "asks_metadata": np.zeros((rows, slots), bool),
    }
    if config.meta_tokens is not None:
        count = config.row_meta_tokens
        batch["meta_slots"] = np.tile(np.linspace(1, slots - 1, count).astype(np.int32), (rows, 1))
    return batch


class Planned(NamedTuple):
    """A run's step on the devices of a slice, as shapes with their shardings, and what it is counted by."""

    mesh: Mesh
    state: Any  # a `State`
    frozen: Any  # what the step reads beside it and the batch
    compile: Callable[[], Any]
    flops: int
    reads: tuple[int, str]  # how many of what


def text_step(config: Config, devices: list[jax.Device], *, vocab_size: int) -> Planned:
    """The step of a language model on full rows."""
    program = Program.build(config, vocab_size, devices)
    state, batch = program.abstract_state(), whole_batch(config)
    count = step_flops(config, vocab_size, batch)
    frozen = program.frozen(state.model)
    return Planned(program.mesh, state, frozen, lambda: _compile(program, state, batch), count, (batch["tokens"].size, "tokens"))


def plan(
    config: AnyConfig, step: Callable[[AnyConfig, list[jax.Device]], Planned], topology: str, dump: Path | None = None
) -> dict[str, Any]:
    """The plan of one config as plain data: see `memory`, `collectives`, `bound`.

    Args:
      step: what is planned of a config; its kind of run decides (`text_step`, `metajax.planning.images.image_step`).
      dump: where the compiler was told to write what it does; the largest buffers are read there.

    Raises:
      UserError: no such slice, or a batch that does not spread over it.
    """
    chip, devices = chip_of(topology), slice_devices(topology)
    planned = step(config, devices)
    reads, unit = planned.reads
    found: dict[str, Any] = {
        "name": config.name,
        "scale": config.scale,
        "hash": config_hash(config),
        "topology": topology,
        "chips": len(devices),
        "mesh": dict(planned.mesh.shape),
        "flops": planned.flops,
        "reads": {"count": reads, "unit": unit},
        "state": {"parameters": _bytes_of(planned.state.model), "optimizer": _bytes_of(planned.state.opt_state)},
    }
    if planned.frozen:
        found["state"]["frozen"] = _bytes_of(planned.frozen)
    began = time.monotonic()
    try:
        compiled = planned.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found |= {"fits": False, "reason": str(error).splitlines()[0], "compile_seconds": time.monotonic() - began}
        return found | {"largest_buffers": largest_buffers(dump) if dump else []}
    hlo = compiled.as_text()
    found |= {"fits": True, "compile_seconds": time.monotonic() - began, "memory": memory(compiled, chip)}
    found["largest_buffers"] = largest_buffers(dump) if dump else []
    found |= {"collectives": collectives(hlo, chip), "kernels": sorted(set(KERNELS.findall(hlo))), "xla_cycles": xla_cycles(hlo)}
    return found | {"bound": bound(found, chip)}


def _compile(program: Program, state: Any, batch: Mapping[str, np.ndarray]) -> Any:
    sharding = batch_sharding(program.mesh)
    abstract: Batch = {
        name: jax.ShapeDtypeStruct(batch[name].shape, jnp.dtype(batch[name].dtype), sharding=sharding)
        for name in DEVICE_FIELDS
        if name in batch
    }
    return program.compile_step(state, abstract)


def _bytes_of(tree: Any) -> int:
    """Bytes of a sharded tree on one chip."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "sharding")
    )


def memory(compiled: Any, chip: Chip) -> dict[str, float]:
    """Bytes on one chip: arguments (state and batch, given back in place), temporaries, program, their total, and what the chip has."""
    analysis = compiled.memory_analysis()
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }
    return parts | {"total": sum(parts.values()), "limit": chip.memory}


def collectives(hlo: str, chip: Chip) -> dict[str, dict[str, float]]:
    """{kind: {count, bytes, seconds}} of a step on one chip; seconds at the peak of its links."""
    found: dict[str, dict[str, float]] = {}
    scatters = dict(_SCATTER.findall(hlo))

    def add(kind: str, arrays: str, times: int, speed: float) -> None:
        size = max((_array_bytes(*array) for array in _ARRAY.findall(arrays)), default=0)
        so_far = found.setdefault(kind, {"count": 0, "bytes": 0, "seconds": 0.0})
        so_far["count"] += times
        so_far["bytes"] += times * size
        so_far["seconds"] += times * size * _WIRE.get(kind, 1.0) / speed

    for line, times in operations(hlo):
        if match := _COLLECTIVE.search(line):
            add(match.group(2), match.group(1), times, chip.links)
        elif match := _SCATTERED.search(line):
            add("reduce-scatter", scatters[match.group(1)], times, chip.links)
        elif match := _BETWEEN.search(line):
            add(f"{match.group(2).lower().replace('_', '-')} between slices", match.group(1), times, chip.network)
    return found


def _array_bytes(kind: str, bits: str, sizes: str) -> int:
    width = {"pred": 8}.get(kind) or int(bits or 8)
    return math.prod(int(n) for n in sizes.split(",") if n) * width // 8


def bound(found: Mapping[str, Any], chip: Chip) -> dict[str, float]:
    """Seconds of a step, at least: its operations at the chips' peak, XLA's estimate (kernels left out), links, the network between slices; and the MFU that the largest allows."""
    seconds = {
        "operations": found["flops"] / (found["chips"] * chip.flops),
        "xla_estimate": found["xla_cycles"] / chip.clock,
        "links": sum(kind["seconds"] for name, kind in found["collectives"].items() if "slices" not in name),
        "network": sum(kind["seconds"] for name, kind in found["collectives"].items() if "slices" in name),
    }
    least = max(seconds.values())
    return seconds | {"step": least, "mfu": seconds["operations"] / least}
