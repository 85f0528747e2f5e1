"""The cost of one program from the TPU compiler's schedule. Runs in a separate process, to set options before JAX starts."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kernels_pallas.bench.programs import Program
from kernels_pallas.bench.schedule import read_schedule, xla_cycles

TOPOLOGY = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Clock in GHz and HBM bandwidth in GB/s of one JAX device.

    cores: number that share a kernel's parallel axes. delay: bundles after a branch that run whether or not it is taken.
    """

    clock: float
    bandwidth: float
    cores: int = 1
    delay: int = 4


# The clocks of v5e and v5p are from the book "How to Scale Your Model" and match the peak bf16 rates with 4 and 8 units of
# 128 x 128. Those of v6e and tpu7x are not public; they are derived from the peak with 16 such units. XLA's estimates of a large
# product keep 11.3 (v6e) and 12.9 (tpu7x) of these units busy, compared to 3.5 on v5e and 7.2 on v5p.
CHIPS = {
    "v5e": Chip(1.5, 819.0),
    "v5p": Chip(1.75, 2765.0, cores=2),
    "v6e": Chip(1.75, 1640.0),
    "tpu7x": Chip(2.2, 3690.0, delay=1),
}


def spawn(program: Program, chip: str) -> dict[str, Any]:
    """The result of `measure`, run in a process that dumps the kernels' schedules. Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true" if program.kernels else ""
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        environment["LIBTPU_INIT_ARGS"] = flags
        command = [sys.executable, "-m", "kernels_pallas.bench", "--compile", program.name, "--chip", chip, "--dump", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        if done.returncode != 0:
            raise RuntimeError(f"{program.name} did not compile for {chip}:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def measure(program: Program, chip: str, dump: Path) -> dict[str, Any]:
    """Cycles and bytes of `program` compiled for one `chip`, the slots that its kernels use, and temporary memory."""
    import jax
    from jax.experimental import topologies

    (device,) = topologies.get_topology_desc(TOPOLOGY[chip], "tpu", chips_per_host_bounds=(1, 1, 1)).devices[:1]
    on_chip = jax.sharding.SingleDeviceSharding(device)
    function, arguments = program.build()
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on_chip) for a in arguments]
    start = time.monotonic()
    try:
        compiled = jax.jit(function).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"does_not_fit": str(error).partition("\n")[0]}
    result = {
        "compile_seconds": time.monotonic() - start,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "xla_cycles": xla_cycles(compiled.as_text()),
        "kernels": [],
    }
    for kernel in program.kernels:
        schedule = read_schedule(dump, kernel.name, delay=CHIPS[chip].delay)
        cost = schedule.cost(kernel.steps, kernel.inside)
        visited = schedule.visited(kernel.steps, kernel.inside)
        result["kernels"].append(
            {
                "name": kernel.name,
                "cycles": cost.cycles,
                "least": schedule.cost(kernel.steps, kernel.inside, copies=0).cycles,
                "bytes": kernel.bytes,
                "slots": cost.use,
                "vector_slots": schedule.capacity["VALU"],
                "regions": [{"kind": region.kind, "bundles": region.own, "visits": times} for region, times in visited],
            }
        )
    return result
