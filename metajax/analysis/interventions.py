"""Zeroing at the meta-tokens of a trained model, as accuracy on the tasks.

The trained model with the positions or the token embedding of its meta-tokens set to zero. The paper reports that accuracy stays or rises
without positions, and falls without the embedding. In a prompt with one meta-token (list recall, parity), meta-attention has one key, so its
position has no effect.

Source: Language Modeling with Learned Meta-Tokens (arXiv 2509.16278), the tables on zeroed positions and zeroed token embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from metajax.analysis import Figures, Numbers, analysis
from metajax.analysis.common.study import META_TOKENS, Study
from metajax.core.errors import UserError
from metajax.evaluation.tasks import evaluate_tasks
from metajax.models.lm import LM, with_intervention
from metajax.reporting.panels import name_rows, panels, point

INTERVENTIONS = {  # name: (words, changes to `MetaTokens`). The paper does not state where positions are zeroed.
    "none": ("as trained", {}),
    "zero_position": ("no position", {"zero_position": "both"}),
    "zero_position_causal": ("no position in causal attention", {"zero_position": "causal"}),
    "zero_position_meta": ("no position in meta-attention", {"zero_position": "meta"}),
    "zero_token": ("no token embedding", {"embedding": "zero"}),  # the position stays
}


def intervene(model: LM) -> dict[str, LM]:
    """{name: the model under that intervention}, for the interventions that the model's position scheme allows."""
    found = {}
    for name, (_, changes) in INTERVENTIONS.items():
        try:
            found[name] = with_intervention(model, **changes)
        except UserError:
            continue  # for example, meta-attention has no separate learned positions
    return found


@analysis("interventions", title="Zeroing at the meta-tokens", **META_TOKENS, on_prompts=False)
def interventions(study: Study) -> dict[str, Any]:
    """{intervention: {task: {length: accuracy, as from `evaluate_tasks`}}}, all on the run's test examples."""
    models = intervene(study.model)
    return {name: evaluate_tasks(study.program, study.corpora, model) for name, model in models.items()}


@interventions.headlines
def headlines(numbers: Numbers) -> list[str]:
    lines = []
    for task, length, found in _bins(numbers):
        shown = [f"{words} {n['exact']:.1%} ({n['exact_low']:.1%} to {n['exact_high']:.1%})" for words, n in found.items()]
        count = next(iter(found.values()))["n"]
        lines.append(f"{task.replace('_', ' ')}, {length} tokens, n = {count:,}: exact match {', '.join(shown)}")
    return lines


@interventions.figures
def figures(result: Numbers) -> Figures:
    words = [words for words, _ in INTERVENTIONS.values()]
    by_task: dict[str, list[tuple[str, str, dict[str, Any]]]] = {task: [] for task in result["none"]}
    for task, length, found in _bins(result):
        by_task[task] += [(length, name, scored) for name, scored in found.items()]
    figure, axes_of = panels(len(by_task), 1, 0.55 + 0.34 * max(map(len, by_task.values())))
    for axes, (task, rows) in zip(axes_of, by_task.items(), strict=True):
        for y, (_, name, n) in enumerate(rows):
            point(axes, y, n["exact_low"], n["exact"], n["exact_high"], words.index(name))
        name_rows(axes, [f"{length}: {name}" for length, name, _ in rows], "")
        axes.set_xlim(-0.03, 1.03)
        axes.set_title(task.replace("_", " "), fontweight="bold")
    figure.supxlabel("exact match", fontsize=10.5)
    return [(figure, "Exact match by length and intervention, with 95 % intervals over examples.")]


def _bins(numbers: Numbers) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(task, length, {words of the intervention: accuracy}) for every length with examples."""
    for task, bins in numbers["none"].items():
        for length, whole in bins.items():
            if whole["exact"] is not None:
                made = {words: numbers[name][task][length] for name, (words, _) in INTERVENTIONS.items() if name in numbers}
                yield task, length, made
