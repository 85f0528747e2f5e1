"""How often a trained policy prefers the chosen answers of validation pairs more than its reference does."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from metajax.data.pipeline import Corpora
from metajax.evaluation.statistics import share_interval
from metajax.evaluation.validation import require_finite, totals, validation
from metajax.runs.directory import find_run
from metajax.training.checkpoints import newest_good, read_parameters
from metajax.training.losses import token_scores
from metajax.training.objectives.dpo import METRICS, preference_sums
from metajax.training.program import Program
from metajax.training.step import Batch


def evaluate_preferences(program: Program, corpora: Corpora, model: Any) -> dict[str, Any]:
    """Means over the validation pairs: margin, accuracy (the share with a margin above 0), chosen_reward; see `preference_sums`.

    The result also has `pairs`, their number; `low` and `high`, the 95 % interval of the accuracy; and `reference_step`.
    """
    parent, beta = find_run(program.config.init.run, corpora.paths.runs), program.config.dpo.beta
    step = newest_good(parent)
    reference = read_parameters(parent, program.abstract_state().model, step=step)
    sums_of = partial(jax.jit(partial(_sums, beta=beta)), model, reference)
    total = totals(program, validation(corpora, "training").batches, sums_of)
    require_finite(total["margin"], "the validation pairs")
    pairs = round(total["pairs"])
    low, high = share_interval(round(total["accuracy"]), pairs)
    means = {name: total[name] / total["pairs"] for name in METRICS}
    return means | {"pairs": pairs, "low": low, "high": high, "reference_step": step}


def _sums(model: Any, reference: Any, batch: Batch, *, beta: float) -> dict[str, jax.Array]:
    nll, reference_nll = (token_scores(m, batch).nll for m in (model, reference))
    return preference_sums(nll, reference_nll, batch["loss_weights"], batch["segment_ids"], beta)[1]
