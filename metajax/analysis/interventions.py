"""Zeroing interventions at the meta-tokens of a trained model, as accuracy on the tasks.

Source: Language Modeling with Learned Meta-Tokens (arXiv 2509.16278), the tables on zeroed positions and zeroed token embeddings.
"""

from __future__ import annotations

from typing import Any

from metajax.analysis.study import Study
from metajax.core.errors import UserError
from metajax.evaluation.tasks import evaluate_tasks
from metajax.models.lm import LM, with_intervention

INTERVENTIONS: dict[str, dict[str, str]] = {
    "none": {},
    "zero_position": {"zero_position": "both"},
    "zero_position_causal": {"zero_position": "causal"},  # in causal attention alone; which scope the paper has is not stated
    "zero_position_meta": {"zero_position": "meta"},
    "zero_token": {"embedding": "zero"},  # the position stays
}


def intervene(model: LM) -> dict[str, LM]:
    """{name: the model under that intervention}, for those that mean something under the model's position scheme."""
    found = {}
    for name, changes in INTERVENTIONS.items():
        try:
            found[name] = with_intervention(model, **changes)
        except UserError:
            continue  # such as another position for meta-attention, where the positions are learned vectors added once
    return found


def interventions(study: Study) -> dict[str, Any]:
    """{intervention: {task: {length: accuracy as of `evaluate_tasks`}}} on the run's test examples, the same for all."""
    models = intervene(study.model)
    return {name: evaluate_tasks(study.program, study.corpora, model) for name, model in models.items()}
