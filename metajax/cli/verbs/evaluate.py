"""`eval`: evaluate a run's newest checkpoint."""

from __future__ import annotations

import argparse

from metajax.cli import common
from metajax.cli.arguments import add_number, add_place, add_run_word
from metajax.cli.verb import verb
from metajax.config import Choice, Evaluation, Tasks
from metajax.core.errors import require
from metajax.core.fields import field_types, override


def add_eval(parser: argparse.ArgumentParser) -> None:
    add_run_word(parser)
    same = "as in the run"
    add_number(parser, "--documents", field_types(Evaluation)["documents"], None, "validation documents", same)
    add_number(parser, "--lengths", field_types(Tasks)["eval_lengths"], None, "length bins of the tasks", same, "LIST")
    add_number(parser, "--shots", field_types(Choice)["shots"], None, "solved examples before each question", same, "LIST")
    for name, text in (
        ("--task", "tasks such as list_recall,parity, also for a run without tasks"),
        ("--conditions", "none, right, empty, shuffled"),
        ("--choice", "multiple choice, KIND:FILE such as arc_easy:arc_easy/test.jsonl"),
        ("--contexts", "metadata before the questions: none, empty, or task for a fitting source"),
    ):
        parser.add_argument(name, metavar="LIST", help=f"{text} ({same})")
    add_place(parser)


@verb("eval", add_eval)
def evaluate(options: argparse.Namespace, started: float) -> int:
    """Evaluate a run's newest checkpoint again.

    python run.py eval RUN --conditions none,right,shuffled  validation bits per byte with and without metadata
    python run.py eval RUN --task parity --lengths 64,128    a synthetic task by length
    """
    config = common.config_of_run(options)
    has_choice = options.choice is not None or config.evaluation.choice is not None
    for option in ("shots", "contexts"):
        remedy = "the run has no multiple choice; name its files with --choice KIND:FILE"
        require(has_choice or getattr(options, option) is None, f"--{option}: {remedy}")
    asked = {
        "evaluation.documents": options.documents,
        "evaluation.conditions": options.conditions,
        "evaluation.choice.tasks": options.choice,
        "evaluation.choice.shots": options.shots,
        "evaluation.choice.contexts": options.contexts,
        "tasks.names": options.task,
        "tasks.eval_lengths": options.lengths,
    }
    changes = {field: value for field, value in asked.items() if value is not None}
    if changes.keys() & {"tasks.names", "tasks.eval_lengths"} and config.tasks is None:
        changes["tasks.train_length"] = config.data.sequence_length  # the model was trained on text
    config = override(config, changes)
    opened = common.open_run(options)
    from metajax.experiment import evaluate_run
    from metajax.reporting.terminal import print_evaluation

    print_evaluation(evaluate_run(opened, config, common.paths_of(options)))
    return 0
