"""The evaluation of a run on text while it trains."""

from __future__ import annotations

from typing import Any

from metajax.data.pipeline import Corpora, check_evaluation
from metajax.evaluation.held_out import evaluate_held_out
from metajax.evaluation.multiple_choice import check_choice, evaluate_choice
from metajax.evaluation.tasks import check_bins, evaluate_tasks, mean_exact
from metajax.training.program import Program


def check(corpora: Corpora) -> None:
    """UserError where something could not be evaluated as the config asks."""
    check_evaluation(corpora)
    check_choice(corpora)
    check_bins(corpora.config)


def score(program: Program, corpora: Corpora, model: Any) -> tuple[float, dict[str, float]]:
    """(score, numbers for the metrics). The score, lower is better: held-out bits per byte, or the error rate of the tasks."""
    config = corpora.config
    if config.tasks is not None:
        results = evaluate_tasks(program, corpora, model)
        exact = {f"exact/{task}/{length}": found["exact"] for task, bins in results.items() for length, found in bins.items()}
        return 1 - mean_exact(results), exact
    bpb = evaluate_held_out(program, corpora, model, config.evaluation.conditions[0])["bpb"]
    record = {"held_out_bpb": bpb}
    if config.evaluation.choice is not None:
        record["choice"] = evaluate_choice(program, corpora, model)["average"]
    return bpb, record
