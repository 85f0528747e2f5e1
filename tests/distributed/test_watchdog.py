"""The watchdog: its time limits, and when it reports that another start would not help."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEGINS = """
import sys, threading, time
from pathlib import Path
from metajax.distributed.watchdog import Watchdog
"""


def watched(script, stacks):
    """Run a process that the watchdog ends, or that ends with 0."""
    return subprocess.run(
        [sys.executable, "-c", BEGINS + script, str(stacks)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.fault(32)
def test_a_long_start_and_a_long_evaluation_are_no_hang(tmp_path):
    done = watched(
        """
dog = Watchdog(0.2, Path(sys.argv[1]), startup=60)
time.sleep(0.6)  # compiling
dog.begin_steps()
with dog.patient():
    time.sleep(0.6)
dog.beat()
dog.close()
""",
        tmp_path / "stacks.txt",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.fault(32)
@pytest.mark.parametrize(("hang", "startup", "field"), [(0, 0.2, "startup_seconds"), (60, 0.2, "startup_seconds")])
def test_a_start_that_hangs_has_its_own_limit(tmp_path, hang, startup, field):
    done = watched(f"Watchdog({hang}, Path(sys.argv[1]), {startup}); time.sleep(60)", tmp_path / "stacks.txt")
    assert done.returncode == 75 and f"runtime.{field}" in done.stderr and (tmp_path / "stacks.txt").exists()


def test_without_limits_nothing_is_watched(tmp_path):
    assert watched("Watchdog(0, Path(sys.argv[1]), 0); time.sleep(0.3)", tmp_path / "stacks.txt").returncode == 0


HANGS = """
dog = Watchdog(0.2, Path(sys.argv[1]), startup=60)
dog.saved = SAVED
dog.begin_steps()
time.sleep(60)
"""


@pytest.mark.fault(32)
def test_the_third_start_in_a_row_without_a_new_save_ends_as_an_error(tmp_path):
    stacks = tmp_path / "not" / "there" / "stacks.txt"  # as on a host that does not write the run's folder
    codes = [watched(HANGS.replace("SAVED", str(saved)), stacks).returncode for saved in (50, 50, 100, 100)]
    assert codes == [75, 75, 75, 75], "a new save starts the count again"
    last = watched(HANGS.replace("SAVED", "100"), stacks)
    assert last.returncode == 2 and "3 starts in a row" in last.stderr
    assert json.loads((stacks.parent / ".stacks.json").read_text()) == {"saved": 100, "starts": 3}


@pytest.mark.fault(32)
def test_a_damaged_count_and_a_folder_that_cannot_be_written_end_it_too(tmp_path):
    (tmp_path / ".stacks.json").write_text("{")
    assert watched(HANGS.replace("SAVED", "0"), tmp_path / "stacks.txt").returncode == 75
    (tmp_path / "file").write_text("")
    assert watched(HANGS.replace("SAVED", "0"), tmp_path / "file" / "stacks.txt").returncode == 75
