"""Fault injection: python -m tests.faults [--kills 50]. Every fault must cost steps at most, never a number."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.faults import damage, fuzz, processes, storage
from tests.faults.suite import CONTEXT, PRELOADED, Suite

FAULTS: dict[str, Callable[[Suite], None]] = {
    "kills": processes.kills,
    "kills_of_hymba": processes.kills_of_hymba,
    "preemption": processes.preemption,
    "second_interrupt": processes.second_interrupt,
    "kill_under_jobs": processes.kill_under_jobs,
    "table_twice": processes.table_twice,
    "run_twice": processes.run_twice,
    "lost_hosts": processes.lost_hosts,
    "damaged_checkpoints": storage.damaged_checkpoints,
    "full_disk": storage.full_disk,
    "full_disk_while_tokenising": storage.full_disk_while_tokenising,
    "unwritable": storage.unwritable,
    "slow_storage": storage.slow_storage,
    "vanished_data": storage.vanished_data,
    "vanished_workdir": storage.vanished_workdir,
    "few_open_files": storage.few_open_files,
    "bucket_outages": storage.bucket_outages,
    "damaged_runs": damage.damaged_runs,
    "damaged_caches": damage.damaged_caches,
    "bad_inputs": fuzz.bad_inputs,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description="inject faults into tiny runs and count those survived"
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="random SIGKILLs (50)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="of the moments (another each time)")
    parser.add_argument("--only", default=",".join(FAULTS), metavar="LIST", help=f"some of {','.join(FAULTS)} (all)")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children do too
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.pop("XLA_FLAGS", None)
    CONTEXT.set_forkserver_preload(PRELOADED)
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder), options.seed, options.kills)
        suite.undisturbed = suite.new()
        suite.finish(suite.undisturbed)
        suite.whole, again, began = suite.outcome(suite.undisturbed), suite.new(), time.monotonic()
        suite.finish(again)
        suite.seconds = time.monotonic() - began
        assert suite.same(again), "two undisturbed runs differ"
        for name in options.only.split(","):
            try:
                FAULTS[name](suite)
            except Exception:  # a fault that cannot be injected is told, and those after it are still tried
                traceback.print_exc(file=sys.stdout)
                suite.check(f"{name} ended early", False)
    print(f"faults injected {suite.injected}, survived {suite.survived}")
    return 0 if suite.injected == suite.survived else 1


if __name__ == "__main__":
    sys.exit(main())
