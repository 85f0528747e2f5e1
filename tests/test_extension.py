"""One new part of every kind, each in a file of a user's own folder, run from the command line without other changes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a command line in a folder whose `experiments` are the files of tests/own."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(HERE / "own", home / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    (home / "experiments" / "__init__.py").touch()  # otherwise the experiments of the repository would be found first

    def command(*words):
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(
            [sys.executable, "-m", "metajax", *words], cwd=home, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return home, done.stdout

    return command


def test_every_registry_takes_a_file_of_a_user(run):
    """The table trains with the user's own source, task, metadata position, mixer, position scheme, optimizer and objective."""
    home, _ = run("own")
    text, task = (json.loads(next(home.glob(f"runs/own/{row}/cpu/*/report.json")).read_text()) for row in ("text", "task"))
    assert text["steps"] == task["steps"] == 2
    assert text["eval"]["right"]["metadata_tokens"] > text["eval"]["none"]["metadata_tokens"] == 0
    assert task["eval"]["tasks"]["first_word"]["96"]["chance"] == 1 / 16
    assert text["flops_per_token"]["shift"] > 0
    lines = next(home.glob("runs/own/text/cpu/*/metrics.jsonl")).read_text().splitlines()
    assert all(line["loss"] == pytest.approx(2 * line["nll"], rel=1e-6) for line in map(json.loads, lines))

    run("generate", "own/text", "--prompt", "1 2", "--tokens", "2")
    run("analyze", "own/text", "--what", "letters", "--examples", "3", "--length", "8")
    (found,) = home.glob("runs/own/text/cpu/*/analysis/letters.json")
    assert 1 < json.loads(found.read_text())["result"]["distinct"] <= 24


def test_an_own_verb(run):
    assert run("hello")[1] == "hello\n"
