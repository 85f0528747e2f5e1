"""The train steps that docs/performance.md lists, compiled for slices that are absent; prints its table.

    python -m benchmarks.plans [--only gpt2-152m,...]

Nothing is measured: the figures are the TPU compiler's (see docs/plan.md). A program takes 3 to 20 minutes to compile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

LLAMA = {
    "model.layers": 16,
    "model.width": 2048,
    "model.heads": 32,
    "model.kv_heads": 8,
    "model.mlp_width": 8192,
    "model.rope_theta": 5e5,
    "data.sequence_length": 4096,
}
# name -> (experiment, topology, vocabulary, changes)
PLANS: dict[str, tuple[str, str, int | None, dict[str, Any]]] = {
    "gpt2-152m": ("learned_meta_tokens/pretrain/plain_rope", "v5e:4x4", None, {}),
    "gpt2-152m-meta": ("learned_meta_tokens/pretrain/meta_rope", "v5e:4x4", None, {}),
    "llama-1.6b": ("metadata/meco_main/standard", "v5e:4x4", 131_072, {**LLAMA, "data.batch_size": 16}),
    "llama-1.6b-64-rows": ("metadata/meco_main/standard", "v5e:4x4", 131_072, {**LLAMA, "data.batch_size": 64}),
    "llama-8b": ("metadata/meco_sizes/standard_8b", "v5p:4x4x4", 128_256, {}),
    "hymba-1.5b": ("hymba/1.5b", "v5p:2x2x2", 32_001, {}),
    "llama-1.6b-1m": (
        "metadata/meco_main/standard",
        "v5p:4x4x8",
        131_072,
        {**LLAMA, "data.batch_size": 1, "data.sequence_length": 1 << 20},
    ),
}
GIB = 2**30


def words_of(name: str) -> list[str]:
    """The command of one plan, after `python`."""
    experiment, topology, vocabulary, changes = PLANS[name]
    words = ["run.py", "plan", experiment, "--scale", "paper", "--topology", topology]
    words += ["--vocabulary", str(vocabulary)] if vocabulary else []
    return words + [word for field, value in changes.items() for word in ("--set", f"{field}={value}")]


def row_of(name: str, plan: dict[str, Any]) -> list[str]:
    """The cells of one program."""
    _, topology, _, _ = PLANS[name]
    if not plan["fits"]:
        return [name, topology, "does not fit", *[""] * 7]
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
    memory, bound = plan["memory"], plan["bound"]
    links = sum(kind["bytes"] for kind in plan["collectives"].values())
    return [
        name,
        f"{topology}, {mesh}",
        f"{memory['temporaries'] / GIB:.2f}",
        f"{memory['total'] / GIB:.2f} of {memory['limit'] / GIB:g}",
        f"{plan['xla_cycles'] / 1e6:,.0f}",
        f"{plan['products'] * plan['chips'] / plan['flops']:.2f}",
        f"{plan['hbm_bytes'] / 1e9:,.1f}",
        f"{links / 1e9:,.2f}",
        f"{1e3 * bound['step']:,.1f}",
        f"{bound['mfu']:.0%}",
    ]


TITLES = ("step", "slice", "temporaries, GiB", "total, GiB", "XLA Mcycles", "products / FLOPs")
TITLES += ("HBM, GB", "links, GB", "at least, ms", "MFU, at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PLANS), help="some of the steps, by name")
    names = parser.parse_args().only.split(",")
    print("| " + " | ".join(TITLES) + " |\n|" + "---|" * len(TITLES))
    for name in names:
        words = words_of(name)
        print(f"python {' '.join(words)}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, *words, "--json"], capture_output=True, text=True)
        if done.returncode not in (0, 1) or not done.stdout:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        print("| " + " | ".join(row_of(name, json.loads(done.stdout))) + " |", flush=True)


if __name__ == "__main__":
    main()
