"""Compiles prefix-and-window attention, forward and backward, for an absent TPU chip, and prints the contents of the program.

Run in a separate process, because its settings only work before JAX starts: `compile_attention.py CHIP SHAPE ...` prints one
line of JSON for each shape: kernels' names in the optimised HLO and bytes of temporary memory.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
from jax.experimental import topologies

from metajax.models import ops
from metajax.models.masks import Mask

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}


class Shape(NamedTuple):
    rows: int
    length: int
    heads: tuple[int, int]  # queries, keys
    widths: tuple[int, int]  # of queries and keys, of values
    window: int | None = None
    metas: int = 0
    dtype: str = "bfloat16"
    meta_positions: int | None = None  # meta-tokens of a row: `ops.meta_attention` among them alone
    traced_offset: bool = False


SHAPES = {
    "small": Shape(1, 512, (4, 2), (64, 128), 256, 128),
    "hymba_1.5b": Shape(1, 8192, (25, 5), (64, 128), 1024, 128),
    "hymba_1.5b_full": Shape(1, 8192, (25, 5), (64, 128), None, 128),
    "ablation_300m": Shape(8, 1024, (16, 4), (64, 128), 256, 128),
    "gpt2_1024": Shape(4, 1024, (12, 12), (64, 64)),
    "gpt2_8192": Shape(1, 8192, (12, 12), (64, 64)),
    "meta_tokens": Shape(4, 4096, (12, 12), (64, 64), meta_positions=409),
    "odd_float32": Shape(2, 700, (6, 2), (40, 24), 100, 5, "float32"),
    "chunk": Shape(1, 1024, (8, 8), (128, 128), 500, traced_offset=True),
}


def compile_for(chip: str, name: str) -> dict:
    shape = SHAPES[name]
    (device,) = topologies.get_topology_desc(CHIPS[chip], "tpu", chips_per_host_bounds=(1, 1, 1)).devices[:1]
    on_chip = jax.sharding.SingleDeviceSharding(device)

    def array(*sizes: int, dtype: str = shape.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=on_chip)

    length = shape.meta_positions or shape.length
    (heads, kv_heads), (width, values) = shape.heads, shape.widths
    arrays = {"q": array(shape.rows, length, heads, width), "k": array(shape.rows, length, kv_heads, width)}
    arrays |= {"v": array(shape.rows, length, kv_heads, values)}
    if shape.metas:
        arrays |= {"prefix_k": array(shape.metas, kv_heads, width), "prefix_v": array(shape.metas, kv_heads, values)}
    ids = array(shape.rows, shape.length, dtype="int32")
    meta_positions, offset = array(shape.rows, length, dtype="int32"), array(dtype="int32")

    def forward(arrays, ids, meta_positions, offset):
        if shape.meta_positions:
            return ops.meta_attention(**arrays, meta_positions=meta_positions, segment_ids=ids)
        options = {"q_offset": offset} if shape.traced_offset else {}
        return ops.attention(**arrays, mask=Mask(window=shape.window), segment_ids=ids, **options)

    def both_passes(arrays, *data):
        outputs, pull = jax.vjp(lambda arrays: forward(arrays, *data), arrays)
        return outputs, pull(outputs)

    one, both = (jax.jit(f).lower(arrays, ids, meta_positions, offset).compile() for f in (forward, both_passes))
    return {
        "shape": name,
        "forward": kernels(one),
        "both": kernels(both),
        "temporary_bytes": both.memory_analysis().temp_size_in_bytes,
        "scores_bytes": shape.rows * heads * length**2 * 4,
    }


def kernels(compiled: jax.stages.Compiled) -> list[str]:
    calls = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    names = re.compile(r"prefix_window_attention_(forward|backward(?:_kv|_q)?)")
    return sorted({name for line in calls for name in names.findall(line)})


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(json.dumps(compile_for(sys.argv[1], name)), flush=True)
