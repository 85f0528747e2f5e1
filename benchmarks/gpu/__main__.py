"""`python -m benchmarks.gpu`: metajax beside PyTorch on the NVIDIA GPU that is here, as docs/gpu.json and the tables of docs/gpu.md.

Results are written after every case. What fails is recorded with its error while the others go on, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from benchmarks.gpu import attention, report, scan, step
from benchmarks.gpu.clock import Case
from metajax import registry

EXAMPLES = """examples:
  python -m benchmarks.gpu                                 everything, on the GPU that JAX finds; some four minutes
  python -m benchmarks.gpu --only step                     one part; the others' results stay in the files
  python -m benchmarks.gpu --tiny --output /tmp/tiny       every line of it at tiny sizes, on a CPU too; the times mean nothing
"""
REMEDY = "pip install -r requirements-gpu.txt where there is one; `--tiny --output DIR` runs at tiny sizes anywhere"
INSTALL = "PyTorch is not installed, so that ours is measured alone; on the GPU's machine: pip install torch"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(report.SECTIONS), default=list(report.SECTIONS), help="parts to measure"
    )
    parser.add_argument("--output", type=Path, default=None, metavar="DIR", help="where gpu.json and gpu.md go (docs)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it all runs; needs --output")
    options = parser.parse_args(arguments)
    if options.tiny and options.output is None:
        parser.error("--tiny needs --output: its times have no place in docs")
    device = jax.devices()[0]
    if device.platform == "cpu" and not options.tiny:
        print(f"JAX finds no GPU: {REMEDY}", file=sys.stderr)
        return 2
    output = options.output or Path("docs")
    output.mkdir(parents=True, exist_ok=True)
    has_torch = importlib.util.find_spec("torch") is not None
    if not has_torch:
        print(INSTALL)
    registry.load()
    report.start(output / "gpu.json", place(device, has_torch), options.only)
    began, bad = time.monotonic(), 0
    for case in cases(options.only, options.tiny, has_torch):
        found = report.add(output / "gpu.json", case)
        report.write_page(output / "gpu.md", found)
        bad += len(report.failures(case.as_json()))
        print(f"[{time.monotonic() - began:.0f} s] {case.section}, {case.name}", flush=True)
        for name, side in case.found.items():
            print(f"    {side.get('median_ms', float('nan')):10.3f} ms  {name}", flush=True)
    print(f"written to {output}/gpu.json and {output}/gpu.md" + (f"; {bad} failed" if bad else ""))
    return 1 if bad else 0


def cases(only: list[str], tiny: bool, has_torch: bool) -> Iterator[Case]:
    """All cases of these sections. An error between cases ends its section as a failed case; the other sections continue."""
    for section in only:
        broken, measured = Case(section, "between the cases"), measure(section, tiny, has_torch)
        while case := broken.attempt("bench", lambda measured=measured: next(measured, None)):
            yield case
        if broken.found:
            yield broken


def measure(section: str, tiny: bool, has_torch: bool) -> Iterator[Case]:
    rivals = {"attention": "rivals", "step": "torch_lm"}
    torch_side = importlib.import_module(f"benchmarks.gpu.{rivals[section]}") if has_torch and section in rivals else None
    if section == "attention":
        yield from attention.measure(tiny, torch_side)
    elif section == "step":
        yield from step.measure(tiny, torch_side)
    else:
        yield from scan.measure(tiny)


def place(device: jax.Device, has_torch: bool) -> dict[str, str]:
    """The device and the versions that the numbers depend on."""
    found = {"device": device.device_kind, "Python": platform.python_version()}
    for name in ("jax", "jaxlib", "nvidia-cudnn-cu13", *(("torch", "triton") if has_torch else ())):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
