"""Accuracy on the tasks: one forward pass compared with greedy decoding, the definition of a right answer, and a whole run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax.config import MetaTokens, Tasks
from metajax.core.errors import UserError
from metajax.core.fields import override
from metajax.data.pipeline import open_corpora, task_examples
from metajax.evaluation.tasks import evaluate_tasks, impossible, mean_exact, summarise, task_batches
from metajax.experiment import run_experiment
from metajax.reporting.html import write_run_report
from metajax.runs.files import read_lines, write_json
from metajax.training.losses import apply_model
from metajax.training.program import Program, abstract_model

TASKS = Tasks(names=("list_recall", "copying"), train_length=48, eval_lengths=(32, 64), eval_examples=30, span=3)
RUN = {
    "tasks": TASKS,
    "data.tokenizer": "bpe:512+tasks",
    "data.sequence_length": 64,
    "training.steps": 4,
    "evaluation.documents": 0,
}


def prepare(config, paths):
    corpora = open_corpora(config, paths)
    program = Program.build(config, corpora.tokenizer.vocabulary.size, jax.devices()[:1])
    return corpora, program


def oracle(model, batch):
    """A model that finds the targets, except for the end of every third row."""
    targets = batch["targets"]
    rows = jnp.arange(targets.shape[0])[:, None]
    ends = (batch["loss_weights"] > 0) & ~batch["is_body"]
    return jnp.where(ends & (rows % 3 == 0), 0, targets) == targets


def first_token(model, batch):
    """A model that finds the first answer token alone."""
    first = batch["is_body"] & ~jnp.roll(batch["is_body"], 1, axis=1)
    return jnp.where(first, batch["targets"], 0) == batch["targets"]


def test_exact_match_needs_the_whole_answer_and_its_end(tiny_config, paths):
    corpora, program = prepare(tiny_config(**RUN, **{"data.batch_size": 3}), paths)
    results = evaluate_tasks(program, corpora, None, oracle)
    assert results.keys() == set(TASKS.names) and all(bins.keys() == {"32", "64"} for bins in results.values())
    for length, rows in (("32", 6), ("64", 3)):  # of a batch: its every third row misses the end
        right = sum(1 for n in range(30) if n % rows % 3)
        for bins in results.values():
            assert bins[length]["token"] == 1 and bins[length]["exact"] == right / 30 and bins[length]["n"] == 30
    results = evaluate_tasks(program, corpora, None, first_token)
    spans = [task_examples(corpora).test("copying", 64, n).answers.sum() for n in range(30)]
    assert results["copying"]["64"]["token"] == pytest.approx(30 / sum(spans)) and results["copying"]["64"]["tokens"] == sum(
        spans
    )
    assert results["copying"]["64"]["exact"] == 0 and results["list_recall"]["64"]["token"] == 1


def test_one_forward_pass_equals_greedy_decoding(tiny_config, paths):
    """Teacher forcing marks exactly those rows as right that greedy decoding answers right."""
    config = tiny_config(
        **RUN | {"tasks.names": "copying", "tasks.eval_examples": 12}, **{"meta_tokens": MetaTokens(), "data.batch_size": 6}
    )
    corpora, program = prepare(config, paths)
    model = program.create_state().model
    batch = task_batches(corpora, "copying", 64, 1)[0]
    rng = np.random.default_rng(0)
    agree = {True: 0, False: 0}

    @jax.jit
    def apply(model, batch):
        """The model, pulled towards the right answers at random positions, so that some rows are right and some are not."""
        logits = apply_model(model, {k: v for k, v in batch.items() if k != "pull"})
        return logits + jax.nn.one_hot(batch["targets"], 512) * batch["pull"][..., None]

    pull = jnp.asarray(1e3 * (rng.random(batch["tokens"].shape) < 0.7), jnp.float32)
    inputs = {k: jnp.asarray(v) for k, v in batch.items()} | {"pull": pull}
    forced = np.asarray(jnp.argmax(apply(model, inputs), -1) == inputs["targets"]) | (batch["loss_weights"] == 0)
    for row in range(6):
        positions = np.flatnonzero(batch["loss_weights"][row])
        tokens = batch["tokens"].copy()
        tokens[row, positions[0] + 1 :] = corpora.tokenizer.vocabulary.pad
        decoded = []
        for position in positions:
            decoded.append(int(jnp.argmax(apply(model, inputs | {"tokens": jnp.asarray(tokens)})[row, position])))
            if position != positions[-1]:
                tokens[row, position + 1] = decoded[-1]
        right = decoded == batch["targets"][row, positions].tolist()
        assert right == forced[row].all()
        agree[right] += 1
    assert all(agree.values()), "rows of both kinds were compared"


def test_wilson_intervals_count_examples():
    sums = {"examples": 1000, "exact": 250, "tokens": 3000, "right_tokens": 1500}
    found = summarise(sums)
    assert (found["exact"], found["token"], found["n"], found["tokens"]) == (0.25, 0.5, 1000, 3000)
    z, n, p = 1.959964, 1000, 0.25
    middle, half = (p + z**2 / 2 / n) / (1 + z**2 / n), z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
    assert (found["exact_low"], found["exact_high"]) == pytest.approx((middle - half, middle + half), rel=1e-6)
    assert found["token_high"] - 0.5 == pytest.approx(0.5 - found["token_low"]) == pytest.approx(0.0309, rel=1e-2)
    assert summarise(sums | {"exact": 0})["exact_high"] < 0.005


def test_bins_beyond_a_learned_position_table_are_named(tiny_config, paths):
    learned = tiny_config(**RUN | {"model.position": "learned", "tasks.eval_lengths": (64, 96)})
    corpora, program = prepare(learned, paths)
    results = evaluate_tasks(program, corpora, None, oracle)
    assert results["copying"]["96"]["exact"] is None and "raise model.max_positions" in results["copying"]["96"]["reason"]
    assert mean_exact(results) == np.mean([results[task]["64"]["exact"] for task in TASKS.names])
    longer = override(learned, {"model.max_positions": 96})
    assert impossible(longer, 96) is impossible(tiny_config(**RUN), 1000) is None
    assert abstract_model(longer, 512).positions.shape == (96, 16)


def test_a_run_on_tasks_from_start_to_finish(tiny_config, paths, tmp_path):
    """Pre-training on text, then tasks from its parameters, with evaluations on the way; report and pages."""
    before = tiny_config(
        **{"data.tokenizer": "bpe:512+tasks", "data.sequence_length": 64, "training.steps": 2}, meta_tokens=MetaTokens()
    )
    run_experiment(before, tmp_path / "before", paths)
    changes = {
        "init.from": str(tmp_path / "before"),
        "evaluation.every": 2,
        "tasks.eval_lengths": (32,),
        "evaluation.documents": 5,
    }
    config = override(before, RUN | changes)
    report = run_experiment(config, tmp_path / "tasks", paths)
    assert report["parent"] == str(tmp_path / "before")
    saved = json.loads((tmp_path / "tasks" / "report.json").read_text())
    assert saved["eval"].keys() == {"tasks", "none"} and saved["eval"]["tasks"]["copying"]["32"]["n"] == 30
    lines = read_lines(tmp_path / "tasks" / "metrics.jsonl")
    assert [line["step"] for line in lines if "exact/copying/32" in line] == [2]
    assert not any("bpb" in line for line in lines)
    assert 0 < report["counts"]["meta_tokens"] < 4 * 4 * 64 // 8 and report["counts"]["body"] < report["counts"]["loss_tokens"]
    page = (tmp_path / "tasks" / "report.html").read_text()
    assert "Accuracy on the tasks" in page and "list recall" in page and "Validation bits per byte" in page
    del saved["eval"]["none"]
    write_json(tmp_path / "tasks" / "report.json", saved)
    assert "Validation bits per byte" not in write_run_report(tmp_path / "tasks").read_text()
    with pytest.raises(UserError, match=r"its tokenizer .* is not this run's"):
        run_experiment(override(config, {"data.tokenizer": "bpe:576+tasks"}), tmp_path / "other", paths)
