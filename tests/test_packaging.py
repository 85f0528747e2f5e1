"""The wheel: the command, its experiments together with a user's, and nothing else of the repository."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MINE = """
from metajax.registry import Column, Row, base, table

rows = [Row("few", {"meta_tokens.rate": 0.05}), Row("many", {"meta_tokens.rate": 0.2})]
columns = [Column("bits/byte", "eval.none.bpb")]
table("mine", summary="a table of my own", rows=rows, columns=columns, baseline="few", minutes={"cpu": 2})(base("quickstart"))
"""
README = (REPOSITORY / "README.md").read_text().partition("```python\n")[2].partition("```")[0]  # an experiment of a user's own


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):  # a copy, so that the build leaves no files here
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    (source / "experiments" / "an_own_one.py").write_text(README)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert "absent from the `packages`" not in done.stdout + done.stderr, "setuptools takes a folder of data for a package"
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_their_templates(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "metajax",
        "kernels_pallas",
        "metajax_experiments",
        wheel.name[: wheel.name.index("-py")] + ".dist-info",
    }
    tracked = subprocess.run(
        ["git", "ls-files", "metajax", "experiments"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    wanted = {
        name.replace("experiments/", "metajax_experiments/", name.startswith("experiments/")) for name in tracked.stdout.split()
    }
    assert wanted <= set(names)


@pytest.mark.slow
def test_the_command_beside_experiments_of_a_users_own(wheel, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)],
        check=True,
        timeout=300,
    )
    (tmp_path / "work" / "experiments").mkdir(parents=True)
    (tmp_path / "work" / "experiments" / "mine.py").write_text(MINE)
    (tmp_path / "work" / "experiments" / "broken.py").write_text("rows = [\n")

    def call(*words):
        command = [sys.executable, str(tmp_path / "site" / "bin" / "metajax"), *words]
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "200"}
        return subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, timeout=300)

    listed = call("list")
    assert listed.returncode == 0, listed.stderr
    assert listed.stderr.splitlines() == ["warning: left out experiments/broken.py, line 1: SyntaxError: '[' was never closed"]
    for name in ("mine", "rates", "quickstart", "hymba/components", "learned_meta_tokens/main_tasks"):
        assert f"\n{name}  (" in "\n" + listed.stdout, name
    assert "run: metajax NAME" in listed.stdout
    shown = call("show", "mine/many")
    assert shown.returncode == 0 and "0.2" in shown.stdout, shown.stderr
    wrong = call("show", "mine/mani")
    assert wrong.returncode == 2 and "did you mean 'mine/many'" in wrong.stderr
