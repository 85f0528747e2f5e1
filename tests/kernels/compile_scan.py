"""Compiles the selective scan and the convolution, forward and backward, for an absent TPU chip; prints the program's contents.

Run in a separate process, because its settings only work before JAX starts: `compile_scan.py CHIP SHAPE ...` prints one
line of JSON for each shape: kernels' names in the optimised HLO and bytes of temporary memory.
"""

import json
import os
import re
import sys
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from kernels_pallas.selective_scan.conv import causal_conv_tpu
from kernels_pallas.selective_scan.tpu import selective_scan_tpu

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
# rows, length, channels, states, dtype of the tokens, gate, segments
SHAPES = {
    "small": (1, 256, 640, 16, "bfloat16", True, True),
    "hymba_1.5b": (1, 8192, 3200, 16, "bfloat16", True, True),
    "ablation_300m": (2, 8192, 2048, 16, "bfloat16", True, True),
    "odd_float32": (2, 700, 200, 5, "float32", False, False),
    "short_float32": (2, 40, 130, 9, "float32", True, True),
}


def compile_for(chip: str, shape: str) -> dict:
    rows, length, channels, states, dtype, gated, packed = SHAPES[shape]
    (device,) = topologies.get_topology_desc(CHIPS[chip], "tpu", chips_per_host_bounds=(1, 1, 1)).devices[:1]
    on_chip = jax.sharding.SingleDeviceSharding(device)

    def array(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=on_chip)

    token = array(rows, length, channels, dtype=dtype)
    per_state = array(rows, length, states, dtype=dtype)
    arrays = {"u": token, "dt": token, "A": array(channels, states), "B": per_state, "C": per_state}
    arrays |= {"D": array(channels), "dt_bias": array(channels), "initial_state": array(rows, channels, states)}
    arrays |= {"z": token} if gated else {}
    arrays |= {"reset_state": array(channels, states)} if packed else {}
    segments = array(rows, length, dtype="int32") if packed else None

    def forward(arrays, segments):
        return selective_scan_tpu(**arrays, segment_ids=segments)

    def both_passes(arrays, segments):
        outputs, pull = jax.vjp(lambda arrays: forward(arrays, segments), arrays)
        return outputs, pull(jax.tree.map(jnp.ones_like, outputs))

    def convolution(arrays, segments):
        x, w, b = arrays["u"], arrays["A"][:, :4], arrays["D"]
        outputs, pull = jax.vjp(lambda x, w, b: causal_conv_tpu(x, w, b, segment_ids=segments), x, w, b)
        return outputs, pull(jax.tree.map(jnp.ones_like, outputs))

    one, both, conv = (jax.jit(f).lower(arrays, segments).compile() for f in (forward, both_passes, convolution))
    return {
        "shape": shape,
        "forward": kernels(one),
        "both": kernels(both),
        "convolution": kernels(conv),
        "temporary_bytes": both.memory_analysis().temp_size_in_bytes,
        "all_states_bytes": rows * length * channels * states * 4,
    }


def kernels(compiled: jax.stages.Compiled) -> list[str]:
    calls = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return sorted({name for line in calls for name in re.findall(r"(?:selective_scan|causal_conv)_(?:forward|backward)", line)})


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(json.dumps(compile_for(sys.argv[1], name)), flush=True)
