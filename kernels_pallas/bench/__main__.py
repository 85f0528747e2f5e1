"""`python -m kernels_pallas.bench`: writes the cost of every kernel and its alternatives to docs/kernels.md and docs/kernels.png.

With a TPU or GPU it measures wall-clock time. Otherwise it uses the TPU compiler's schedules (libtpu), which need no chip.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from kernels_pallas.bench import attention, clock, compiled, report, scan
from kernels_pallas.bench.programs import Program

EXAMPLES = """examples:
  python -m kernels_pallas.bench                             the whole table, for one v5e (or the clock of the chip that is here)
  python -m kernels_pallas.bench --only 'selective_scan/*'   some programs; nothing is written
  python -m kernels_pallas.bench --list                      their names
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="kernels_pallas.bench", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", default="v5e", choices=list(compiled.CHIPS), help="the TPU that is compiled for (v5e)")
    parser.add_argument("--only", default=None, metavar="PATTERN", help="programs whose name matches, as in 'attention/*/both'")
    parser.add_argument("--list", action="store_true", help="names of the programs")
    parser.add_argument(
        "--output", type=Path, default=Path("docs"), metavar="DIR", help="where kernels.md and kernels.png go (docs)"
    )
    parser.add_argument("--compile", default=None, metavar="NAME", help=argparse.SUPPRESS)  # the child of `compiled.spawn`
    parser.add_argument("--dump", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    if options.compile is not None:
        print(json.dumps(compiled.measure(_named(options.compile), options.chip, options.dump)))
        return 0
    programs = _programs()
    if options.list:
        print("\n".join(programs))
        return 0
    chosen = [p for p in programs.values() if fnmatch.fnmatch(p.name, options.only or "*")]
    if not chosen:
        print(f"no program matches {options.only!r}; --list shows all", file=sys.stderr)
        return 2
    device = jax.devices()[0]
    if device.platform == "cpu":
        results = _each(chosen, lambda p: compiled.spawn(p, options.chip), workers=2)
        section, text = "schedule", report.schedule_section(chosen, results, options.chip)
    else:
        chosen = [p for p in chosen if clock.runs_here(p)]
        results = _each(chosen, clock.measure, workers=1)
        section, text = "clock", report.clock_section(chosen, results, device.device_kind)
    print(text)
    if options.only is None:
        report.replace_section(options.output / "kernels.md", section, text)
        if section == "schedule":
            report.plot(chosen, results, options.chip, options.output / "kernels.png")
        print(f"written to {options.output}/kernels.md")
    return 0


def _programs() -> dict[str, Program]:
    return {program.name: program for program in (*attention.programs(), *scan.programs())}


def _named(name: str) -> Program:
    """A program of the table by name, or our kernels at a shape given by its fields in JSON."""
    op, shape, _, passes = name.split("/")
    if not shape.startswith("["):
        return _programs()[name]
    module = scan if op in ("selective_scan", "causal_conv") else attention
    return module.ours(op, shape, module.Shape(*json.loads(shape)), passes)


def _each(programs: Sequence[Program], measure: Callable[[Program], dict], workers: int) -> dict[str, dict]:
    """Results by name; prints a line with the elapsed seconds for each."""
    results: dict[str, dict] = {}
    began = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        for program, result in zip(programs, pool.map(measure, programs), strict=True):
            results[program.name] = result
            print(f"[{len(results)}/{len(programs)}] {program.name}  {time.monotonic() - began:.0f} s", flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
