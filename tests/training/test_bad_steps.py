"""Skipped steps: the state that they keep, the counts that they advance, and when a run stops."""

import json

import jax
import numpy as np
import pytest

from metajax.data.pipeline import open_corpora, training_batches
from metajax.experiment import run_experiment
from metajax.runs.files import read_lines
from metajax.training.optimizers import schedule
from metajax.training.program import Program
from metajax.training.state import to_arrays
from metajax.training.trainer import NonFinite

SKIP = {"runtime.on_bad_step": "skip"}


def arrays(state):
    return {path: np.asarray(value) for path, value in to_arrays(state).items()}


@pytest.mark.fault(12)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_rate_that_is_logged_is_the_rate_that_is_applied(tiny_config, paths, accumulate):
    """Adam's first update moves every parameter by the rate or by almost nothing, so the rate can be measured."""
    warmup = {"optimizer.warmup_steps": 5, "optimizer.weight_decay": 0.0, "training.steps": 8}
    config = tiny_config(**SKIP, **warmup, **{"training.accumulation_steps": accumulate})
    corpora = open_corpora(config, paths)
    program, batch = Program.build(config, corpora.tokenizer.vocabulary.size), training_batches(corpora)[0]
    bad = batch | {"loss_weights": np.full_like(batch["loss_weights"], np.nan)}
    state = program.create_state()
    step = program.compile_step(state, program.put(batch))
    begun, rates = arrays(state), [pytest.approx(float(schedule(config.optimizer, 8)(n)), rel=1e-6) for n in range(8)]
    for taken in range(3):
        state, metrics = step(state, program.put(bad))
        assert not metrics["kept"] and float(metrics["learning_rate"]) == rates[taken]
    left, names = arrays(state), [path for path in begun if not path.endswith("count") and path != "step"]
    assert left["step"] == 3 and all(np.array_equal(left[name], begun[name]) for name in names)
    state, metrics = step(state, program.put(batch))
    moved = max(np.abs(value - begun[path]).max() for path, value in arrays(state).items() if path.startswith("model/"))
    assert moved == pytest.approx(float(metrics["learning_rate"]), rel=1e-3)
    assert float(metrics["learning_rate"]) == rates[3]
    counts = {path: int(value) for path, value in arrays(state).items() if path.endswith("count")}
    assert sorted(counts.values()) == [1, 4], "Adam has made one update, the schedule is at its fourth step"
    for _ in range(4):
        state, metrics = step(state, program.put(batch))
    assert float(metrics["learning_rate"]) == rates[7], "the schedule comes to its end"


@pytest.mark.fault(12)
@pytest.mark.parametrize("most", [1, 3])
def test_too_many_skipped_steps_in_a_row_stop_the_run(family, paths, tmp_path, most):
    """Every step exceeds the limit: the run stops at the same step again after a restart, and the bundle reproduces it."""
    config = family.config(**SKIP, **{"runtime.max_grad_norm": 1e-9, "runtime.max_skipped": most, "runtime.save_every": 2})
    for _ in range(2):
        with pytest.raises(NonFinite, match=f"step {most}: "):
            run_experiment(config, tmp_path, paths)
    [bundle] = tmp_path.glob("replay-step-*")
    said, values = json.loads((bundle / "metrics.json").read_text()), family.replay(bundle, config, paths)
    assert not values["kept"] and values["grad_norm"] == pytest.approx(float(said["grad_norm"]), rel=1e-5)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == most - 1 and not (tmp_path / "report.json").exists()


@pytest.mark.fault(12)
def test_skipped_steps_are_counted_and_reported_once(family, paths, tmp_path, capfd):
    config = family.config(**SKIP, **{"runtime.max_grad_norm": 1e-9, "runtime.log_every": 3})
    report = run_experiment(config, tmp_path, paths)
    assert report["left_out"] == {"count": 6, "first": 1, "last": 6, "in_a_row": 6}
    assert len(report["warnings"]) == 1
    assert capfd.readouterr().err.count("left out") <= 3, "at steps 3 and 6, and at the end"
    assert [line["left_out"] for line in read_lines(tmp_path / "metrics.jsonl")] == ["spike"] * 6


def test_a_run_without_bad_steps_has_no_such_line(tiny_config, paths, tmp_path):
    report = run_experiment(tiny_config(), tmp_path, paths)
    assert report["left_out"]["count"] == 0 and report["warnings"] == []
    assert jax.tree.leaves(report["left_out"]) == [0] * 4
