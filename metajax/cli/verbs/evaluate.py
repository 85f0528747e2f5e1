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
    as_there = "as in the run"
    add_number(parser, "--documents", field_types(Evaluation)["documents"], None, "validation documents", as_there)
    parser.add_argument(
        "--task", default=None, metavar="LIST", help="tasks such as list_recall,parity, or a run without (as in the run)"
    )
    add_number(parser, "--lengths", field_types(Tasks)["eval_lengths"], None, "length bins of the tasks", as_there, "LIST")
    parser.add_argument("--conditions", default=None, metavar="LIST", help="none, right, empty, shuffled (as in the run)")
    parser.add_argument(
        "--choice",
        default=None,
        metavar="LIST",
        help="multiple choice, KIND:FILE such as arc_easy:arc_easy/test.jsonl (as in the run)",
    )
    add_number(parser, "--shots", field_types(Choice)["shots"], None, "solved examples before each question", as_there, "LIST")
    parser.add_argument(
        "--contexts",
        default=None,
        metavar="LIST",
        help="metadata before the questions: none, empty, task (a fitting source)",
    )
    add_place(parser)


@verb("eval", add_eval)
def evaluate(options: argparse.Namespace, started: float) -> int:
    """Evaluate a run's newest checkpoint again.

    python run.py eval RUN --conditions none,right,shuffled  validation bits per byte with and without metadata
    python run.py eval RUN --task parity --lengths 64,128    a synthetic task by length
    """
    config, changes = common.config_of_run(options), {}
    if options.documents is not None:
        changes["evaluation.documents"] = options.documents
    if options.conditions is not None:
        changes["evaluation.conditions"] = options.conditions
    for field, words in (("tasks", options.choice), ("shots", options.shots), ("contexts", options.contexts)):
        if words is not None:
            require(
                options.choice is not None or config.evaluation.choice is not None,
                f"--{field}: the run has no multiple choice; name its files with --choice KIND:FILE",
            )
            changes[f"evaluation.choice.{field}"] = words
    if options.task is not None:
        changes["tasks.names"] = options.task
    if options.lengths is not None:
        changes["tasks.eval_lengths"] = options.lengths
    if changes.keys() & {"tasks.names", "tasks.eval_lengths"} and config.tasks is None:
        changes["tasks.train_length"] = config.data.sequence_length  # what it was trained on is text
    config = override(config, changes)
    opened = common.open_run(options, options.run)
    from metajax.experiment import evaluate_run
    from metajax.reporting.terminal import print_evaluation

    print_evaluation(evaluate_run(opened, config, common.paths_of(options)))
    return 0
