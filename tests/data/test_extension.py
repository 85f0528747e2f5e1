"""A user's source, synthetic task and position of metadata, each in one file of `experiments/`, run from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metajax.core.errors import UserError
from metajax.data.pipeline import open_corpora
from metajax.data.sources import source

ROOT = Path(__file__).parents[2]
SOURCE = '''
"""Sentences that count."""

import hashlib

from metajax.data.documents import Document, Source
from metajax.data.sources import source


@source("counting")
class Counting(Source):
    def __init__(self, request):
        self.spec, self.count = request.spec, int(request.path)

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
EXPERIMENTS = """
from metajax.config import Config, Data, Evaluation, Metadata, Model, Optimizer, Tasks, Training
from metajax.registry import Column, Row, table

rows = [
    Row("text", {"metadata": Metadata(template="{parity}", position="middle", keep=1.0), "evaluation.conditions": ("right", "none")}),
    Row("task", {
        "tasks": Tasks(names=("first_word",), train_length=96, eval_lengths=(96,), eval_examples=4), "evaluation.documents": 0,
    }),
]
columns = [Column("bits/byte", "eval.none.bpb")]


@table("own", summary="", rows=rows, columns=columns, baseline=None, minutes={"cpu": 1})
def own(scale):
    return Config(
        name="own",
        data=Data(sources=("counting:60",), tokenizer="byte", sequence_length=96, batch_size=2, validation_share=0.2),
        model=Model(layers=1, width=16, heads=2, mlp_width=16),
        optimizer=Optimizer(warmup_steps=1),
        training=Training(steps=2),
        evaluation=Evaluation(documents=4, sample_tokens=0),
    )
"""


def test_a_table_on_ones_own(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").touch()  # or the repository's own would be found first
    for name, text in {"a_source": SOURCE, "a_task": TASK, "a_position": POSITION, "runs": EXPERIMENTS}.items():
        (tmp_path / "experiments" / f"{name}.py").write_text(text)
    command, environment = [sys.executable, "-m", "metajax", "own"], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    text, task = (json.loads(next(tmp_path.glob(f"runs/own/{row}/cpu/*/report.json")).read_text()) for row in ("text", "task"))
    assert text["steps"] == task["steps"] == 2
    assert text["eval"]["right"]["metadata_tokens"] > text["eval"]["none"]["metadata_tokens"] == 0
    assert task["eval"]["tasks"]["first_word"]["96"]["chance"] == 1 / 16


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        ({"tasks.names": "copyin", "tasks.train_length": 32}, "copying"),
        ({"metadata.position": "prepned"}, "prepend"),
        ({"data.sources": "jsonll:a"}, "jsonl"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(changes, nearest, tiny_config, paths):
    with pytest.raises(UserError, match=f"did you mean '{nearest}'"):
        open_corpora(tiny_config(**changes), paths)


def test_a_name_belongs_to_one_module():
    with pytest.raises(UserError, match="registered twice"):
        source("jsonl")(open_corpora)
