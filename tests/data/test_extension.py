"""A source, a synthetic task and a position of metadata of one's own, each in one file of `experiments/`, run from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = '''
"""Sentences that count."""

import hashlib
from collections import Counter

from metajax.data.documents import Document, Source
from metajax.data.sources import source


@source("counting")
class Counting(Source):
    def __init__(self, request):
        self.spec, self.count, self.tally = request.spec, int(request.path), Counter()

    def __len__(self):
        return self.count

    def read(self, records):
        for n in records:
            yield Document(" ".join(map(str, range(n, n + 12))), {"parity": "odd" if n % 2 else "even"}, str(n))

    def fingerprint(self):
        return hashlib.sha256(str(self.count).encode()).hexdigest()
'''
TASK = '''
"""Which word came first?"""

from metajax.data.tasks import task
from metajax.data.tasks.prompts import Example, PromptTask, TEXT_HEAD, WORDS


@task("first_word")
class FirstWord(PromptTask):
    @staticmethod
    def chance(sizes):
        return 1 / len(WORDS)

    def write(self, rng, room):
        question = ("\\nQ: first word? A:",)
        words = tuple(self.pick(rng, WORDS, 3))
        cost = self.costs(TEXT_HEAD, *question) + 4 * self.costliest["word"]
        return None if room < cost else Example(((TEXT_HEAD, *words),), question, words[:1])
'''
POSITION = '''
"""Metadata in the middle of every piece."""

from metajax.data.positions import Spot, own_template, position


def middle(length):
    return length // 2


@position("middle")
def in_the_middle(recipe):
    return (Spot(own_template(recipe), middle, 0.5),)
'''
EXPERIMENTS = '''
from metajax.config import Config, Data, Evaluation, Metadata, Model, Optimizer, Tasks, Training
from metajax.registry import experiment


def config(**parts):
    return Config(
        name="own",
        data=Data(sources=("counting:60",), tokenizer="byte", row_length=96, batch_rows=2, held_out=0.2),
        model=Model(layers=1, width=16, heads=2, mlp_width=16),
        optimizer=Optimizer(warmup_steps=1),
        training=Training(steps=2),
        **parts,
    )


@experiment("own/text", summary="", minutes={"cpu": 1})
def text(scale):
    return config(metadata=Metadata(template="{parity}", position="middle", keep=1.0), evaluation=Evaluation(documents=4, conditions=("right", "none")))


@experiment("own/task", summary="", minutes={"cpu": 1})
def of_task(scale):
    tasks = Tasks(names=("first_word",), train_length=96, eval_lengths=(96,), eval_examples=4)
    return config(tasks=tasks, evaluation=Evaluation(documents=0, sample_tokens=0))
'''


@pytest.fixture(scope="module")
def metajax(tmp_path_factory):
    """metajax(*arguments) -> (exit code, stdout and stderr) beside a folder of experiments of one's own."""
    home = tmp_path_factory.mktemp("own")
    (home / "experiments").mkdir()
    (home / "experiments" / "__init__.py").touch()  # or the repository's own would be found first
    for name, text in {"a_source": SOURCE, "a_task": TASK, "a_position": POSITION, "runs": EXPERIMENTS}.items():
        (home / "experiments" / f"{name}.py").write_text(text)

    def call(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "metajax", *arguments], cwd=home, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return call, home


def report(home, name):
    [path] = home.glob(f"runs/{name}/cpu/*/report.json")
    return json.loads(path.read_text())


def test_a_run_on_a_source_and_a_position_of_ones_own(metajax):
    call, home = metajax
    code, said = call("own/text")
    assert code == 0, said
    made = report(home, "own/text")
    assert made["steps"] == 2 and made["eval"]["right"]["metadata_tokens"] > made["eval"]["none"]["metadata_tokens"] == 0
    code, said = call("show", "counting:10")
    assert code == 0 and "parity" in said


def test_a_run_on_a_task_of_ones_own(metajax):
    call, home = metajax
    code, said = call("own/task")
    assert code == 0, said
    assert report(home, "own/task")["eval"]["tasks"]["first_word"]["96"]["chance"] == 1 / 16


def test_a_name_that_does_not_exist_is_one_line_with_the_nearest(metajax):
    call, _ = metajax
    for change, nearest in {
        "tasks.names=first_wrod": "first_word", "metadata.position=midle": "middle", "data.sources=countin:3": "counting",
    }.items():  # fmt: skip
        name = "own/task" if change.startswith("tasks") else "own/text"
        code, said = call(name, "--set", change)
        assert code == 2 and f"did you mean '{nearest}'" in said.splitlines()[-1], said
